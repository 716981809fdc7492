"""The part of ``report.json`` on robustness: what damage to the inputs costs the compressed model, beside what it costs the
baseline.

A *drop* is how much worse a model is than the same model on clean examples, in the metric's own unit: positive is worse, for
metrics that count mistakes too. *Extra* is the compressed model's drop minus the baseline's: positive is what compression cost
in robustness, beside what it cost on clean examples. All intervals of 95% are of the same examples under all conditions, by
bootstrap over examples (or clusters of them).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Verdict = Literal["loses more", "loses less", "no clear difference"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="null")


class Estimate(_Model):
    """A number with its 95% interval."""

    value: float
    low: float = Field(description="Lower end of the 95% interval.")
    high: float = Field(description="Upper end of the 95% interval.")


class Degree(_Model):
    """One condition: a corruption at one severity, an attack at one distance, or something that has no degrees."""

    severity: float = Field(
        description="1 to 5; of an attack the distance in 255ths of a pixel's range; 0: there are no degrees."
    )
    strength: str = Field(
        "", description="The severity in numbers, such as a signal-to-noise ratio, where it is the same for all."
    )
    baseline: Estimate = Field(description="The baseline's metric.")
    final: Estimate = Field(description="The compressed model's.")
    baseline_drop: Estimate = Field(description="How much worse than on clean examples the baseline is.")
    final_drop: Estimate = Field(description="How much worse than on clean examples the compressed model is.")
    extra: Estimate = Field(description="The compressed model's drop minus the baseline's, paired.")


class Condition(_Model):
    """A corruption, attack or change of modality over all of its severities."""

    name: str
    group: Literal["media", "text", "modality", "attack"]
    description: str
    degrees: list[Degree] = Field(min_length=1)
    extra: Estimate = Field(description="The mean over severities of the compressed model's drop minus the baseline's.")
    p: float = Field(description="Two-sided, of no extra drop, from the same bootstrap.")
    p_adjusted: float = Field(description="The same, by Holm's method over all conditions of the group.")
    verdict: Verdict = Field(description="From the adjusted p-value, at 0.05.")
    error_ratio: float | None = Field(
        None, description="Corruption error (Hendrycks and Dietterich 2019): the sum of errors over the baseline's."
    )
    drop_ratio: float | None = Field(
        None, description="Relative corruption error: the sum of drops over the baseline's; only where those are clearly above 0."
    )


class Shift(_Model):
    """How well a model's confidence tells the task's own examples from those of another data set."""

    data: str = Field(description="The other data set.")
    score: Literal["softmax", "similarity"] = Field(
        description="softmax: the largest class probability (Hendrycks and Gimpel 2017). similarity: the largest cosine."
    )
    n_inside: int
    n_outside: int
    auroc: dict[Literal["baseline", "final", "difference"], Estimate] = Field(
        description="How often an example of the task's own is scored above one of the other data set; 0.5 is chance."
    )
    fpr95: dict[Literal["baseline", "final", "difference"], Estimate] = Field(
        description="The share of the other data set that passes at a threshold that 95% of the task's own examples pass; "
        "lower is better."
    )


class Robustness(_Model):
    """Baseline and compressed model under conditions that neither was meant for."""

    metric: str = Field("", description="The metric that all conditions are measured in; empty where only a shift was measured.")
    lower_is_better: bool = False
    n: int = Field(0, description="Examples that every condition was measured on, the same for all.")
    baseline: str = Field(description="Which row the baseline is, and its runtime.")
    final: str = Field(description="Which row the compressed model is, and its runtime.")
    clean: dict[Literal["baseline", "final"], Estimate] = Field(default_factory=dict, description="On the same examples, clean.")
    conditions: list[Condition] = Field(default_factory=list)
    mean_error_ratio: Estimate | None = Field(
        None,
        description="Mean corruption error over corruptions of pictures or recordings; below 1 the compressed model errs less.",
    )
    mean_drop_ratio: Estimate | None = Field(
        None,
        description="Relative mean corruption error: above 1 the compressed model loses more to corruption than the baseline.",
    )
    drop_ratio_over: int = Field(
        0, description="Over how many corruptions the relative one is taken: those that the baseline clearly loses to."
    )
    attack_n: int = Field(0, description="Examples that were attacked.")
    attack_clean: dict[Literal["baseline", "final"], Estimate] = Field(
        default_factory=dict, description="The share of the attacked examples that are right before the attack, in torch."
    )
    attacks: list[Condition] = Field(default_factory=list)
    shift: Shift | None = None
    notes: list[str] = Field(default_factory=list, description="What could not be measured, and why.")
