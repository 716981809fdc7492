"""Zero-shot image classification: top-1 and top-5 accuracy.

The class whose prompts are nearest to the picture is the answer (Radford et al. 2021, section 3.1.4).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar, Literal

from pydantic import Field

from mmcompress.tasks._zero_shot import TEMPLATES, ZeroShotClassification


class ZeroShotImageClassification(ZeroShotClassification):
    """Needs pictures with labels; the class names are read as text."""

    metrics: ClassVar = MappingProxyType(
        {
            "accuracy": "top-1 accuracy: the share of pictures whose nearest class is the right one",
            "accuracy_top5": "top-5 accuracy: the share of pictures whose right class is among the five nearest",
        }
    )
    roles: ClassVar = MappingProxyType({"image": "a picture", "label": "a class number or name"})
    needs: ClassVar = frozenset({"image", "embeddings"})

    type: Literal["zero-shot-image-classification"] = Field(description="The task's name.")
    templates: list[str] = Field(["a photo of a {}."], min_length=1, description=TEMPLATES)


TASK = ZeroShotImageClassification
