"""The task that data is meant for, for passes that are called from Python with nothing but data."""

from __future__ import annotations

from mmcompress.data.examples import Examples
from mmcompress.errors import DataError
from mmcompress.tasks.base import Task
from mmcompress.tasks.image_text_retrieval import ImageTextRetrieval
from mmcompress.tasks.zero_shot_image_classification import ZeroShotImageClassification


def guess_task(examples: Examples) -> Task:
    """Retrieval for pictures with texts, zero-shot classification for pictures with labels.

    Raises:
        DataError: the data has neither texts nor labels with class names.
    """
    if "text" in examples.columns:
        return ImageTextRetrieval.model_validate({"type": "image-text-retrieval"})
    if "label" in examples.columns and examples.classes:
        return ZeroShotImageClassification.model_validate({"type": "zero-shot-image-classification"})
    have = ", ".join(examples.column_names())
    raise DataError(f"{examples.name}: no column of texts or of labels with class names; columns are: {have}")
