"""When glibc's malloc hands freed memory back to the kernel: at once where it may not fit, late where it does.

It raises the size from which blocks come from the kernel, and go back there, up to 32 MB. Activations below that are then carved
out of one heap, where each layer's leave holes that the next ones do not fit into: fine-tuning a Whisper base held 0.4 GB of 2.9
that nobody used, and what reading an ONNX file took stays too. With a fixed limit their memory goes back at once. That costs the
kernel's time for new pages: a tenth of the processor time of a ViLT, a fifth of a small model's. So only models whose memory may
not fit pay it.

Without it the end of the heap goes back whenever enough of it is free. Whether a training step's activations lie there depends
on what was allocated behind them before: of two loops of the same arithmetic (`benchmarks/distillation.py`) one took 7% more
time. So small models keep what they free until they are trained.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LARGE_BYTES = 200_000_000
"""Of weights: from here on memory counts more than a tenth of the time."""
BLOCK_BYTES = 2**18
"""The hidden states of 85 tokens of width 768 in float32; with 1 MB a ViLT with two pictures kept 0.2 GB of them."""
MOST_BLOCK_BYTES = 2**25
"""The highest limit that glibc takes, and to which it raises its own."""
KEPT_BYTES = 10**9
"""The end of the heap may be as long before it goes back."""
STEADY = {"MALLOC_TRIM_THRESHOLD_": str(KEPT_BYTES), "MALLOC_MMAP_THRESHOLD_": str(MOST_BLOCK_BYTES)}
"""Variables for a process that keeps what it frees from its start."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SAID_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Variables that say that the user chose how memory is managed."""

_limits = (MOST_BLOCK_BYTES, 2 * MOST_BLOCK_BYTES)
"""What holds outside of `keeping_blocks` once it was used: where glibc's own limits end up, twice a block as its manual says."""


def give_back_blocks(weights: int) -> bool:
    """Has this process give blocks of 256 KB and more back when they are freed, from now on, if it handles a large model.

    Does nothing on other C libraries than glibc, or where the user has said how memory is managed.

    Args:
        weights: the model's bytes.

    Returns:
        Whether it does so now.
    """
    global _limits
    libc = _glibc()
    if weights < LARGE_BYTES or libc is None:
        return False
    _limits = BLOCK_BYTES, 2 * BLOCK_BYTES
    return _set(libc, *_limits)


@contextmanager
def keeping_blocks() -> Iterator[bool]:
    """In the block this process keeps what it frees, but for blocks above 32 MB, and gives it back after it; says whether."""
    libc = _glibc()
    if libc is None:
        yield False
        return
    try:
        yield _set(libc, MOST_BLOCK_BYTES, KEPT_BYTES)
    finally:
        _set(libc, *_limits)
        libc.malloc_trim(0)


def _glibc() -> Any:
    """The C library where it is glibc and the user leaves its memory to us."""
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _SAID_BY_USER):
        return None
    return ctypes.CDLL(None)


def _set(libc: Any, block: int, kept: int) -> bool:
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, block) and libc.mallopt(_M_TRIM_THRESHOLD, kept))
