"""Where work runs, and in which precision."""

from __future__ import annotations

from typing import Literal

import torch

from mmcompress import processes
from mmcompress.errors import UnavailableError, one_of

DEVICES = ("auto", "cuda", "mps", "cpu")
Precision = Literal["auto", "fp32", "bf16"]


def pick_device(name: str) -> torch.device:
    """The device behind a name; ``auto`` takes the first that is there of cuda, mps and cpu.

    Raises:
        UnavailableError: there is no such device here, or no device is called so.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": _mps(), "cpu": True}
    if name == "auto":
        return torch.device(next(n for n, found in there.items() if found))
    if name not in there:
        raise UnavailableError(one_of("device", name, DEVICES))
    if not there[name]:
        have = ", ".join(n for n, found in there.items() if found)
        raise UnavailableError(f"device {name!r} is not there; this machine has: {have}")
    return torch.device(name)


def _mps() -> bool:
    """Whether there is a Mac's GPU, and no other process to train with: gloo sends nothing of its memory."""
    return torch.backends.mps.is_available() and processes.is_alone()


def pick_precision(name: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """The precision of a forward pass; ``auto`` takes bf16 where the hardware multiplies it natively.

    Raises:
        UnavailableError: bf16 was asked for on a device that has none.
    """
    if name == "fp32":
        return "fp32"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        # torch has no public name for these; without either a bf16 product is emulated and slower than fp32.
        native = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    else:
        native = False
    if name == "auto":
        return "bf16" if native else "fp32"
    if device.type == "mps":
        raise UnavailableError("precision bf16 is not available on mps; allowed: auto, fp32")
    return "bf16"
