"""What `quantize` does to keep quality: the recipe's fields, and the changes of a float graph before it is quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mmcompress.quantization.schemes import Calibration

if TYPE_CHECKING:
    import numpy as np

    from mmcompress.quantization.ranges import Ranges

Feeds = Callable[[], "Iterable[Mapping[str, np.ndarray]]"]

CalibrationField = Annotated[
    Calibration,
    Field(
        description="How int8-static takes the range of an activation from its values on calibration examples. min-max: all of "
        "them. percentile: `percentile` of them. entropy: the range that loses least information (TensorRT's). mse: the one with "
        "the least mean squared error. All but min-max clip what is rare and large; none needs more memory for more samples."
    ),
]
PercentileField = Annotated[
    float,
    Field(gt=50, le=100, description="The values that a range holds under `calibration: percentile`, in percent (50 to 100)."),
]


def _off(value: object) -> object:
    return "off" if value is False else value  # what YAML makes of off


SmoothField = Annotated[
    Literal["off", "auto"] | Annotated[float, Field(ge=0, le=1)],
    BeforeValidator(_off),
    Field(
        description="SmoothQuant for int8-static: large channels behind a LayerNorm are made smaller, and the weights that read "
        "them larger. A number: the exponent alpha (0 to 1; 1 takes all of a channel's size away). auto: for each LayerNorm the "
        "exponent with the least error of the layers' outputs on calibration examples, or none. off: nothing."
    ),
]
BiasField = Annotated[
    bool,
    Field(
        description="Whether biases make up for what int8-static changes in the mean output of each layer on calibration "
        "examples."
    ),
]
MaxDropField = Annotated[
    float | None,
    Field(
        ge=0,
        le=100,
        description="How much the task's first metric may fall (or rise, for error rates) by int8-static, in points (0 to 100), "
        "on training examples: layers stay in float, the most sensitive first, until it does not fall further. Test data is "
        "never read. Left out: all layers are quantized.",
    ),
]

Sensitivity = Literal["embedding", "metric"]
SensitivityField = Annotated[
    Sensitivity,
    Field(
        description="How `max_drop` judges a layer by what it does when it alone is int8. embedding: how far the component's "
        "output moves, on a few calibration examples. metric: what the task's first metric loses, on `max_drop`'s training "
        "examples, and among equals the embedding; takes an evaluation for each layer."
    ),
]


@dataclass
class Work:
    """One component on its way to int8.

    Attributes:
        source: its float file.
        ready: the float file that integers are made from: the same, or one that was made easier to quantize.
        feeds: gives its calibration batches.
        exclude: patterns of layers that stay float, beside the recipe's own.
        done: what was done, for the report.
    """

    source: Path
    ready: Path
    feeds: Feeds
    exclude: list[str] = field(default_factory=list)
    done: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Keeping:
    """The settings, as far as they are about quality.

    Attributes:
        narrow: whether weights take 7 bits.
    """

    calibration: Calibration
    percentile: float
    smooth: Literal["off", "auto"] | float
    bias_correction: bool
    include: Sequence[str]
    exclude: Sequence[str]
    narrow: bool

    def ranges(self, source: Path, feeds: Iterable[Mapping[str, np.ndarray]]) -> Ranges:
        """Of the activations of a float file."""
        from mmcompress.quantization.ranges import collect_ranges

        return collect_ranges(source, feeds, self.calibration, self.percentile)

    def improve(self, work: Work, folder: Path) -> None:
        """Makes the float file easier to quantize, as far as the recipe asks for it, in a folder of its own."""
        from mmcompress.quantization.bias_correction import correct_biases
        from mmcompress.quantization.smoothing import smooth

        target = folder / work.source.name
        if self.smooth != "off":
            folder.mkdir(parents=True, exist_ok=True)
            groups = smooth(
                work.ready, target, work.feeds(), self.smooth, narrow=self.narrow, include=self.include, exclude=self.exclude
            )
            work.ready, work.done["smooth"] = target, [one.as_data() for one in groups]
        if self.bias_correction:
            folder.mkdir(parents=True, exist_ok=True)
            layers = correct_biases(
                work.ready,
                target,
                work.feeds,
                calibration=self.calibration,
                percentile=self.percentile,
                narrow=self.narrow,
                include=self.include,
                exclude=self.exclude,
            )
            work.ready, work.done["bias_correction"] = target, [one.as_data() for one in layers]
