"""The house holds: one direction of imports, one file a system, no special cases, quick start."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from deploy import errors
from deploy.models import SYSTEMS

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
SOURCES = sorted(DEPLOY.rglob("*.py"))


def contracts():
    with (ROOT / "pyproject.toml").open("rb") as stream:
        return tomllib.load(stream)["tool"]["importlinter"]["contracts"]


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def rank_of(module, layers):
    for rank, layer in enumerate(reversed(layers)):
        for name in (n.strip() for n in layer.split("|")):
            if module == name or module.startswith(name + "."):
                return rank
    return None


def upward(path, layers):
    own = rank_of(".".join(path.relative_to(ROOT).with_suffix("").parts), layers)
    for name in imports_of(path):
        other = rank_of(name, layers) if name.startswith("deploy.") else None
        if own is not None and other is not None and other > own:
            yield name


def test_imports_go_one_way():
    layers = contracts()[0]["layers"]
    assert {str(p.relative_to(ROOT)): list(upward(p, layers)) for p in SOURCES if list(upward(p, layers))} == {}


def test_the_import_check_can_fail(tmp_path):
    layers = contracts()[0]["layers"]
    bad = ROOT / "deploy" / "records.py"
    assert rank_of("deploy.pipeline", layers) > rank_of(".".join(bad.relative_to(ROOT).with_suffix("").parts), layers)
    assert rank_of("deploy.graph.io", layers) == rank_of("deploy.models.base", layers)


def test_every_module_has_a_layer():
    layers = contracts()[0]["layers"]
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in SOURCES if p.parent == DEPLOY}
    assert not [m for m in modules - {"deploy.__init__"} if rank_of(m, layers) is None]


@pytest.mark.parametrize("room", ["graph", "parity", "backends", "precision", "report"])
def test_torch_stays_out(room):
    files = (DEPLOY / room).rglob("*.py")
    assert not [p for p in files for name in imports_of(p) if name.split(".")[0] == "torch"]


def test_tensorrt_only_in_its_backends():
    users = {p.name for p in SOURCES for name in imports_of(p) if name.split(".")[0] in ("tensorrt", "tensorrt_rtx")}
    assert users <= {"tensorrt.py", "tensorrt_rtx.py"}


def test_rich_only_in_the_console():
    assert {p.name for p in SOURCES for name in imports_of(p) if name.split(".")[0] == "rich"} <= {"console.py"}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_is_one_file_and_one_name(name):
    """Nothing outside models/<name>, file or folder, knows the system, but for its line in the registry."""
    mentions = [
        str(p.relative_to(ROOT))
        for p in SOURCES
        if p.stem != name and p.parent.name != name and re.search(rf"['\"]{name}['\"]", p.read_text(), re.IGNORECASE)
    ]
    assert mentions == ["deploy/models/__init__.py"]
    assert (ROOT / "export_configs" / f"{name}.yaml").is_file()


def pieces_of_one(sources):
    """Return the modules of models/ that one system alone imports, itself or through such a piece, with its name."""
    models = {".".join(p.relative_to(ROOT).with_suffix("").parts): set(imports_with_names(p)) for p in sources}
    owner = {f"deploy.models.{name}": name for name in SYSTEMS}
    owner |= {
        module: module.split(".")[2] for module in models if module.split(".")[2:3] and module.split(".")[2] in SYSTEMS
    }
    while True:
        users = {
            module: {owner.get(user, user) for user, imported in models.items() if module in imported}
            for module in models
            if re.fullmatch(r"deploy\.models\.\w+", module) and module not in owner
        }
        found = {module: by.pop() for module, by in users.items() if len(by) == 1 and by <= set(SYSTEMS)}
        if not found:
            break
        owner |= found
    return {module.split(".")[-1]: name for module, name in owner.items() if module.split(".")[2] not in SYSTEMS}


def imports_with_names(path):
    """Yield what a file imports, ``from deploy.models import vit`` as ``deploy.models.vit`` as well."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
    yield from imports_of(path)


def test_what_one_system_alone_uses_lies_in_its_folder():
    """A piece beside the systems is for more than one of them, or for the rooms above; ToMe's are of its technique."""
    assert pieces_of_one(SOURCES) == {"merging": "tome", "merge_forms": "tome", "vit_rows": "tome"}


def test_a_piece_beside_its_only_system_shows(tmp_path, monkeypatch):
    folder = tmp_path / "deploy" / "models"
    folder.mkdir(parents=True)
    (folder / "convmixer.py").write_text("from deploy.models import padding, shared\n")
    (folder / "alternet.py").write_text("from deploy.models.shared import this\n")
    (folder / "padding.py").write_text("from deploy.models.inner import that\n")
    (folder / "inner.py").write_text("that = 1\n")
    (folder / "shared.py").write_text("this = 1\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert pieces_of_one(sorted(folder.rglob("*.py"))) == {"padding": "convmixer", "inner": "convmixer"}


def test_files_and_functions_stay_small():
    long_files = {p.name: n for p in SOURCES if (n := len(p.read_text().splitlines())) > 500}
    long_functions = {
        f"{p.name}:{node.name}": length
        for p in SOURCES
        for node in ast.walk(ast.parse(p.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if (length := (node.end_lineno or 0) - node.body[_after_docstring(node)].lineno + 1) > 60
    }
    assert (long_files, long_functions) == ({}, {})


def _after_docstring(node):
    first = node.body[0]
    documented = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return 1 if documented and len(node.body) > 1 else 0


def leaves(kind):
    for child in kind.__subclasses__():
        yield child
        yield from leaves(child)


def test_exit_codes_are_unique_and_drawn():
    kinds = list(leaves(errors.EffdeployError))
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes)
    assert not {0, 1, 2, 130} & set(codes)
    for kind in kinds:
        assert f"{kind.__name__} ({kind.exit_code})" in str(errors.__doc__)


def test_help_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys, time; start = time.process_time()\n"
        "from typer.testing import CliRunner; from deploy.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'polygraphy', 'matplotlib', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(time.process_time() - start)\n"
    )
    seconds = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert float(seconds) < 0.5  # CPU seconds: what the issue allows, whatever else the machine does


def test_nothing_of_this_machine_is_in_the_project():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    for name in filter(None, tracked.split("\0")):
        if name.endswith((".py", ".md", ".toml", ".yaml", ".json", ".j2", ".css", ".txt")):
            text = (ROOT / name).read_text(encoding="utf-8")
            assert str(ROOT) + "/" not in text, name
