"""What the processes of a data-parallel training tell each other. With one process all of it does nothing.

Gradients are summed in one go after the backward pass, not while it runs as DistributedDataParallel does: a step may have
several backward passes (micro batches), some parameters none, and then every process must still take part.

Shapes: N rows in all processes together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import distributed, nn

BUCKET = 16_000_000
"""Numbers that are sent at a time: a copy of so many is made."""


def count() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if _together() else 1


def rank() -> int:
    """This process's number, from 0, the main one."""
    return distributed.get_rank() if _together() else 0


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def gather(rows: torch.Tensor, size: int) -> torch.Tensor:
    """The rows (N, ...) of all processes in the order of their numbers; this one's are its block of them, as `pieces.Share` cuts.

    Args:
        size: N, at least the number of processes.
    """
    many = count()
    if many == 1:
        return rows
    sizes = [(k + 1) * size // many - k * size // many for k in range(many)]
    # Blocks of one size, as gloo and NCCL want them.
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    found = [torch.empty_like(padded) for _ in range(many)]
    distributed.all_gather(found, padded)
    return torch.cat([block[:own] for block, own in zip(found, sizes, strict=True)])


def add(parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sums over the processes of numbers of shape ()."""
    if count() == 1:
        return dict(parts)
    values = torch.stack(list(parts.values()))
    distributed.all_reduce(values)
    return dict(zip(parts, values.unbind(), strict=True))


def add_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Puts the sum over the processes in every parameter's gradient; one that no process has stays None."""
    if count() == 1 or not parameters:
        return
    device = parameters[0].device
    there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=device)
    distributed.all_reduce(there, op=distributed.ReduceOp.MAX)
    gradients = []
    for parameter, has in zip(parameters, there.tolist(), strict=True):
        if has:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([g.flatten() for g in bucket])
        distributed.all_reduce(flat)
        for gradient, values in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(values.view_as(gradient))


def _buckets(gradients: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    found: list[list[torch.Tensor]] = []
    room = 0
    for gradient in gradients:
        if not found or gradient.numel() > room:
            found.append([])
            room = BUCKET
        found[-1].append(gradient)
        room -= gradient.numel()
    return found


def of_main(value: float, device: torch.device) -> float:
    """The main process's number, for decisions that all must take alike."""
    if count() == 1:
        return value
    held = torch.tensor(value, dtype=torch.float64, device=device if device.type == "cuda" else "cpu")
    distributed.broadcast(held, 0)
    return float(held)
