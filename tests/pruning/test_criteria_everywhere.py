"""Every criterion on every family: it scores each axis that both have, the same twice, and says so where it cannot."""

from __future__ import annotations

import inspect
import subprocess
import sys
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch

from mmcompress import registry
from mmcompress.errors import DataError, RecipeError
from mmcompress.pruning import cut
from mmcompress.pruning.criteria import mope
from mmcompress.pruning.criteria.base import Criterion, Probe
from mmcompress.pruning.units import CoupledGroup
from tests.families.test_all_families import EXPORTED, context, made

CRITERIA = registry.names("criteria")
Groups = dict[str, list[CoupledGroup]]


def criterion(name: str) -> Criterion:
    found: Criterion = registry.find("criteria", name).CRITERION()
    return found


@cache
def scene(name: str) -> tuple[Probe, Groups]:
    """A model with its data, and for each axis the groups of all towers that have it; no criterion changes it by scoring."""
    model, given = made(name), context(name, count=4)
    family, module = model.family, model.module.requires_grad_(True)
    groups: Groups = {}
    for tower in family.towers:
        axes = [axis for axis in ("ffn", "heads", "width") if axis in family.tower_axes(tower) or axis == "heads"]
        found = {axis: family.unit_groups(module, tower, axis) for axis in axes}
        graph = cut.trace(family, module, tower) if any(not g.explicit for own in found.values() for g in own) else None
        for axis in axes:  # once more: tracing may have put other parts in the place of stock ones
            # The first and the last: a layer is like the one before.
            own = family.unit_groups(module, tower, axis)
            ends = {group.name: group for group in (*own[:1], *own[-1:])}
            groups.setdefault(axis, []).extend(cut.couple(graph, module, g) for g in ends.values())
    return Probe(model, task=given.task, examples=given.train, samples=4, batch_size=4), groups


@pytest.mark.parametrize("which", CRITERIA)
@pytest.mark.parametrize("name", EXPORTED)  # one model of each family, all of them in the slow suite
def test_it_scores_units(name: str, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    probe, groups = scene(name)
    monkeypatch.setattr(mope, "CHUNKS", 2)
    for axis, own in groups.items():
        if not own:
            continue
        if which == "mope":  # which runs the model for each of them
            own = list({c.group.tower: c for c in own}.values())
        if axis not in criterion(which).axes:
            with pytest.raises(RecipeError, match="use it with axis: "):
                criterion(which).unit_scores(own, probe)
            continue
        first = criterion(which).unit_scores(own, probe)
        assert [tuple(s.shape) for s in first] == [(g.units,) for g in own]
        assert all(bool(torch.isfinite(s).all()) for s in first)
        assert any(float(s.max()) > float(s.min()) for s in first), axis
        if axis == "ffn":
            again = criterion(which).unit_scores(own, probe)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("which", CRITERIA)
@pytest.mark.parametrize("name", EXPORTED)  # one model of each family, all of them in the slow suite
def test_it_scores_layers(name: str, which: str) -> None:
    probe, _ = scene(name)
    family, module = probe.model.family, probe.model.module
    stacks = {t: list(family.layers(module, t)) for t in family.towers if "depth" in family.tower_axes(t)}
    if not stacks:
        pytest.skip(f"{name} has no depth")
    probe.keep = {tower: (len(layers) + 1) // 2 for tower, layers in stacks.items()}
    if "depth" not in criterion(which).axes:
        with pytest.raises(RecipeError, match="use it with axis: "):
            criterion(which).layer_scores(stacks, probe)
        return
    first, again = (criterion(which).layer_scores(stacks, probe) for _ in range(2))
    assert {tower: len(s) for tower, s in first.items()} == {tower: len(layers) for tower, layers in stacks.items()}
    for tower, scores in first.items():
        assert bool(torch.isfinite(scores.double()).all())
        assert torch.equal(scores, again[tower])


@pytest.mark.parametrize("which", CRITERIA)
def test_its_file_says_what_its_class_does(which: str) -> None:
    # A recipe check reads these from the file; a criterion that inherits them would be read wrongly.
    found = type(criterion(which))
    assert registry.stated("criteria", which, "needs_data", False) == found.needs_data
    assert tuple(registry.stated("criteria", which, "axes", Criterion.axes)) == found.axes
    assert registry.describe("criteria", which)
    source = inspect.getdoc(sys.modules[found.__module__])
    assert which == "random" or "arXiv" in (source or "") or "NeurIPS" in (source or ""), "states no source"


@pytest.mark.parametrize("which", CRITERIA)
def test_it_reads_data_if_it_says_so(which: str) -> None:
    probe, groups = scene("clip")
    bare, one = Probe(probe.model), criterion(which)
    bare.keep = {"vision": 1}
    layers = list(bare.model.family.layers(bare.model.module, "vision"))
    with pytest.raises(DataError, match="give data") if one.needs_data else nullcontext():
        if "ffn" in one.axes:
            one.unit_scores(groups["ffn"], bare)
        else:
            one.layer_scores({"vision": layers}, bare)


def test_what_a_file_does_not_state_has_its_default() -> None:
    assert registry.stated("criteria", "magnitude", "needs_data", False) is False
    assert registry.stated("criteria", "no-such-criterion", "needs_data", "none") == "none"


def test_a_recipe_check_needs_no_torch() -> None:
    code = (
        "import sys\nfrom mmcompress.passes.prune import Prune\n"
        "assert Prune(ratio=0.5, criterion='flap').uses == ('train',)\n"
        "assert Prune(ratio=0.5, criterion='magnitude-l1').uses == ()\n"
        "try:\n    Prune(ratio=0.5, criterion='influence')\n"
        "except ValueError as e:\n    assert 'influence chooses whole layers; use it with axis: depth' in str(e), e\n"
        "else:\n    raise SystemExit('not refused')\n"
        "assert 'torch' not in sys.modules\n"
    )
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
