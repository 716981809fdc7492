"""What a reader must not miss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Tone = Literal["good", "bad", "caution", "neutral"]


@dataclass(frozen=True)
class Alert:
    """One sentence for the first screen of a report."""

    tone: Tone
    text: str
