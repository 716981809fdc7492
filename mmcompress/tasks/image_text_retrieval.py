"""Image-text retrieval: recall at 1, 5 and 10, from pictures to texts and from texts to pictures."""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar, Literal

from pydantic import Field

from mmcompress.tasks._retrieval import Retrieval, recalls


class ImageTextRetrieval(Retrieval):
    """Needs pictures with one text each, or with a list of texts. Equal texts are one candidate."""

    metrics: ClassVar = recalls("image", "pictures", "picture")
    roles: ClassVar = MappingProxyType({"image": "a picture", "text": "a text or a list of texts"})
    needs: ClassVar = frozenset({"image", "embeddings"})

    type: Literal["image-text-retrieval"] = Field(description="The task's name.")


TASK = ImageTextRetrieval
