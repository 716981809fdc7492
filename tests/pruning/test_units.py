"""How many units stay, by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmcompress.pruning.units import Shares, Slice, kept_count

SIZES = {"vision": {"ffn": 96, "depth": 3, "width": 48, "heads": 3}, "text": {"ffn": 64, "depth": 2, "width": 32, "heads": 2}}
TOWERS = ("vision", "text")


@pytest.mark.parametrize(
    ("size", "ratio", "step", "kept"),
    [
        (3072, 0.5, 8, 1536),
        (3072, 0.75, 8, 768),
        (100, 0.5, 8, 48),  # 50 lies nearer to 48 than to 56
        (100, 0.1, 8, 88),  # 90 nearer to 88
        (100, 0.0, 8, 100),  # nearest multiple is 104, more than there are
        (12, 1 / 3, 1, 8),
        (3, 0.5, 1, 2),  # 1.5: a half goes up
        (2, 0.9, 1, 0),
        (64, 0.95, 8, 0),  # 3.2 rounds to none
    ],
)
def test_kept_count_by_hand(size: int, ratio: float, step: int, kept: int) -> None:
    assert kept_count(size, ratio, step) == kept


@given(size=st.integers(1, 5000), ratio=st.floats(0, 1, exclude_max=True), step=st.integers(1, 64))
def test_kept_count_is_a_multiple_within_half_a_step(size: int, ratio: float, step: int) -> None:
    kept = kept_count(size, ratio, step)
    assert 0 <= kept <= size
    assert kept % step == 0 or kept == size
    assert abs(kept - size * (1 - ratio)) <= step / 2 + 1e-6


def test_plan_by_hand() -> None:
    assert Shares("ffn", {"vision": 0.5}).plan(SIZES)["vision"] == {"ffn": 48, "depth": 3, "width": 48, "heads": 3}
    assert Shares("ffn", {"vision": 0.5}).plan(SIZES)["text"] == SIZES["text"]
    assert Shares("depth", {"text": 0.5}).plan(SIZES)["text"]["depth"] == 1
    assert Shares("width", {"vision": 1 / 3}).plan(SIZES)["vision"] == {"ffn": 96, "depth": 3, "width": 32, "heads": 2}
    assert Shares("heads", {"vision": 1 / 3}).plan(SIZES)["vision"] == {"ffn": 96, "depth": 3, "width": 48, "heads": 2}
    narrower = Shares("width", {"vision": 0.5}, heads="narrower")
    assert narrower.plan(SIZES)["vision"] == {"ffn": 96, "depth": 3, "width": 24, "heads": 3}
    assert (narrower.units(SIZES["vision"]), narrower.step) == (16, 8)


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        (Shares("ffn", {"vison": 0.5}), "did you mean 'vision'"),
        (Shares("ffn", {"vision": 0.02}), "would cut nothing; raise the ratio or lower round_to"),
        (Shares("ffn", {"vision": 0.99}), "would leave none"),
        (Shares("depth", {"text": 0.9}), "2 layers, would leave none"),
        (Shares("width", {"text": 0.9}), "2 heads, would leave none"),
        (Shares("heads", {"text": 0.1}), "2 heads, would cut nothing; raise the ratio"),
        (
            Shares("width", {"text": 0.1}, heads="narrower"),
            "16 channels of a head, kept in multiples of 8, would cut nothing; raise the ratio or lower round_to",
        ),
    ],
)
def test_mistakes_say_what_to_do(shares: Shares, said: str) -> None:
    (sentence,) = shares.mistakes(TOWERS, SIZES)
    assert said in sentence


def test_no_mistakes_where_all_is_well() -> None:
    assert Shares("ffn", {"vision": 0.5, "text": 0.0}).mistakes(TOWERS, SIZES) == []
    assert "cannot be cut" in Shares("heads", {"text": 0.5}).mistakes(TOWERS, {"text": {"ffn": 64}})[0]


def test_slice_sums_into_units_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    part = Slice("w", weight, 1, torch.tensor([3, 0, 1, 2]), torch.tensor([0, 0, 1, 1]))
    assert part.per_unit(weight, 2).tolist() == [44 + 11, 22 + 33]


def test_recipes_validate_without_torch() -> None:
    code = (
        "import sys; from types import SimpleNamespace; from mmcompress.passes.prune import Prune; "
        "axes = {'axes': ('ffn',), 'stock_axes': ('ffn',), 'cut_together': lambda axis: ()}; "
        "family = SimpleNamespace(name='x', towers=('vision',), **axes); "
        "Prune(ratio=0.5).check_against(family, {'vision': {'ffn': 64}}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
