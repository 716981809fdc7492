"""Pictures as the model's input arrays, prepared once and kept while they fit.

Shapes: N pictures of a block, C x H x W of one.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import numpy as np

from mmcompress.data.examples import Examples
from mmcompress.errors import DataError
from mmcompress.processor import Processor

BLOCK = 64
KEEP_BYTES = 1_500_000_000

_kept: weakref.WeakKeyDictionary[Examples, list[tuple[np.ndarray, np.ndarray]]] = weakref.WeakKeyDictionary()


class _Prepared:
    """Callable that remembers; see ``__call__``."""

    def total(self, examples: Examples) -> int:
        """How many blocks there are."""
        return -(-len(examples) // BLOCK)

    def __call__(self, examples: Examples, processor: Processor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Blocks of ``(indices (N,), pixel_values (N, C, H, W))`` in the order of the examples.

        The same examples are scored once for every step and runtime, and decoding costs more than a small model: the blocks
        are kept for the next time when all of them fit into 1.5 GB. Pictures that do not decode are left out where the
        examples allow it.

        Raises:
            DataError: a picture does not decode and may not be skipped, or none decodes.
        """
        if examples in _kept:
            yield from _kept[examples]
            return
        blocks: list[tuple[np.ndarray, np.ndarray]] = []
        keep, good = True, 0
        for start in range(0, len(examples), BLOCK):
            block = self._block(examples, processor, range(start, min(start + BLOCK, len(examples))))
            good += len(block[0])
            keep = keep and (len(block[0]) == 0 or len(examples) * block[1][0].nbytes <= KEEP_BYTES)
            if keep:
                blocks.append(block)
            yield block
        if not good:
            raise DataError(f"{examples.name}: not one picture decodes")
        if keep:
            _kept[examples] = blocks

    def _block(self, examples: Examples, processor: Processor, indices: range) -> tuple[np.ndarray, np.ndarray]:
        kept, images = [], []
        for i in indices:
            try:
                images.append(examples.image(i))
                kept.append(i)
            except DataError:
                if not examples.skip_damaged:
                    raise
        if not kept:
            return np.zeros(0, dtype=np.int64), np.zeros((0,), dtype=np.float32)
        return np.asarray(kept, dtype=np.int64), processor.pixels(images).numpy().astype(np.float32)


prepared = _Prepared()
