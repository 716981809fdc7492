"""Devices and precisions by name."""

from __future__ import annotations

import pytest
import torch

from mmcompress.errors import UnavailableError
from mmcompress.training.device import pick_device, pick_precision


def test_auto_takes_the_first_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert pick_device("auto").type == expected


def test_a_device_that_is_not_there_is_refused_with_what_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UnavailableError, match="this machine has: cpu"):
        pick_device("cuda")
    with pytest.raises(UnavailableError, match="did you mean 'cuda'"):
        pick_device("cuad")


@pytest.mark.parametrize(("bf16", "amx", "expected"), [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")])
def test_auto_precision_asks_the_cpu(monkeypatch: pytest.MonkeyPatch, bf16: bool, amx: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert pick_precision("auto", torch.device("cpu")) == expected
    assert pick_precision("bf16", torch.device("cpu")) == "bf16"
    assert pick_precision("fp32", torch.device("cpu")) == "fp32"


def test_bf16_on_mps_is_refused() -> None:
    assert pick_precision("auto", torch.device("mps")) == "fp32"
    with pytest.raises(UnavailableError, match="bf16"):
        pick_precision("bf16", torch.device("mps"))
