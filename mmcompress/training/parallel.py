"""What the processes of a data-parallel training tell each other. With one process all of it does nothing.

Gradients are summed in one go after the backward pass, not while it runs as DistributedDataParallel does: a step may have
several backward passes (micro batches), some parameters none, and then every process must still take part.

Shapes: N rows in all processes together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import distributed, nn

from mmcompress import processes

BUCKET = 16_000_000
"""Numbers that are sent at a time: a copy of so many is made."""


def count() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if _together() else 1


def rank() -> int:
    """This process's number, from 0, the main one."""
    return distributed.get_rank() if _together() else 0


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized() and not processes.is_alone()


@torch.no_grad()
def copy_main(tensors: Iterable[torch.Tensor]) -> None:
    """Puts the main process's numbers in their places in all: what each computed by itself may differ in its last digits."""
    if count() == 1:
        return
    for tensor in tensors:
        held = tensor.detach().clone(memory_format=torch.contiguous_format)
        distributed.broadcast(held, 0)
        tensor.copy_(held)


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


@runtime_checkable
class Ranged(Protocol):
    """A layer that remembers the ends of what it saw, each of shape ()."""

    minimum: torch.Tensor
    maximum: torch.Tensor


@torch.no_grad()
def share_seen(module: nn.Module) -> None:
    """Has layers that remember what they saw know what all processes saw: the widest range, the mean of running statistics.

    A range that is averaged over batches becomes the very one that a single process has, as all began from the same one:
    ``min_p(k a + (1 - k) b_p) = k a + (1 - k) min_p(b_p)``.
    """
    if count() == 1:
        return
    layers = list(module.modules())
    ranged = [layer for layer in layers if isinstance(layer, Ranged)]
    if ranged:
        ends = [*(layer.minimum for layer in ranged), *(layer.maximum for layer in ranged)]
        signs = torch.tensor([-1.0] * len(ranged) + [1.0] * len(ranged), device=ends[0].device)
        values = signs * torch.stack(ends)
        distributed.all_reduce(values, op=distributed.ReduceOp.MAX)
        for end, value in zip(ends, signs * values, strict=True):
            end.copy_(value)
    for layer in layers:
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training:
            for running in (layer.running_mean, layer.running_var):
                if running is not None:
                    distributed.all_reduce(running)
                    running.div_(count())


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
