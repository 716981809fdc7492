"""Training batches in a seeded order, from pictures that are decoded once where they fit in memory.

Shapes: N examples, B pictures in a batch, C x H x W a prepared picture.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from mmcompress.data.examples import Examples
from mmcompress.errors import DataError
from mmcompress.processor import Processor
from mmcompress.tasks.base import Task

CACHE_BYTES = 1_000_000_000
"""Prepared pictures are kept when all of them fit in this."""


@dataclass
class Block:
    """Some rows, prepared.

    Attributes:
        rows: the rows that could be used, without their pictures.
        pixels: (len(rows), C, H, W), or None where no row could be used.
        damaged: for each row that could not be used, the index and what was wrong.
    """

    rows: list[dict[str, Any]]
    pixels: torch.Tensor | None
    damaged: dict[int, str]


class _Blocks(Dataset[Block]):
    """Prepares a list of indices at a time; runs in the worker processes where there are any."""

    def __init__(self, examples: Examples, processor: Processor, lists: list[list[int]]) -> None:
        self.examples, self.processor, self.lists = examples, processor, lists

    def __len__(self) -> int:
        return len(self.lists)

    def __getitem__(self, k: int) -> Block:
        # What is damaged is returned and not raised: an error that crosses processes arrives as a traceback in a text.
        rows, images, damaged = [], [], {}
        for i in self.lists[k]:
            try:
                row = self.examples[i]
            except DataError as e:
                damaged[i] = str(e)
                continue
            images.append(row.pop("image"))
            rows.append({**row, "index": i})
        if not rows:
            return Block([], None, damaged)
        try:
            return Block(rows, self.processor.pixels(images), damaged)
        except ValueError as e:
            if len(rows) == 1:
                where = f"{self.examples.name}, row {rows[0]['index']}"
                return Block([], None, damaged | {rows[0]["index"]: f"{where}: the image processor refuses it: {e}"})
        return self._one_by_one(rows, images, damaged)

    def _one_by_one(self, rows: list[dict[str, Any]], images: list[Any], damaged: dict[int, str]) -> Block:
        """Finds which picture of a block the image processor does not take, such as one that is a single pixel high."""
        kept, pixels = [], []
        for row, image in zip(rows, images, strict=True):
            try:
                pixels.append(self.processor.pixels([image]))
                kept.append(row)
            except ValueError as e:
                where = f"{self.examples.name}, row {row['index']}"
                damaged = damaged | {row["index"]: f"{where}: the image processor refuses it: {e}"}
        return Block(kept, torch.cat(pixels) if pixels else None, damaged)


class Feed:
    """Batches for a task.

    Attributes:
        batch_size: pictures in a batch: what was asked for, or all examples where they are fewer.
        steps_per_epoch: full batches in an epoch; examples that do not fill one wait for another epoch's order.
        damaged: for each example that was skipped, what was wrong.
        seconds: spent on preparing batches or waiting for them.
    """

    def __init__(
        self, examples: Examples, processor: Processor, task: Task, batch_size: int, seed: int, workers: int = 0
    ) -> None:
        self.examples, self.processor, self.task, self.workers = examples, processor, task, workers
        self.batch_size = min(batch_size, len(examples))
        self.steps_per_epoch = len(examples) // self.batch_size
        self.damaged: dict[int, str] = {}
        self.seconds = 0.0
        self._generator = torch.Generator().manual_seed(seed)
        self._rows: dict[int, dict[str, Any]] = {}
        self._pixels: torch.Tensor | None = None

    def batches(self, steps: int) -> Iterator[dict[str, torch.Tensor]]:
        """At most ``steps`` of the task's batches, each with ``index`` (B,), the examples that its pictures are.

        A batch of nothing but damaged pictures is left out.

        Raises:
            DataError: a picture does not decode and may not be skipped, or no batch has one that does.
        """
        step, some = 0, False
        while step < steps:
            lists = self._order()[: steps - step]
            for indices, block in zip(lists, self._blocks(lists), strict=True):
                began = time.perf_counter()
                rows = self._keep(indices, block)
                if rows:
                    some = True
                    batch = self.task.collate(rows, self.processor, self.examples, draw=step)
                    batch["index"] = torch.tensor([row["index"] for row in rows])
                    self.seconds += time.perf_counter() - began
                    yield batch
                step += 1
        if not some:
            raise DataError(f"{self.examples.name}: not one picture can be used: {next(iter(self.damaged.values()), '')}")

    def _order(self) -> list[list[int]]:
        """The next epoch's batches as indices."""
        order: list[int] = torch.randperm(len(self.examples), generator=self._generator).tolist()
        size = self.batch_size
        return [order[k * size : (k + 1) * size] for k in range(self.steps_per_epoch)]

    def _blocks(self, lists: list[list[int]]) -> Iterator[Block]:
        """For each batch of an epoch what of it is not known yet, prepared."""
        unknown = [[i for i in indices if i not in self._rows and i not in self.damaged] for indices in lists]
        source = _Blocks(self.examples, self.processor, unknown)
        ready: Iterator[Block] = (source[k] for k in range(len(source)))
        if self.workers and any(unknown):
            ready = iter(DataLoader(source, batch_size=None, num_workers=self.workers))
        for _ in lists:
            began = time.perf_counter()
            block = next(ready)
            self.seconds += time.perf_counter() - began
            yield block

    def _keep(self, indices: list[int], block: Block) -> list[dict[str, Any]]:
        """Rows of a batch with their ``pixel_values`` (C, H, W), the new ones put into the cache where all fit."""
        if block.damaged and not self.examples.skip_damaged:
            raise DataError(next(iter(block.damaged.values())))
        self.damaged |= block.damaged
        fresh: dict[int, torch.Tensor] = {}
        if block.pixels is not None:
            fresh = dict(zip((row["index"] for row in block.rows), block.pixels, strict=True))
            one = block.pixels[0]
            if self._pixels is None and len(self.examples) * one.nbytes <= CACHE_BYTES:
                self._pixels = torch.empty((len(self.examples), *one.shape), dtype=one.dtype)
        new = {row["index"]: row for row in block.rows}
        if self._pixels is not None:
            for i, pixels in fresh.items():
                self._pixels[i] = pixels
            self._rows |= new
        found = []
        for i in indices:
            if i in self.damaged:
                continue
            known = i in self._rows
            row = self._rows[i] if known else new[i]
            pixels = self._pixels[i] if known and self._pixels is not None else fresh[i]
            found.append({**row, "pixel_values": pixels})
        return found
