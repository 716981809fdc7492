"""Pictures and recordings as the model's input arrays, prepared once and kept while they fit.

Shapes: N examples of a block.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from mmcompress.data.examples import Examples
from mmcompress.data.traits import note
from mmcompress.errors import DataError
from mmcompress.processor import Processor

BLOCK = 64
KEEP_BYTES = 1_500_000_000
Block = tuple[np.ndarray, dict[str, np.ndarray]]

_kept: weakref.WeakKeyDictionary[Examples, tuple[str, list[Block]]] = weakref.WeakKeyDictionary()
"""By examples the key of the processor that prepared them last, and the blocks."""


class _Prepared:
    """Callable that remembers; see ``__call__``."""

    def total(self, examples: Examples) -> int:
        """How many blocks there are."""
        return -(-len(examples) // BLOCK)

    def __call__(self, examples: Examples, processor: Processor) -> Iterator[Block]:
        """Blocks of indices (N,) and the media's arrays by name, (N, ...) each, in the order of the examples.

        The same examples are scored once for every step and runtime, and decoding costs more than a small model: the blocks
        are kept for the next time when all of them fit into 1.5 GB, until a processor that prepares them otherwise asks. What
        does not decode is left out where the examples allow it.

        Raises:
            DataError: a picture or recording does not decode and may not be skipped, or none decodes.
        """
        key = processor.media_key(examples.kind)
        if examples in _kept and _kept[examples][0] == key:
            yield from _kept[examples][1]
            return
        blocks: list[Block] = []
        keep, good = True, 0
        for start in range(0, len(examples), BLOCK):
            block = self._block(examples, processor, range(start, min(start + BLOCK, len(examples))))
            good += len(block[0])
            own = sum(values.nbytes for values in block[1].values())
            keep = keep and (len(block[0]) == 0 or len(examples) * own <= KEEP_BYTES * len(block[0]))
            if keep:
                blocks.append(block)
            yield block
        if not good:
            raise DataError(f"{examples.name}: not one {WORDS[examples.kind]} decodes")
        if keep:
            _kept[examples] = key, blocks

    def _block(self, examples: Examples, processor: Processor, indices: range) -> Block:
        kept, items = [], []
        for i in indices:
            try:
                items.append(examples.media(i))
                kept.append(i)
                note(examples, i, items[-1])
            except DataError:
                if not examples.skip_damaged:
                    raise
        kept, inputs = self._tensors(examples, processor, kept, items)
        if not kept:
            return np.zeros(0, dtype=np.int64), {}
        stacked = processor.stack(inputs)
        return np.asarray(kept, dtype=np.int64), {name: values.numpy() for name, values in stacked.items()}

    def _tensors(
        self, examples: Examples, processor: Processor, kept: list[int], items: list[Any]
    ) -> tuple[list[int], list[dict[str, torch.Tensor]]]:
        """The media's tensors, and whose they are; what the model's processor refuses is left out where that is allowed.

        Raises:
            DataError: it refuses one that may not be skipped.
        """
        if not kept:
            return [], []
        try:
            return kept, processor.media(examples.kind, items)
        except ValueError as e:
            if len(kept) > 1:
                found = [self._tensors(examples, processor, [i], [item]) for i, item in zip(kept, items, strict=True)]
                return [i for own, _ in found for i in own], [one for _, inputs in found for one in inputs]
            if examples.skip_damaged:
                return [], []
            raise DataError(f"{examples.name}, row {kept[0]}: the {TOOLS[examples.kind]} refuses it: {e}") from e


def prepared_rows(examples: Examples, indices: np.ndarray, media: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The rows of a block, each with its prepared media as ``inputs``: what a task's ``collate`` takes."""
    return [
        {
            **examples.without_media(int(index)),
            "inputs": {name: torch.from_numpy(values[i]) for name, values in media.items()},
        }
        for i, index in enumerate(indices)
    ]


TOOLS = {"image": "image processor", "audio": "feature extractor"}
WORDS = {"image": "picture", "audio": "recording"}
"""What messages call the media."""

prepared = _Prepared()
