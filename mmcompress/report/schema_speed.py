"""What a report says of speed, energy and cost: part of the data model in ``schema.py``. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="null")


class Latency(_Model):
    """Time of one call, in milliseconds, over the repetitions of one process.

    A percentile q is shown where so many calls were timed that the share of slower ones is known to within half of itself with
    95% confidence, n >= 1.96^2 q / ((1 - q) / 4): 139 calls for p90, 1,522 for p99. It is the formula of MLPerf Inference (Reddi
    et al. 2020), n = z^2 q (1 - q) / margin^2, which asks for a twentieth where this asks for a half.
    """

    p50: float = Field(description="Median, ms.")
    p90: float | None = Field(description="90th percentile, ms; null with fewer than 139 calls.")
    p99: float | None = Field(description="99th percentile, ms; null with fewer than 1,522 calls.")
    low: float = Field(description="Lower end of the 95% interval of the median (order statistics), ms.")
    high: float = Field(description="Upper end of the 95% interval of the median, ms.")
    n: int = Field(description="How many calls were timed.")
    mean: float | None = Field(None, description="Mean, ms: what many calls one after the other cost.")


class Ratio(_Model):
    """How many times as long one model took as another, from rounds in which both took turns."""

    ratio: float
    low: float = Field(description="Lower end of the 95% interval over the rounds (Wilcoxon signed-rank).")
    high: float = Field(description="Upper end of the 95% interval over the rounds.")
    rounds: int = Field(description="How many rounds it is taken over.")

    @property
    def band(self) -> tuple[float, float]:
        """Of a model against itself: what no ratio can be told apart from, the interval's far end on both sides of 1."""
        far = max(self.high, 1 / self.low, 1.0)
        return 1 / far, far


class Offline(_Model):
    """All examples at hand at once: MLPerf's offline scenario."""

    batch_size: int = Field(description="Of those that were tried the one with the most examples a second.")
    examples_per_second: float = Field(description="Examples over the time of all calls.")
    tried: dict[str, float] = Field(description="Examples a second, by batch size.")


class EndToEnd(_Model):
    """One query from a file's bytes and a text to the model's outputs, one after another."""

    total_ms: Latency = Field(description="Decoding, preparing and all components once.")
    preprocess_ms: Latency = Field(description="Decoding and preparing alone.")
    examples: int = Field(description="Evaluation examples that it goes round in.")


class Cost(_Model):
    """What a million examples cost, from the recipe's price of an hour of this machine."""

    single_stream: float | None = Field(None, description="One after another, at the mean time of batch size 1.")
    offline: float | None = Field(None, description="At the offline throughput.")


class Served(_Model):
    """More of a model that was timed side by side with the baseline."""

    ratio: dict[str, Ratio] = Field(
        default_factory=dict, description="By batch size: the time of the baseline in torch over that of this model."
    )
    offline: Offline | None = None
    end_to_end: EndToEnd | None = None
    joules: dict[str, float] = Field(
        default_factory=dict, description="Joules of the processor's packages for one example, by batch size."
    )
    cost_per_million: Cost | None = None


class Timing(_Model):
    """How the models that the headline compares were timed side by side."""

    models: list[str] = Field(description='"<step> in <runtime>" of each, as it is in the rows.')
    rounds: dict[str, int] = Field(description="Rounds in which all of them took turns, by batch size.")
    seconds: float = Field(description="What timing them side by side took.")
    busy_cores: float = Field(description="Cores that other programs used meanwhile.")
    idle_cores: float = Field(description="Cores that the models which were to wait used meanwhile.")
    threads: int
    affinity: list[int] = Field(default_factory=list, description="The cores that the processes may use; empty where not known.")
    energy: str = Field("", description="Why energy is not known; empty where it is.")
    currency: str = Field("", description="Of the price that the recipe gives.")
    price_per_hour: float | None = None
    left_out: list[str] = Field(default_factory=list, description="What was not timed, and why.")


Verdict = Literal["faster", "slower", "no clear difference"]


def speed_verdict_of(found: Ratio, noise: Ratio | None) -> Verdict:
    """``faster`` or ``slower`` where the whole interval lies outside of what a model against itself gives."""
    low, high = noise.band if noise else (1.0, 1.0)
    return "faster" if found.low > high else "slower" if found.high < low else "no clear difference"


class Headline(_Model):
    """What timing side by side gave, as a run keeps it in ``measurements/side-by-side.json``. Models are ``<step>.<runtime>``."""

    of: str = Field(description="A hash of what was measured of these models before; another one means to time them anew.")
    latency_ms: dict[str, dict[str, Latency]]
    served: dict[str, Served]
    ratios: dict[str, dict[str, Ratio]] = Field(description='"<slower>/<faster>" to ratios by batch size.')
    noise: dict[str, Ratio]
    timing: Timing
