"""The part of ``report.json`` that says what changed underneath the quality numbers, and how calibrated a model is. Torch-free.

Everything is of one model in one runtime; "before" and "baseline" mean the baseline in torch on the same examples.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="null")


class Estimate(_Model):
    """A number with its 95% interval, where one could be taken."""

    value: float
    low: float | None = Field(None, description="Lower end of the 95% interval.")
    high: float | None = Field(None, description="Upper end of the 95% interval.")
    n: int = Field(description="How many examples, queries or items it is taken over.")


class Flips(_Model):
    """How many answers changed."""

    n: int = Field(description="How many answers were compared.")
    right_means: str = Field(description="What counts as right, in words.")
    right_to_wrong: int = Field(description="Right in the baseline, wrong now.")
    wrong_to_right: int = Field(description="Wrong in the baseline, right now.")
    wrong_to_other: int | None = Field(None, description="Wrong in both, but another answer; None where answers have no names.")
    share: Estimate = Field(description="The share of answers that changed; where answers have no names, in being right or not.")


class Answer(_Model):
    """What one model said of one example."""

    text: str
    confidence: float | None = Field(None, description="The probability of the answer, where the task has one.")
    right: bool


class GalleryEntry(_Model):
    """One example that the two models answer differently."""

    index: int = Field(description="The example's row in the evaluation data.")
    kind: Literal["right to wrong", "wrong to right", "other answer"]
    media: str | None = Field(None, description="Its picture or recording, relative to the run's folder, if that was kept.")
    text: str = Field("", description="What was asked, where the task asks.")
    truth: str = Field("", description="The right answer.")
    before: Answer
    after: Answer


class Slice(_Model):
    """Some of the examples, and what the model lost on them. Changes are this model minus baseline, in the metric's own unit."""

    by: str = Field(description='What the examples were grouped by: "class", "brightness", ..., or a column of the data.')
    name: str
    n: int
    before: float = Field(description="The baseline's metric on the slice.")
    after: float
    change: Estimate = Field(description="The paired difference, not adjusted for how many slices were looked at.")
    rest: float | None = Field(None, description="The difference on all other examples.")
    p_value: float | None = Field(None, description="One-sided, of having lost more than the rest by chance; None if not tested.")
    p_adjusted: float | None = Field(None, description="The same after Holm's adjustment for all slices that were tested.")
    small: bool = Field(False, description="Fewer than 20 examples: it says little, and was not tested.")
    worse_than_rest: bool = Field(False, description="The adjusted p-value is below 0.01.")


class Slices(_Model):
    """The slices on which the model lost most."""

    metric: str
    looked_at: int = Field(description="How many slices there are.")
    tested: int = Field(description="How many of them were large enough to be tested.")
    worst: list[Slice] = Field(description="The five worst, and all that lost clearly more than the rest; worst first.")


class ExchangedAnswers(_Model):
    """Two answers of which the model gives one where the baseline gave the other."""

    one: str
    two: str
    one_as_two: int = Field(description="Items that the baseline called one and this model calls two.")
    n_one: int = Field(description="Items that the baseline called one.")
    two_as_one: int
    n_two: int
    swapped: bool = Field(
        description="Both directions are most of their answers, with Wilson intervals above one quarter: the two look swapped."
    )


class Agreement(_Model):
    """How alike the two models answer, right or wrong."""

    kl: Estimate | None = Field(
        None, description="Kullback-Leibler divergence of its answers (in retrieval, of its texts) from the baseline's, in nats."
    )
    top1: Estimate | None = Field(None, description="The share of items with the same first answer.")
    top5: Estimate | None = Field(None, description="The mean share of the baseline's five first answers among its five.")
    ranked: dict[str, Estimate] = Field(
        default_factory=dict, description="For each direction of retrieval the mean share of the ten nearest that both have."
    )


class Drift(_Model):
    """How far a tower's embeddings moved from the baseline's."""

    cosine: Estimate | None = Field(None, description="Mean cosine of each item's two embeddings; None where widths differ.")
    cka: Estimate | None = Field(
        None,
        description="Linear CKA of the two sets of embeddings (1: the same but for turning and scaling); interval by jackknife. "
        "High by itself where items are fewer than the width.",
    )
    width: int = Field(description="Numbers in an embedding.")


class Alignment(_Model):
    """How the media's embeddings lie to the texts'."""

    matched: Estimate = Field(description="Mean cosine of media with what belongs to them.")
    unmatched: Estimate = Field(description="Mean cosine with what does not.")
    margin: Estimate = Field(description="Matched less unmatched.")
    gap: float | None = Field(None, description="Distance between the towers' mean unit embeddings (modality gap), 0 to 2.")


class AlignmentChange(_Model):
    """The paired change to the baseline."""

    before: Alignment
    margin: Estimate = Field(description="The margin less the baseline's.")


class ReliabilityBin(_Model):
    """One bar of a reliability diagram."""

    low: float
    high: float
    n: int
    confidence: float | None = Field(None, description="Mean confidence of the answers in it; None where there are none.")
    accuracy: float | None = None


class CalibrationNumbers(_Model):
    """How well confidence and accuracy fit, as the model is or after refitting one temperature."""

    over_confidence: Estimate = Field(description="Mean confidence less accuracy; above 0 it is too sure of itself.")
    ece: Estimate = Field(description="Expected calibration error, 15 bins of equal width. Biased upwards with few examples.")
    ece_adaptive: Estimate = Field(description="The same with 15 bins of equally many examples.")
    brier: Estimate = Field(description="Brier score over all classes, 0 to 2.")
    nll: Estimate = Field(description="Negative log-likelihood of the true class, in nats.")
    bins: list[ReliabilityBin] = Field(description="The reliability diagram: 15 bins of equal width.")


class Calibration(_Model):
    """Calibration of one model. The paired changes are to the baseline, as it is."""

    n: int
    classes: int
    accuracy: float
    confidence: float = Field(description="Mean probability of the chosen class.")
    as_it_is: CalibrationNumbers
    ece_if_calibrated: float = Field(
        description="The calibration error that a perfectly calibrated model would show on as many examples: the error's bias."
    )
    temperatures: list[float] = Field(
        default_factory=list, description="The temperatures that were fitted on the two halves of the examples."
    )
    refitted: CalibrationNumbers | None = Field(
        None, description="After dividing logits by one temperature, each half of the examples by that fitted on the other half."
    )
    changes: dict[str, Estimate] = Field(
        default_factory=dict, description="Paired differences to the baseline of over_confidence, ece, ece_adaptive, brier, nll."
    )


class Behaviour(_Model):
    """What changed underneath the quality numbers. Parts that a task cannot have are left out, and ``left_out`` says why."""

    flips: Flips | None = None
    gallery: list[GalleryEntry] = Field(default_factory=list)
    slices: Slices | None = None
    exchanged: list[ExchangedAnswers] = Field(default_factory=list)
    agreement: Agreement | None = None
    drift: dict[str, Drift] = Field(default_factory=dict, description="By tower, or by component for models that write.")
    alignment: Alignment | None = None
    alignment_change: AlignmentChange | None = None
    calibration: Calibration | None = None
    left_out: list[str] = Field(default_factory=list, description="What could not be said, and why.")
