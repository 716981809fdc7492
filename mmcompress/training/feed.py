"""Training batches in a seeded order, from pictures and recordings that are decoded once where they fit in memory.

Shapes: N examples, B of them in a batch, K variants of an example.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmcompress.data.examples import Examples
from mmcompress.data.prepare import TOOLS, WORDS
from mmcompress.errors import DataError
from mmcompress.processor import Processor
from mmcompress.tasks.base import Task
from mmcompress.training.augment import augmented
from mmcompress.training.augment_settings import Augment

Key = tuple[int, int]
"""An example's index and which variant of it."""
CACHE_BYTES = 1_000_000_000
"""Prepared pictures or recordings are kept when all of them fit in this."""


@dataclass
class Block:
    """Some rows, prepared.

    Attributes:
        rows: the rows that could be used, without their pictures or recordings.
        inputs: for each of them its tensors, without batch axis.
        damaged: for each row that could not be used, the index and what was wrong.
    """

    rows: list[dict[str, Any]]
    inputs: list[dict[str, torch.Tensor]]
    damaged: dict[int, str]


class _Blocks(Dataset[Block]):
    """Prepares a list of examples, each in one variant, at a time; runs in the worker processes where there are any."""

    def __init__(self, examples: Examples, processor: Processor, lists: list[list[Key]], augment: Augment | None) -> None:
        self.examples, self.processor, self.lists, self.augment = examples, processor, lists, augment

    def __len__(self) -> int:
        return len(self.lists)

    def __getitem__(self, k: int) -> Block:
        # What is damaged is returned and not raised: an error that crosses processes arrives as a traceback in a text.
        kind = self.examples.kind
        rows, items, damaged = [], [], {}
        for i, variant in self.lists[k]:
            try:
                row = self.examples[i]
            except DataError as e:
                damaged[i] = str(e)
                continue
            item = row.pop(kind)
            items.append(item if self.augment is None else augmented(item, self.augment, variant))
            rows.append({**row, "index": i, "variant": variant})
        if not rows:
            return Block([], [], damaged)
        try:
            return Block(rows, self.processor.media(kind, items), damaged)
        except ValueError:
            return self._one_by_one(kind, rows, items, damaged)

    def _one_by_one(self, kind: str, rows: list[dict[str, Any]], items: list[Any], damaged: dict[int, str]) -> Block:
        """Finds which picture of a block the image processor does not take, such as one that is a single pixel high."""
        kept, inputs = [], []
        for row, item in zip(rows, items, strict=True):
            try:
                inputs += self.processor.media(kind, [item])
                kept.append(row)
            except ValueError as e:
                where = f"{self.examples.name}, row {row['index']}"
                damaged = damaged | {row["index"]: f"{where}: the {TOOLS[kind]} refuses it: {e}"}
        return Block(kept, inputs, damaged)


class Feed:
    """Batches for a task.

    Attributes:
        batch_size: examples in a batch: what was asked for, or all examples where they are fewer.
        steps_per_epoch: full batches in an epoch; examples that do not fill one wait for another epoch's order.
        damaged: for each example that was skipped, what was wrong.
        seconds: spent on preparing batches or waiting for them.
        reached: the step after that of the last batch, from where another feed would go on.
    """

    def __init__(
        self,
        examples: Examples,
        processor: Processor,
        task: Task,
        batch_size: int,
        seed: int,
        workers: int = 0,
        only: Sequence[int] | None = None,
        augment: Augment | None = None,
    ) -> None:
        """Takes the examples, or ``only`` those with these indices."""
        self.examples, self.processor, self.task, self.workers = examples, processor, task, workers
        self.only = only if only is not None else range(len(examples))
        self.batch_size = min(batch_size, len(self.only))
        self.steps_per_epoch = len(self.only) // self.batch_size
        self.damaged: dict[int, str] = {}
        self.seconds = 0.0
        self.reached = 0
        self.augment = augment
        self._seed = seed
        self._rows: dict[int, dict[str, Any]] = {}
        self._inputs: dict[Key, dict[str, torch.Tensor]] = {}
        self._bytes = 0

    def batches(self, steps: int, start: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        """The task's batches from step ``start`` to before ``steps``, each with ``index`` (B,), the examples that it is made of,
        and ``variant`` (B,), which of each example's K it is; all 0 without augmentation.

        What a step is given depends on the seed and the step's number alone, not on the steps before it. A batch of nothing but
        damaged examples is left out.

        Raises:
            DataError: a picture or recording does not decode and may not be skipped, or no batch has one that does.
        """
        step, some = start, start >= steps
        while step < steps:
            epoch, place = divmod(step, self.steps_per_epoch)
            lists = self._keys(epoch)[place : place + steps - step]
            for keys, block in zip(lists, self._blocks(lists), strict=True):
                began = time.perf_counter()
                rows = self._keep(keys, block)
                if rows:
                    some = True
                    batch = self.task.collate(rows, self.processor, self.examples, draw=step)
                    batch["index"] = torch.tensor([row["index"] for row in rows])
                    batch["variant"] = torch.tensor([row["variant"] for row in rows])
                    self.seconds += time.perf_counter() - began
                    self.reached = step + 1
                    yield batch
                step += 1
        if not some:
            what = WORDS[self.examples.kind]
            raise DataError(f"{self.examples.name}: not one {what} can be used: {next(iter(self.damaged.values()), '')}")

    def order(self, epoch: int) -> list[list[int]]:
        """An epoch's batches as indices: a function of the seed and the epoch, whatever was drawn before."""
        places = np.random.default_rng([self._seed, epoch]).permutation(len(self.only)).tolist()
        order = [self.only[i] for i in places]
        size = self.batch_size
        return [order[k * size : (k + 1) * size] for k in range(self.steps_per_epoch)]

    def _keys(self, epoch: int) -> list[list[Key]]:
        """An epoch's batches as examples, each with the variant that is drawn for it in this epoch."""
        if self.augment is None:
            return [[(i, 0) for i in indices] for indices in self.order(epoch)]
        draw = np.random.default_rng([self._seed, epoch, 1]).integers(self.augment.variants, size=len(self.examples)).tolist()
        return [[(i, draw[i]) for i in indices] for indices in self.order(epoch)]

    def _blocks(self, lists: list[list[Key]]) -> Iterator[Block]:
        """For each batch of an epoch what of it is not known yet, prepared."""
        unknown = [[key for key in keys if key not in self._inputs and key[0] not in self.damaged] for keys in lists]
        source = _Blocks(self.examples, self.processor, unknown, self.augment)
        ready: Iterator[Block] = (source[k] for k in range(len(source)))
        if self.workers and any(unknown):
            ready = iter(DataLoader(source, batch_size=None, num_workers=self.workers))
        for _ in lists:
            began = time.perf_counter()
            block = next(ready)
            self.seconds += time.perf_counter() - began
            yield block

    def _keep(self, keys: list[Key], block: Block) -> list[dict[str, Any]]:
        """Rows of a batch with their prepared ``inputs``, the new ones put into the cache where all are likely to fit."""
        if block.damaged and not self.examples.skip_damaged:
            raise DataError(next(iter(block.damaged.values())))
        self.damaged |= block.damaged
        rows = {row["index"]: row for row in block.rows}
        inputs = {(row["index"], row["variant"]): one for row, one in zip(block.rows, block.inputs, strict=True)}
        size = sum(values.nbytes for one in block.inputs for values in one.values())
        total = len(self.examples) * (self.augment.variants if self.augment is not None else 1)
        if block.rows and total * size <= CACHE_BYTES * len(block.rows) and self._bytes + size <= CACHE_BYTES:
            # Clones: what a processor gives are views of a whole block's tensor.
            self._inputs |= {key: {name: values.clone() for name, values in one.items()} for key, one in inputs.items()}
            self._rows |= rows
            self._bytes += size
        return [
            {**(rows.get(i) or self._rows[i]), "variant": variant, "inputs": inputs.get((i, variant)) or self._inputs[i, variant]}
            for i, variant in keys
            if i not in self.damaged
        ]
