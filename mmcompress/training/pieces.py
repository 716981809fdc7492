"""A batch in pieces, and the loss of the whole: micro batches of one process, shares of several, with the same gradients.

Models that embed are compared across the whole batch, so that the loss of pieces is not a piece of the loss. GradCache (Gao et
al. 2021, arXiv 2101.06983, section 3.2) splits the chain rule at the embeddings E instead:

1. every piece is embedded without keeping what the backward pass needs;
2. the loss L of all embeddings gives ``g = dL/dE``, and the gradients of what comes after them (the losses' own parameters);
3. every piece is embedded once more, with the same random numbers, and ``g_piece^T dE_piece/dw`` is added to the gradient of the
   weights w. The sum over the pieces is ``dL/dw``.

Several processes do 1 and 3 on rows of their own and 2 each on all rows, which are gathered. Then ``dL/dw`` is the *sum* over the
processes of what 3 leaves, and what every process computes alike (step 2's parameters, the logit scale, rows that all of them
take because they are fewer than the processes) is divided by their number before it.

Models that answer have a loss that is a mean over what is answered: label tokens, or examples. Pieces are weighed by how many
of these they hold, so that no example is run twice.

Shapes: B examples, U distinct texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mmcompress.families.base import BESIDE_INPUTS, Batch
from mmcompress.training import parallel
from mmcompress.training.forward import Forward, Path, apart, of_texts, together
from mmcompress.training.objective import Objective

IGNORED = -100


@dataclass(frozen=True)
class Share:
    """The rows that this process takes of a batch.

    Attributes:
        rows: their numbers.
        size: of all.
        alike: how many processes take these same rows.
    """

    rows: range
    size: int
    alike: int

    @classmethod
    def of(cls, size: int) -> Share:
        """This process's share of so many rows: a block of them, or all where they are fewer than the processes."""
        rank, count = parallel.rank(), parallel.count()
        if size < count:
            return cls(range(size), size, count)
        return cls(range(rank * size // count, (rank + 1) * size // count), size, 1)

    def pieces(self, most: int | None) -> list[slice]:
        """The rows in blocks of at most ``most``."""
        step = most or max(1, len(self.rows))
        return [slice(i, min(i + step, self.rows.stop)) for i in range(self.rows.start, self.rows.stop, step)]


class Pieces:
    """The loss of a batch, piece by piece."""

    def __init__(self, forward: Forward, objective: Objective, micro_batch: int | None) -> None:
        self.forward, self.objective, self.micro_batch = forward, objective, micro_batch
        self._media = {name for names in forward.family.media.values() for name in names}

    def __call__(self, batch: Batch, seed: int, *, backward: bool) -> dict[str, torch.Tensor]:
        """The parts of the loss of a whole batch, each of shape () and without gradient, the same in every process.

        Args:
            batch: on the CPU.
            seed: what dropout draws from in this batch; each process has its own.
            backward: whether to add the loss's gradients to the parameters. With several processes they are parts of a sum.
        """
        torch.manual_seed(seed)
        with torch.set_grad_enabled(backward):
            if self.micro_batch is None and parallel.count() == 1:
                parts = self._at_once(self._moved(batch), backward)
            else:
                parts = self._answering(batch, backward) if "labels" in batch else self._embedding(batch, seed, backward)
        return {name: part.detach() for name, part in parts.items()}

    def _moved(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {name: values.to(self.forward.device, non_blocking=True) for name, values in batch.items()}

    def _at_once(self, batch: Batch, backward: bool) -> dict[str, torch.Tensor]:
        parts: dict[str, torch.Tensor] = self.objective(self.forward(batch), batch)
        if backward:
            _sum(parts).backward()
        return parts

    # Models that embed.

    def _embedding(self, batch: Batch, seed: int, backward: bool) -> dict[str, torch.Tensor]:
        batch = self._moved(batch)
        inputs = self._cut(batch)
        if len(inputs) == 1 and parallel.count() == 1:
            return self._at_once(batch, backward)
        kept = apart(self.forward(inputs[0])) if len(inputs) == 1 else {}
        buffers = [b.clone() for b in self.forward.module.buffers()] if not kept else []
        found = [{path: v.detach() for path, v in kept.items()}] if kept else self._without_gradient(inputs)
        shares = {True: Share.of(len(batch["input_ids"])), False: Share.of(len(batch["index"]))}
        whole = self._whole(found, shares)
        leaves = {path: v.requires_grad_(backward and v.is_floating_point()) for path, v in whole.items()}
        parts: dict[str, torch.Tensor] = self.objective(together(leaves), batch)
        if not backward:
            return parts
        _sum(parts).backward()
        for parameter in self.objective.parameters():
            if parameter.grad is not None:
                parameter.grad /= parallel.count()
        if kept:
            self._backward(kept, leaves, shares, {}, scalars=True)
            return parts
        # From where the first pass began: dropout, and layers that remember what they saw, do the same again.
        for buffer, before in zip(self.forward.module.buffers(), buffers, strict=True):
            buffer.copy_(before)
        torch.manual_seed(seed)
        done: dict[Path, int] = {}
        for i, piece in enumerate(inputs):
            self._backward(apart(self.forward(piece)), leaves, shares, done, scalars=i == 0)
        return parts

    def _cut(self, batch: Batch) -> list[dict[str, torch.Tensor]]:
        """The inputs of this process's forward passes: blocks of media, each with a block of texts while there are any."""
        texts = Share.of(len(batch["input_ids"])).pieces(self.micro_batch)
        media = Share.of(len(batch["index"])).pieces(self.micro_batch)
        found: list[dict[str, torch.Tensor]] = [{} for _ in range(max(len(texts), len(media)))]
        for name, values in batch.items():
            if name not in BESIDE_INPUTS:
                for piece, rows in zip(found, media if name in self._media else texts, strict=False):
                    piece[name] = values[rows]
        return found

    def _without_gradient(self, inputs: list[dict[str, torch.Tensor]]) -> list[dict[Path, torch.Tensor]]:
        with torch.no_grad():
            # Detached: a scale or bias may be the parameter itself.
            return [{path: v.detach() for path, v in apart(self.forward(piece)).items()} for piece in inputs]

    def _whole(self, found: list[dict[Path, torch.Tensor]], shares: Mapping[bool, Share]) -> dict[Path, torch.Tensor]:
        """The outputs of all pieces of all processes, in the order of the batch."""
        whole = {}
        for path in dict.fromkeys(path for piece in found for path in piece):
            values = [piece[path] for piece in found if path in piece]
            if values[0].dim() == 0:
                whole[path] = values[0].clone()
                continue
            share = shares[of_texts(path)]
            rows = torch.cat(values)
            whole[path] = rows if share.alike > 1 else parallel.gather(rows, share.size)
        return whole

    def _backward(
        self,
        outputs: dict[Path, torch.Tensor],
        leaves: Mapping[Path, torch.Tensor],
        shares: Mapping[bool, Share],
        done: dict[Path, int],
        *,
        scalars: bool,
    ) -> None:
        """Sends a piece's rows of the gradient through it; ``done`` counts the rows of earlier pieces."""
        tensors, gradients = [], []
        for path, value in outputs.items():
            whole = leaves[path].grad
            if not value.requires_grad or whole is None:
                continue
            if value.dim() == 0:
                if scalars:
                    tensors.append(value)
                    gradients.append(whole / parallel.count())
                continue
            share = shares[of_texts(path)]
            start = share.rows.start + done.get(path, 0)
            done[path] = done.get(path, 0) + len(value)
            tensors.append(value)
            gradients.append(whole[start : start + len(value)] / share.alike)
        if tensors:
            torch.autograd.backward(tensors, gradients)

    # Models that answer.

    def _answering(self, batch: Batch, backward: bool) -> dict[str, torch.Tensor]:
        share = Share.of(len(batch["index"]))
        whole = counted(batch)
        total: dict[str, torch.Tensor] = {}
        for rows in share.pieces(self.micro_batch):
            piece = {name: values[rows] for name, values in batch.items()}
            weight = counted(piece) / whole if whole else len(piece["index"]) / share.size
            piece = self._moved(piece)
            with torch.set_grad_enabled(backward and weight > 0):
                found = self.objective(self.forward(piece), piece)
            # A mean over nothing may be no number, and counts for nothing.
            parts = {n: part * (weight / share.alike) if weight else torch.zeros_like(part) for n, part in found.items()}
            if backward and weight:
                _sum(parts).backward()
            total = {name: part.detach() + total[name] if name in total else part.detach() for name, part in parts.items()}
        return parallel.add(total)


def counted(batch: Batch) -> int:
    """How many answers a batch's loss is the mean of: label tokens or classes that are not ignored, or rows of soft targets."""
    labels = batch["labels"]
    return len(labels) if labels.is_floating_point() else int((labels != IGNORED).sum())


def _sum(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(parts.values())).sum()
