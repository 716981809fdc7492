"""Zero-shot audio classification: top-1 and top-5 accuracy.

The class whose prompts are nearest to the recording is the answer (Radford et al. 2021, section 3.1.4).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar, Literal

from pydantic import Field

from mmcompress.tasks._zero_shot import TEMPLATES, ZeroShotClassification


class ZeroShotAudioClassification(ZeroShotClassification):
    """Needs recordings with labels; the class names are read as text."""

    metrics: ClassVar = MappingProxyType(
        {
            "accuracy": "top-1 accuracy: the share of recordings whose nearest class is the right one",
            "accuracy_top5": "top-5 accuracy: the share of recordings whose right class is among the five nearest",
        }
    )
    roles: ClassVar = MappingProxyType({"audio": "a recording", "label": "a class number or name"})
    needs: ClassVar = frozenset({"audio", "embeddings"})

    type: Literal["zero-shot-audio-classification"] = Field(description="The task's name.")
    templates: list[str] = Field(["This is a sound of {}."], min_length=1, description=TEMPLATES)


TASK = ZeroShotAudioClassification
