"""The shipped figures of ``effdeploy list``: whole, and those of the models."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from deploy.catalogue import DATA, catalogue, count_system, read_catalogue
from deploy.errors import BundleError
from deploy.models import SYSTEMS, find_system
from deploy.recipe import configs_folder, read_yaml

STALE = "the figures are stale: python -m deploy.catalogue"


def test_every_variant_that_a_recipe_ships_is_in_the_data():
    shipped = {system.name: system for system in read_catalogue(DATA)}
    assert list(shipped) == list(SYSTEMS), STALE
    for name in SYSTEMS:
        system, variants = find_system(name), {variant.name: variant for variant in shipped[name].variants}
        assert list(variants) == list(read_yaml(configs_folder() / f"{name}.yaml").variants), STALE
        assert (shipped[name].task, shipped[name].paper) == (system.task, system.paper), STALE
        assert all(v.summary == system.variants[v.name].summary for v in variants.values()), STALE


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_figures_are_those_of_the_models(name):
    """The smallest variant of each system is counted again."""
    shipped = next((system for system in read_catalogue(DATA) if system.name == name), None)
    assert shipped is not None, STALE
    smallest = min(shipped.variants, key=lambda variant: variant.macs)
    assert count_system(name, only=smallest.name).variants == (smallest,), STALE


def test_a_system_that_is_not_in_the_data_is_counted(monkeypatch, tmp_path):
    path = tmp_path / "catalogue.json"
    path.write_text('{"systems": []}')
    monkeypatch.setattr("deploy.catalogue.DATA", path)
    monkeypatch.setattr("deploy.catalogue.SYSTEMS", ("anew",))
    monkeypatch.setattr("deploy.catalogue.count_system", lambda name: f"counted {name}")
    assert catalogue() == ("counted anew",)


@pytest.mark.parametrize("text", ["{", "[]", '{"systems": [{"name": "x"}]}'])
def test_damaged_data_are_an_error(text, tmp_path):
    path = tmp_path / "catalogue.json"
    path.write_text(text)
    with pytest.raises(BundleError, match=r"catalogue\.json cannot be read"):
        read_catalogue(path)


def test_the_list_needs_no_torch():
    code = "import sys; from deploy.cli import app; app(standalone_mode=False); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, "list", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert [system["name"] for system in last["record"]["systems"]] == list(SYSTEMS)
