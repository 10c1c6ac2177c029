"""Deterministic parameters and inputs for the detector / SparseFormer reference fixtures.

Pure numpy; `fill(key, shape)` depends on nothing but the state_dict key and the shape, so any
re-implementation that uses the SAME key names reproduces the official model's weights exactly.
RandomState is used on purpose: its stream is frozen by numpy's compatibility policy.

    sd = model.state_dict()
    for k, v in sd.items():
        a = fill(k, tuple(v.shape))
        if a is not None:                      # None -> leave the buffer as the model built it
            v.copy_(torch.from_numpy(a))
"""

import zlib

import numpy as np

AS_BUILT = ("anchors", "valid_mask", "num_points_scale", "n_points_scale")

# (substring, last name component) -> (mean, std) for vectors, or gain for matrices. First hit wins.
_VEC = (
    ("sampling_offsets", "bias", 0.0, 1.5),
    ("score_head", "bias", -2.0, 0.5),
    ("class_embed", "bias", -2.0, 0.5),
    ("parameter_generator.2", "bias", 0.0, 0.12),
    ("", "roi_offset_bias", 0.0, 1.0),
    ("branch2c.norm", "weight", 0.4, 0.04),  # last norm of a bottleneck: damped, so that
    ("layer.2.normalization", "weight", 0.4, 0.04),  # depth does not amplify rounding noise
)
_GAIN = (
    ("sampling_offsets", 0.3),
    ("score_head", 1.5),
    ("class_embed", 1.5),
    ("bbox_head", 0.7),
    ("bbox_embed", 0.7),
    ("self_attn.out_proj", 0.35),  # weak token averaging: the 300 queries stay distinct
    ("self_attn.o_proj", 0.35),
    ("parameter_generator.2", 0.12),
    ("roi_adjust_module", 0.2),
)


def fill(key, shape):
    """float32 array for `key`, int64 zeros for counters, or None for 'leave as built'."""
    last = key.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if last in AS_BUILT:
        return None
    n = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(shape))
    if last == "running_var":
        a = np.exp(0.25 * n)
    elif last == "running_mean":
        a = 0.1 * n
    elif "token_roi" in key or "initial_roi" in key:  # (N, 4) x1 y1 x2 y2 inside [0, 1]
        c, wh = 0.5 + 0.18 * np.tanh(n[:, :2]), 0.35 + 0.12 * np.tanh(n[:, 2:])
        a = np.concatenate([c - wh / 2, c + wh / 2], 1)
    elif "token_embedding" in key or "initial_embedding" in key:
        a = n
    elif len(shape) <= 1:
        a = 1.0 + 0.1 * n if last == "weight" else 0.05 * n
        for sub, tail, mean, std in _VEC:
            if sub in key and tail == last:
                a = mean + std * n
                break
    else:
        fan_in = int(np.prod(shape[1:]))
        gain = next((g for sub, g in _GAIN if sub in key), 1.3 if len(shape) == 4 else 1.0)
        if fan_in >= 8:  # centred filters: the mean that ReLU/SiLU leaves does not swamp the signal
            n = n - n.mean(axis=tuple(range(1, len(shape))), keepdims=True)
        a = n * (gain / np.sqrt(float(fan_in)))
    return a.astype(np.float32)


def image(shape, seed=0):
    """Deterministic image-like input (N,3,H,W): smooth waves + integer-hash noise, range about [-2, 2]."""
    b, c, h, w = np.ogrid[: shape[0], : shape[1], : shape[2], : shape[3]]
    s = float(seed)
    wave = (
        0.7 * np.sin(0.031 * (c + 1) * h + 0.047 * w + 0.9 * s + 0.5 * b)
        + 0.6 * np.cos(0.013 * h * (1 + 0.3 * c) - 0.029 * (c + 2) * w + 0.37 * s)
        + 0.5 * np.sin(0.11 * h + 0.083 * w * (c + 1) + 1.3 * b) * np.cos(0.007 * (h - w) + 0.2 * s)
    )
    i = (
        (h.astype(np.uint64) * 73856093)
        ^ (w.astype(np.uint64) * 19349663)
        ^ (c.astype(np.uint64) * 83492791)
        ^ (b.astype(np.uint64) * 2654435761)
        ^ np.uint64((seed + 1) * 40503)
    ) & np.uint64(0xFFFFFFFF)
    i = (i * np.uint64(2246822519) & np.uint64(0xFFFFFFFF)) >> np.uint64(16)
    return (wave + 0.8 * (i.astype(np.float64) / 65535.0 - 0.5)).astype(np.float32)


def features(shape, key, scale=1.0):
    """Deterministic feature map for sub-module fixtures (for example the hybrid encoder's inputs)."""
    n = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(shape))
    return (scale * n).astype(np.float32)


def load(model):
    """Fill a torch module in place (parameters and buffers); returns the keys left as built."""
    import torch

    kept = []
    with torch.no_grad():
        for k, v in model.state_dict().items():
            a = fill(k, tuple(v.shape))
            if a is None:
                kept.append(k)
            else:
                v.copy_(torch.from_numpy(a).reshape(v.shape))
    return kept
