"""The data model of ``report.json``. Its JSON Schema is printed by ``mmcompress schema --report``.

Quality values are shares between 0 and 1 unless a metric's description says otherwise (error rates may pass 1); differences
are compressed model minus baseline, in the metric's own unit, so that a fall is an improvement for the metrics in
``lower_is_better``. Torch-free, so that finished reports are read fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mmcompress.report.frame import flat_row
from mmcompress.report.schema_behaviour import Behaviour
from mmcompress.report.schema_data import Leaks, Origin
from mmcompress.report.schema_robustness import Robustness
from mmcompress.report.schema_speed import Latency as Latency
from mmcompress.report.schema_speed import Ratio, Served, Timing, Verdict

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION = 1


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="null")


class Quality(_Model):
    """A metric with its 95% interval."""

    value: float
    low: float = Field(
        description="Lower end of the 95% interval: Wilson's of shares, else the BCa bootstrap over examples, or over clusters "
        "(one picture's or speaker's examples)."
    )
    high: float = Field(description="Upper end of the 95% interval.")
    n: int = Field(description="How many examples it is taken over.")


class Change(_Model):
    """A metric's paired difference to the baseline on the same examples (compressed minus baseline)."""

    difference: float
    low: float = Field(
        description="Lower end of the 95% interval of the paired difference: Agresti and Min's of shares, else the BCa bootstrap "
        "over examples or clusters."
    )
    high: float = Field(description="Upper end of the 95% interval.")
    n: int
    lost: int = Field(description="Examples that are worse than the baseline's: it got them right and this model does not.")
    won: int = Field(description="Examples that are better than the baseline's.")
    verdict: Literal["better", "worse", "no clear difference", "identical"] = Field(
        description="On which side of zero the interval lies."
    )
    p_value: float | None = Field(
        None,
        description="Exact two-sided McNemar test of `won` against `lost`; null where examples are not just right or wrong, or "
        "stand in clusters.",
    )
    margin: float | None = Field(
        None, description="The loss that is taken as harmless, in points: the gate's max_drop, else the recipe's report.margin."
    )
    needed: int | None = Field(
        None,
        description="About how many examples would settle it with 80% power, from the spread seen; null where it is settled.",
    )
    conclusion: str = Field("", description="The verdict in words, against the margin.")

    @property
    def words(self) -> str:
        """What views say of it; reports of earlier versions have the bare verdict."""
        return self.conclusion or self.verdict


class ClassScore(_Model):
    """Precision and recall of one class."""

    precision: float | None = Field(description="None where the class was never predicted.")
    recall: float | None = Field(description="None where the class has no example.")
    n: int = Field(description="Examples of the class.")


class ComponentRow(_Model):
    """One tower: what it weighs and how long it takes by itself."""

    parameters: int
    disk_bytes: int
    flops: int | None = Field(None, description="Floating point operations for one example, 2 per multiply-add.")
    latency_ms: dict[str, Latency] = Field(default_factory=dict, description="By batch size.")


class Parity(_Model):
    """How far an exported component's outputs are from torch's on real examples."""

    max_abs_difference: float
    min_cosine: float = Field(description="The smallest cosine similarity between the two outputs of one example.")
    n: int = Field(description="How many real examples were compared.")


BUSY_CORES = 0.25
"""With more of the machine used by others than this many cores, latency is not to be trusted."""


class Row(_Model):
    """One model in one runtime."""

    step: str = Field(description='"baseline", "1-prune", ...')
    runtime: Literal["torch", "onnxruntime", "openvino"]
    precision: str = Field("float32", description="What the weights are stored as in what was measured.")
    same_files_as: str | None = Field(None, description="The earlier step that left the same files, which were measured once.")
    parameters: int
    disk_bytes: int = Field(description="Bytes of the weights file (torch) or of the components' files (ONNX).")
    peak_memory_bytes: int | None = Field(None, description="Peak resident memory of the process that was timed.")
    flops: int | None = Field(None, description="For one example through all components, 2 per multiply-add.")
    latency_ms: dict[str, Latency] = Field(default_factory=dict, description="All components once, by batch size.")
    load_seconds: float | None = Field(
        None,
        description="What loading the model took in the process that was timed, libraries not counted; its file was cached.",
    )
    start_seconds: float | None = Field(
        None, description="From the start of that process until the model was loaded, libraries included."
    )
    first_inference_ms: float | None = Field(None, description="The first call of the smallest batch size in that process.")
    served: Served | None = Field(
        None, description="More of the models that were timed side by side; their `latency_ms` is from there too."
    )
    busy_cores: float | None = Field(
        None, description="Cores that other programs used while latency was measured; above 0.25 the times are not to be trusted."
    )
    quality: dict[str, Quality] = Field(default_factory=dict)
    change: dict[str, Change] = Field(default_factory=dict, description="Paired differences to the baseline in torch.")
    components: dict[str, ComponentRow] = Field(default_factory=dict, description="By tower.")
    classes: dict[str, ClassScore] = Field(default_factory=dict)
    behaviour: Behaviour | None = Field(None, description="What changed underneath, and calibration.")
    parity: dict[str, Parity] = Field(default_factory=dict, description="By component; ONNX rows only.")
    loads_with: Literal["transformers", "mmcompress", "onnx"] = "transformers"
    rolled_back: bool = Field(
        False, description="A gate was missed and the step was undone; later steps build on the one before."
    )
    notes: list[str] = Field(default_factory=list, description="What the numbers say in words, bad news included.")
    settings: dict[str, Any] = Field(default_factory=dict, description="The pass's settings as they were run.")
    result: dict[str, Any] = Field(default_factory=dict, description="What the pass says it did.")
    facts: dict[str, Any] = Field(default_factory=dict, description="What the step cost besides seconds: examples, steps, ...")
    seconds: float = Field(0.0, description="What the step itself took; measuring not counted.")
    folder: str = Field("", description="The step's folder, relative to the run.")

    @property
    def disturbed(self) -> bool:
        """True where other programs used so much of the machine that the latency is not to be trusted."""
        return self.busy_cores is not None and self.busy_cores > BUSY_CORES


class GateResult(_Model):
    """A gate and what came of it. It is met only if the whole 95% interval lies on the right side."""

    metric: str
    step: str
    runtime: str
    max_drop: float | None = Field(None, description="How much worse than the baseline it may be, in points.")
    min_value: float | None = Field(None, description="Smallest allowed value, in points.")
    max_value: float | None = Field(
        None, description="Largest allowed value, in points, of a metric whose lower values are better."
    )
    verdict: Literal["met", "missed", "not shown"] = Field(
        description='"not shown": the interval holds the limit, there are not enough examples to say.'
    )
    words: str
    on_miss: Literal["report", "rollback", "stop"] = "report"


class Warning_(_Model):
    """A sentence that the reader must see, and the step it belongs to."""

    step: str
    text: str


class Gain(_Model):
    """The speed-up at one batch size, taken apart: ratios of times, above 1 is faster. Of models that were timed side by side
    with intervals; else of the medians of processes that ran one after another.
    """

    runtime: float | None = Field(description="Baseline in torch over baseline in ONNX Runtime: no compression in it.")
    compression: float | None = Field(description="Baseline in ONNX Runtime over final model in ONNX Runtime.")
    compression_torch: float | None = Field(description="Baseline in torch over final model in torch.")
    total: float | None = Field(description="Baseline in torch over final model in its fastest runtime.")
    intervals: dict[str, Ratio] = Field(
        default_factory=dict, description="By the name of the ratio, where the models took turns: its 95% interval."
    )
    verdict: Verdict | None = Field(None, description="Of the total, against the noise; null where the models took no turns.")


class Totals(_Model):
    """The run in a few numbers."""

    headline: str = Field(description="One sentence that anyone can quote.")
    finished: bool = Field(description="False for the report of a half-finished run.")
    final_step: str = ""
    final_runtime: str = ""
    metric: str = Field("", description="The task's headline metric.")
    parameters_ratio: float | None = Field(None, description="Final over baseline.")
    disk_ratio: float | None = Field(None, description="Final over baseline, each in the runtime it is shipped for.")
    flops_ratio: float | None = None
    speedup: dict[str, Gain] = Field(default_factory=dict, description="By batch size.")
    seconds: float = 0.0
    synthetic: bool = Field(False, description="The model or the data are synthetic: numbers say nothing about real data.")


class Report(_Model):
    """What ``report.json`` holds."""

    format_version: int = FORMAT_VERSION
    name: str
    model_class: str = Field("", description="The stock transformers class that the final model loads with.")
    recipe: dict[str, Any]
    environment: dict[str, Any] = Field(description="Versions, CPU, threads.")
    metrics: dict[str, str] = Field(default_factory=dict, description="What each metric is.")
    lower_is_better: list[str] = Field(default_factory=list, description="Metrics that count mistakes, such as error rates.")
    units: dict[str, Literal["percent", "points"]] = Field(
        default_factory=dict,
        description="How views write a metric: as percent, or times 100 without the sign (CIDEr). One that is not named here is "
        "written as percent where all its values lie between 0 and 1, else as it is.",
    )
    rows: list[Row] = Field(default_factory=list)
    gates: list[GateResult] = Field(default_factory=list)
    warnings: list[Warning_] = Field(default_factory=list)
    noise: dict[str, Ratio] = Field(
        default_factory=dict,
        description="By batch size: the baseline in torch over itself, timed as two processes. What a ratio must exceed.",
    )
    timing: Timing | None = Field(None, description="How the models that the headline compares were timed side by side.")
    robustness: Robustness | None = Field(None, description="The final model under conditions that it was not meant for.")
    leaks: Leaks | None = Field(None, description="Duplicates between the splits; null in reports of earlier versions.")
    origins: list[Origin] = Field(default_factory=list, description="Licence and source of every model and data set.")
    totals: Totals

    def to_frame(self) -> pd.DataFrame:
        """The rows as a pandas frame: one line a row, every number under its dotted path (``latency_ms.1.p50``); the numbers of
        a metric itself are ``quality.<metric>`` and ``change.<metric>``.
        """
        import pandas as pd  # an optional view; reports are read without pandas

        return pd.DataFrame([flat_row(row.model_dump()) for row in self.rows])


def report_schema() -> dict[str, Any]:
    """The JSON Schema of ``report.json``."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Report.model_json_schema()}
