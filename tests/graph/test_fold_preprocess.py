"""Scaling and normalising pixels, folded into the first convolution: every form, and what stays at a padded border."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graph_cases import apply, assert_same, build, draw, ops, outputs_of

from deploy.graph.passes import FOLD_PREPROCESS

ARRAYS = {
    "w": draw(4, 3, 3, 3), "b": draw(4), "full": 255.0, "tiny": 1 / 255,
    "mean": np.float32([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1),
    "std": np.float32([0.229, 0.224, 0.225]).reshape(3, 1, 1),
}  # fmt: skip
PADDED = "it pads with zeros, which a folded shift would turn into the mean colour: one subtraction stays before it"


FORMS = {
    "torchvision": "s = Div(x, full)  d = Sub(s, mean)  i = Div(d, std)",
    "multiplied": "s = Mul(x, tiny)  d = Sub(s, mean)  i = Div(d, std)",
    "the constant first": "s = Mul(tiny, x)  d = Add(negative, s)  i = Mul(std, d)",
    "in grey levels": "d = Sub(x, levels)  i = Div(d, spread)",
    "scale alone": "i = Div(x, full)",
    "one mean for all channels": "d = Sub(x, half)  i = Div(d, full)",
}
EXTRA = {
    "negative": np.float32([-0.5, -0.4, -0.3]).reshape(1, 3, 1, 1),
    "levels": np.float32([123.675, 116.28, 103.53]).reshape(1, 3, 1, 1),
    "spread": np.float32([58.4, 57.1, 57.4]).reshape(1, 3, 1, 1), "half": 127.5,
}  # fmt: skip


def used(steps: str, conv: str = "y = Conv(i, w, b)") -> dict[str, object]:
    words = set((steps + conv).replace("(", " ").replace(")", " ").replace(",", " ").split())
    return {name: value for name, value in {**ARRAYS, **EXTRA}.items() if name in words}


def graph(steps: str, conv: str = "y = Conv(i, w, b)") -> onnx.ModelProto:
    head = "c = Cast<to = 1>(p)  x = Transpose<perm = [0, 3, 1, 2]>(c)"
    text = f"g (uint8[N,6,8,3] p) => (float[N,4,A,B] y) {{ {head} {steps} {conv} }}"
    return build(text, **used(steps, conv))


@pytest.mark.parametrize("form", FORMS)
def test_without_padding_nothing_is_left_before_the_convolution(form):
    before = graph(FORMS[form])
    result, after = apply(FOLD_PREPROCESS, before)
    assert (result.sites, result.declined) == (1, ())
    assert ops(after) == ["Cast", "Transpose", "Conv"]
    assert_same(before, after, atol=2e-4)  # of outputs around 20, from pixels up to 255


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("conv", ["y = Conv<pads = [1,1,1,1]>(i, w, b)", 'y = Conv<auto_pad = "SAME_UPPER">(i, w)'])
def test_with_padding_a_shift_stays_as_one_subtraction(form, conv):
    before = graph(FORMS[form], conv)
    result, after = apply(FOLD_PREPROCESS, before)
    assert result.sites == 1
    left = [] if form == "scale alone" else ["Sub"]
    assert ops(after) == ["Cast", "Transpose", *left, "Conv"]
    assert_same(before, after, atol=2e-4)
    again, same = apply(FOLD_PREPROCESS, after)
    assert again.sites == 0
    assert again.declined == (tuple(f"block/Conv: {PADDED}" for _ in left))
    assert same.SerializeToString() == after.SerializeToString()


def test_a_shift_folded_in_spite_of_padding_is_seen_at_the_border():
    """The control of the tests above: what the guard prevents is no rounding."""
    before = graph(FORMS["torchvision"], "y = Conv<pads = [1,1,1,1]>(i, w, b)")
    unpadded = onnx.load_from_string(before.SerializeToString())
    conv = unpadded.graph.node[-1]
    padding = conv.attribute.pop()
    del unpadded.graph.output[0].type.tensor_type.shape.dim[2:]
    unpadded.graph.output[0].type.tensor_type.shape.dim.add()
    unpadded.graph.output[0].type.tensor_type.shape.dim.add()
    _, folded = apply(FOLD_PREPROCESS, unpadded)
    folded.graph.node[-1].attribute.append(padding)
    apart = np.abs(outputs_of(before)["y"] - outputs_of(folded)["y"])
    assert apart[:, :, 0].min(initial=np.inf) < apart[:, :, 0].max()
    assert apart[:, :, 0].max() > 1  # the border
    assert apart[:, :, 1:-1, 1:-1].max() < 2e-4  # inside, folding is exact


DECLINES = {
    "groups": ("i = Div(x, full)", "y = Conv<group = 3>(i, grouped)", "it has groups, whose"),
    "a weight from an input": ("i = Div(x, full)", "y = Conv(i, given)", "its weight is not constant"),
    "division by zero": ("i = Div(x, nothing)", "y = Conv(i, w)", "block/Div divides by zero"),
    "a scale of zero": ("m = Mul(x, nothing)  i = Add(m, half)", "y = Conv<pads = [1,1,1,1]>(i, w)", "scaled by zero"),
    "read twice": (
        "s = Div(x, full)  i = Sub(s, mean)", "y = Conv<pads = [1,1,1,1]>(i, w)  z = Neg(i)", "has 2 consumers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINES)
def test_what_cannot_be_folded_is_left_with_the_reason(name):
    steps, conv, words = DECLINES[name]
    arrays = {**ARRAYS, **EXTRA, "grouped": draw(3, 1, 3, 3), "nothing": np.float32(0)}
    text = f"c = Cast<to = 1>(p)  x = Transpose<perm = [0, 3, 1, 2]>(c) {steps} {conv}"
    inputs = "uint8[N,6,8,3] p" + (", float[4,3,3,3] given" if "given" in conv else "")
    outputs = "float[N,C,A,B] y" + (", float[N,3,6,8] z" if "z =" in conv else "")
    wanted = {
        n: v for n, v in arrays.items() if n in text.replace("(", " ").replace(")", " ").replace(",", " ").split()
    }
    before = build(f"g ({inputs}) => ({outputs}) {{ {text} }}", **wanted)
    result, after = apply(FOLD_PREPROCESS, before)
    assert result.sites == 0
    assert words in result.declined[0]
    assert ops(after) == ops(before)


NO_SITES = {
    "float images": "g (float[N,3,6,8] x) => (float[N,4,4,6] y) { i = Div(x, full)  y = Conv(i, w) }",
    "a cast of something computed": (
        "g (float[N,3,6,8] f) => (float[N,4,4,6] y) "
        "{ u = Cast<to = 2>(f)  x = Cast<to = 1>(u)  i = Div(x, full)  y = Conv(i, w) }"
    ),
    "another constant than by channel": (
        "g (uint8[N,3,6,8] p) => (float[N,4,4,6] y) { x = Cast<to = 1>(p)  i = Mul(x, row)  y = Conv(i, w) }"
    ),
    "divided by the image": (
        "g (uint8[N,3,6,8] p) => (float[N,4,4,6] y) { x = Cast<to = 1>(p)  i = Div(full, x)  y = Conv(i, w) }"
    ),
}


@pytest.mark.parametrize("name", NO_SITES)
def test_what_is_no_site_is_not_touched(name):
    arrays = {"w": ARRAYS["w"], "row": draw(8)} if "row" in NO_SITES[name] else {"w": ARRAYS["w"], "full": 255.0}
    before = build(NO_SITES[name], **arrays)
    result, after = apply(FOLD_PREPROCESS, before)
    assert (result.sites, result.declined) == (0, ())
    assert ops(after) == ops(before)
