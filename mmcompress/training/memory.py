"""Training large models without memory that is held and not used.

An output layer that is tied to the embedding has its gradient three times for a moment: autograd makes the layer's own, a table
of the same size for the few rows that were looked up, and their sum (318 MB of a Whisper base's 290 MB of weights). Here the rows
are added to the layer's.

glibc's malloc raises the size from which blocks come from the kernel, and go back there, up to 32 MB. Activations below that are
then carved out of one heap, where each layer's leave holes that the next ones do not fit into: fine-tuning a Whisper base held
0.4 GB of 2.9 that nobody used. With a fixed limit their memory goes back at once. That costs the kernel's time for new pages,
which is little beside what a large model computes with a page, and a fifth of the time of a small one.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

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


@contextmanager
def looked_up_rows(module: nn.Module, device: torch.device) -> Iterator[None]:
    """In the block, embeddings that share their weight with another layer add their rows to its gradient, and no table.

    The gradient is the same but for the order of its sums. It is in ``weight.grad`` after a backward pass, and not in what
    ``torch.autograd.grad`` gives for the weight. Does nothing on devices that have no sparse gradients.
    """
    tied = _tied_embeddings(module) if device.type in ("cpu", "cuda") else []
    for embedding in tied:
        embedding.forward = partial(_look_up, embedding)  # type: ignore[method-assign] # the module keeps its class and hooks
    try:
        yield
    finally:
        for embedding in tied:
            del embedding.forward


def users(module: nn.Module) -> dict[nn.Parameter, list[nn.Module]]:
    """The layers that hold each parameter: more than one where it is tied."""
    found: dict[nn.Parameter, list[nn.Module]] = {}
    for part in module.modules():
        for weight in part.parameters(recurse=False):
            found.setdefault(weight, []).append(part)
    return found


def _tied_embeddings(module: nn.Module) -> list[nn.Embedding]:
    shared = [part for parts in users(module).values() if len(parts) > 1 for part in parts if type(part) is nn.Embedding]
    return [part for part in shared if part.max_norm is None and not part.scale_grad_by_freq and not part.sparse]


def _look_up(embedding: nn.Embedding, input: torch.Tensor) -> torch.Tensor:  # the name that nn.Embedding gives it
    weight = embedding.weight
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return F.embedding(input, weight, embedding.padding_idx)
    rows = weight.detach().requires_grad_()
    rows.register_post_accumulate_grad_hook(partial(_add_rows, weight))
    return F.embedding(input, rows, embedding.padding_idx, sparse=True)


def _add_rows(weight: torch.Tensor, rows: torch.Tensor) -> None:
    found, rows.grad = rows.grad, None
    assert found is not None  # called after it was made
    if weight.grad is None:
        weight.grad = found.to_dense()
    else:
        weight.grad.add_(found)
