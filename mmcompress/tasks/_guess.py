"""The task that data is meant for, for passes that are called from Python with nothing but data."""

from __future__ import annotations

from mmcompress.data.examples import Examples
from mmcompress.errors import DataError
from mmcompress.tasks.audio_text_retrieval import AudioTextRetrieval
from mmcompress.tasks.base import Task
from mmcompress.tasks.image_text_retrieval import ImageTextRetrieval
from mmcompress.tasks.zero_shot_audio_classification import ZeroShotAudioClassification
from mmcompress.tasks.zero_shot_image_classification import ZeroShotImageClassification


def guess_task(examples: Examples) -> Task:
    """Retrieval for pictures or recordings with texts, zero-shot classification for those with labels.

    Raises:
        DataError: the data has neither texts nor labels with class names.
    """
    image = examples.kind == "image"
    if "text" in examples.columns:
        retrieval = ImageTextRetrieval if image else AudioTextRetrieval
        return retrieval.model_validate({"type": f"{examples.kind}-text-retrieval"})
    if "label" in examples.columns and examples.classes:
        classification = ZeroShotImageClassification if image else ZeroShotAudioClassification
        return classification.model_validate({"type": f"zero-shot-{examples.kind}-classification"})
    have = ", ".join(examples.column_names())
    raise DataError(f"{examples.name}: no column of texts or of labels with class names; columns are: {have}")
