"""Audio-text retrieval: recall at 1, 5 and 10, from recordings to texts and from texts to recordings."""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar, Literal

from pydantic import Field

from mmcompress.tasks._retrieval import Retrieval, recalls


class AudioTextRetrieval(Retrieval):
    """Needs recordings with one text each, or with a list of texts. Equal texts are one candidate."""

    metrics: ClassVar = recalls("audio", "recordings", "recording")
    roles: ClassVar = MappingProxyType({"audio": "a recording", "text": "a text or a list of texts"})
    needs: ClassVar = frozenset({"audio", "embeddings"})

    type: Literal["audio-text-retrieval"] = Field(description="The task's name.")


TASK = AudioTextRetrieval
