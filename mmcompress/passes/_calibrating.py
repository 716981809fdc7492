"""Calibration examples as the inputs of one component."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch

from mmcompress.context import Context
from mmcompress.data.prepare import prepared, prepared_rows
from mmcompress.errors import DataError
from mmcompress.model import CompressedModel
from mmcompress.quantization.calibration_data import CalibrationJudge
from mmcompress.runtimes.torch_predict import TorchPredict


def calibration_batches(
    model: CompressedModel, context: Context, component: str, samples: int
) -> Iterator[dict[str, np.ndarray]]:
    """Real examples in blocks, as one component's inputs; one block is in memory at a time."""
    task = context.need_task("quantize")
    task.fits(model.family.abilities, model.family.name)
    examples = context.need_calibration("quantize")
    if len(examples) > samples:
        chosen = torch.randperm(len(examples), generator=torch.Generator().manual_seed(context.seed))[:samples]
        examples = examples.take(sorted(chosen.tolist()))
    predict = TorchPredict(model)
    for draw, (indices, media) in enumerate(prepared(examples, model.processor)):
        if not len(indices):
            continue
        rows = prepared_rows(examples, indices, media)
        batch = {k: v.numpy() for k, v in task.collate(rows, model.processor, examples, draw).items()}
        for name, given in model.family.walk(predict, batch, model.module):
            if name == component:  # a decoder comes twice: what follows a short prompt is in the second
                yield given


def judged(
    batches: Callable[[], Iterator[Mapping[str, np.ndarray]]], component: str
) -> Callable[[], Iterator[Mapping[str, np.ndarray]]]:
    """The same batches; when they are read to their end for the first time, they are judged.

    Raises:
        DataError: from the iterator, at its end: nothing can be learned from them.
    """
    good = False

    def again() -> Iterator[Mapping[str, np.ndarray]]:
        nonlocal good
        if good:
            yield from batches()
            return
        judge = CalibrationJudge(component)
        yield from judge.watch(batches())
        problem = judge.problem()
        if problem:
            raise DataError(f"quantize: {problem}")
        good = True

    return again
