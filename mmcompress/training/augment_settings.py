"""The recipe's ``augment``: how an example is changed before it is trained on. Importable without torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

OF_IMAGES = ("crop", "flip", "brightness", "contrast", "saturation")
OF_SOUNDS = ("gain_db", "shift_seconds", "noise_snr_db")


class Augment(BaseModel):
    """Changed variants of each example, as in dataset reinforcement (MobileCLIP, Vasu et al. 2023, arXiv 2311.17049).

    Each example has a fixed number of variants, so that a teacher is asked for each of them once and never again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    variants: int = Field(
        8, ge=1, le=1000, description="Changed variants of each example, 1 to 1000; every epoch draws one of them for each."
    )
    seed: int = Field(
        0, ge=0, lt=2**31, description="Seed of the changes. It is not the run's, so that other runs find the teacher's answers."
    )
    crop: float | None = Field(
        None,
        ge=0.05,
        le=1,
        description="Pictures: a random part of this share of the area or more, 0.05 to 1, brought to the picture's size.",
    )
    flip: bool = Field(False, description="Pictures: every second one is mirrored, left to right; wrong where they show writing.")
    brightness: float = Field(0.0, ge=0, le=0.9, description="Pictures: times a factor from 1 - this to 1 + this, 0 to 0.9.")
    contrast: float = Field(0.0, ge=0, le=0.9, description="Pictures: the distance to mean grey, in the same way, 0 to 0.9.")
    saturation: float = Field(0.0, ge=0, le=0.9, description="Pictures: the distance to grey, in the same way, 0 to 0.9.")
    gain_db: float = Field(0.0, ge=0, le=40, description="Recordings: louder or softer by up to this many decibels, 0 to 40.")
    shift_seconds: float = Field(
        0.0, ge=0, le=30, description="Recordings: earlier or later by up to this, 0 to 30; silence fills the gap."
    )
    noise_snr_db: float | None = Field(
        None, ge=0, le=100, description="Recordings: white noise this many decibels below the recording, 0 to 100."
    )

    @model_validator(mode="after")
    def _changes_something(self) -> Augment:
        if not self.changes("image") and not self.changes("audio"):
            raise ValueError(f"nothing is changed; set one of {', '.join((*OF_IMAGES, *OF_SOUNDS))}")
        return self

    def changes(self, kind: str) -> bool:
        """Whether media of a kind, ``image`` or ``audio``, come out changed."""
        # None and False and a spread of 0 change nothing; a signal-to-noise ratio of 0 does.
        if kind == "audio" and self.noise_snr_db is not None:
            return True
        return any(getattr(self, name) for name in (OF_IMAGES if kind == "image" else OF_SOUNDS))
