"""Training large models without memory that is held and not used.

glibc's malloc raises the size from which blocks come from the kernel, and go back there, up to 32 MB. Activations below that are
then carved out of one heap, where each layer's leave holes that the next ones do not fit into: fine-tuning a Whisper base held
0.4 GB of 2.9 that nobody used. With a fixed limit their memory goes back at once. That costs the kernel's time for new pages,
which is little beside what a large model computes with a page, and a fifth of the time of a small one.
"""

from __future__ import annotations

import ctypes
import os
import platform

from torch import nn

LARGE_BYTES = 200_000_000
"""Of weights: from here on pages cost next to nothing."""
BLOCK_BYTES = 2**20
"""A matrix of a model of width 512 in float32."""
_M_MMAP_THRESHOLD = -3
_SAID_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Variables that say that the user chose how memory is managed."""


def give_back_blocks(module: nn.Module) -> bool:
    """Has this process give blocks of 1 MB and more back when they are freed, from now on, if a large model is trained in it.

    Does nothing on other C libraries than glibc, or where the user has said how memory is managed.

    Returns:
        Whether it does so now.
    """
    weights = sum(p.nbytes for p in module.parameters())
    if weights < LARGE_BYTES or platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _SAID_BY_USER):
        return False
    return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, BLOCK_BYTES))
