"""What of robustness is measured: the names of all corruptions, and the recipe's settings for them. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mmcompress.errors import one_of

Severity = Literal[1, 2, 3, 4, 5]
SEVERITIES: tuple[Severity, ...] = (1, 2, 3, 4, 5)

PICTURES: Mapping[str, str] = MappingProxyType(
    {
        "gaussian-noise": "normal noise on every pixel",
        "shot-noise": "Poisson noise, as of too little light",
        "gaussian-blur": "blur by a Gaussian",
        "defocus-blur": "blur by a disk, as of a lens out of focus",
        "motion-blur": "blur along a line at a random angle",
        "brightness": "the picture made brighter",
        "darkness": "the picture made darker by as much as `brightness` makes it brighter",
        "contrast": "contrast taken away",
        "jpeg": "JPEG compression",
        "pixelate": "the picture made small and large again",
        "rotation": "a turn to the left or to the right",
    }
)
SOUNDS: Mapping[str, str] = MappingProxyType(
    {
        "white-noise": "noise that is as strong at all frequencies, at a stated signal-to-noise ratio",
        "pink-noise": "noise that falls by 3 dB an octave, as of rooms and streets, at a stated signal-to-noise ratio",
        "reverberation": "the echo of a room with a stated reverberation time",
        "faster": "played faster, and so higher",
        "slower": "played slower, and so lower",
    }
)
TEXTS: Mapping[str, str] = MappingProxyType(
    {
        "typos": "letters dropped, swapped with the next, or hit beside the key, at a stated rate",
        "upper-case": "all in capitals",
        "lower-case": "no capitals",
    }
)
MODALITIES: Mapping[str, str] = MappingProxyType(
    {
        "missing-media": "a grey picture or silence instead of each picture or recording",
        "missing-text": "no words instead of each question",
        "shuffled-media": "every example has the picture or recording of another one",
        "shuffled-text": "every example has the question of another one",
    }
)
UNGRADED = frozenset({"upper-case", "lower-case", *MODALITIES})
"""What has no severities."""
BY_KIND = MappingProxyType({"image": PICTURES, "audio": SOUNDS})


class Adversarial(BaseModel):
    """Attacks on the pixels that the torch model sees, by its own gradients."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: int = Field(128, ge=8, description="Examples that are attacked, chosen by the recipe's seed (8 or more).")
    eps: list[Annotated[float, Field(gt=0, le=64)]] = Field(
        [1.0, 2.0, 4.0],
        min_length=1,
        description="How far each pixel may move, in steps of 1/255 of the range of a pixel (above 0, to 64).",
    )
    steps: int = Field(10, ge=1, le=100, description="Steps of the PGD attack (1 to 100).")


class Robustness(BaseModel):
    """Evaluations of the baseline and the final model on examples that are damaged in stated ways."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: int = Field(
        500, ge=2, description="Evaluation examples that are used, chosen by the recipe's seed; all where there are fewer."
    )
    corruptions: list[str] | None = Field(
        None,
        description="Of pictures "
        + ", ".join(PICTURES)
        + "; of recordings "
        + ", ".join(SOUNDS)
        + ". All of the data's kind where left out.",
    )
    severities: list[Severity] = Field(
        list(SEVERITIES), min_length=1, description="Severities of corruptions and typos, 1 (light) to 5 (strong)."
    )
    text: bool = Field(True, description="Typos and casing in the texts that the model reads beside pictures or recordings.")
    modality: bool = Field(
        True, description="Missing and shuffled pictures, recordings or questions: does the model look at both?"
    )
    adversarial: Adversarial | None = Field(
        default_factory=lambda: Adversarial.model_validate({}),
        description="FGSM and PGD attacks on dual encoders for pictures; null for none.",
    )

    @field_validator("corruptions")
    @classmethod
    def _known(cls, names: list[str] | None) -> list[str] | None:
        for name in names or ():
            if name not in PICTURES and name not in SOUNDS:
                raise ValueError(one_of("corruption", name, [*PICTURES, *SOUNDS]))
        return names

    @field_validator("adversarial", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {} if value is True else None if value is False else value

    @model_validator(mode="after")
    def _nothing_twice(self) -> Self:
        for where, values in (("corruptions", self.corruptions or []), ("severities", self.severities)):
            twice = next((v for v, count in Counter(values).items() if count > 1), None)
            if twice is not None:
                raise ValueError(f"{where}: {twice} stands twice")
        return self


def switch(value: Any) -> Any:
    """``robustness: true`` for the defaults, ``false`` for none."""
    return {} if value is True else None if value is False else value
