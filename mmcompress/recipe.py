"""The recipe: its schema, loading from YAML, overrides, and errors that say where. Torch-free."""

from __future__ import annotations

import importlib.util
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator, model_validator

from mmcompress import registry
from mmcompress.errors import RecipeError, one_of
from mmcompress.recipe_errors import LineMap, explain
from mmcompress.recipe_yaml import parse_yaml
from mmcompress.robustness_settings import BY_KIND, Robustness, switch

LONGEST_NAME = 255
"""Bytes that a file's name may have on any common file system."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


_PathLike = TypeVar("_PathLike", str, str | list[str] | None)


def _could_be_a_path(value: _PathLike) -> _PathLike:
    for path in value if isinstance(value, list) else [value]:
        if isinstance(path, str) and any(len(os.fsencode(part)) > LONGEST_NAME for part in path.split("/")):
            raise ValueError(f"{path!r} is longer than a file name can be; allowed: {LONGEST_NAME} bytes")
    return value


class Source(_Strict):
    """Where the examples of one split come from."""

    path: str | list[str] | None = Field(
        None,
        description="A local Parquet, JSONL, CSV or WebDataset (.tar) file or a list of them, a folder of images or recordings, "
        "a hub id, or `bundled:shapes`.",
    )
    from_: Literal["train", "eval"] | None = Field(
        None, alias="from", description="Take the examples from another split instead of a path."
    )
    config: str | None = Field(None, description="The configuration of a hub data set that has several.")
    split: str | None = Field(
        None, description="The split inside the path: of a hub data set, or train/validation/test of bundled data."
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Role to column name, for roles image, audio, text, label, question, answers, speaker, cluster (examples "
        "with the same value stand or fall together in the intervals). Common names are found without it.",
    )
    classes: list[str] | None = Field(
        None, description="Class names in the order of the label numbers, where the data does not say."
    )
    samples: int | None = Field(
        None, ge=1, description="Use this many examples, chosen by the recipe's seed. All where left out."
    )
    license: str | None = Field(
        None,
        min_length=1,
        max_length=100,
        description="The data's licence, as the hub names them (`cc-by-4.0`); for the report and the model card. What its "
        "README.md or the data set itself says where left out.",
    )
    origin: str | None = Field(
        None, min_length=1, max_length=300, description="Where the data comes from, a URL; for the report and the model card."
    )
    skip_damaged: bool = Field(
        False, description="Skip and count pictures and recordings that do not decode, instead of stopping."
    )

    @field_validator("path")
    @classmethod
    def _path_could_be(cls, path: str | list[str] | None) -> str | list[str] | None:
        if path is not None and not (path if isinstance(path, str) else path and all(path)):
            raise ValueError("is empty; allowed: a path, a hub id or `bundled:shapes`")
        return _could_be_a_path(path)

    @field_validator("classes")
    @classmethod
    def _classes_differ(cls, classes: list[str] | None) -> list[str] | None:
        twice = next((name for name, count in Counter(classes or ()).items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"{twice!r} stands twice; every class needs a name of its own")
        if classes is not None and not (classes and all(name.strip() for name in classes)):
            raise ValueError("is empty, or holds an empty name; leave it out where the data names its classes")
        return classes

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.from_ is None):
            raise ValueError("needs exactly one of `path` and `from`")
        return self


class Data(_Strict):
    """The three splits. Only `eval` is always needed; passes that train or calibrate need the others."""

    train: Source | None = Field(None, description="Examples that training passes and data-driven criteria read.")
    calibration: Source | None = Field(None, description="Examples for quantization ranges; `train` where left out.")
    eval: Source = Field(description="Examples that every step is scored on. Never used for training or calibration.")
    ood: Source | None = Field(
        None,
        description="Another data set of pictures or recordings, which the model is not for: how well does its confidence tell "
        "them from those of `eval`?",
    )
    allow_leaks: bool = Field(
        False,
        description="Go on where evaluation examples are in the training or calibration data too (the same pixels, samples or "
        "text). Otherwise that is an error; with it the report says so in its headline.",
    )


class Gate(_Strict):
    """A condition on quality, judged on the 95% interval: it is met only if the whole interval is on the right side."""

    metric: str = Field(description="A metric of the task; `mmcompress list tasks <task>` shows them.")
    max_drop: float | None = Field(
        None,
        ge=0,
        le=100,
        description="How much worse than the baseline it may be, in points (0 to 100): a fall, or a rise of an error rate.",
    )
    min_value: float | None = Field(None, ge=0, le=100, description="Smallest allowed value, in points (0 to 100).")
    max_value: float | None = Field(
        None, ge=0, le=1000, description="Largest allowed value, in points, of a metric that counts mistakes (wer, cer)."
    )
    on_miss: Literal["report", "rollback", "stop"] = Field(
        "report",
        description="report: judge the final model only, exit code 3 when missed. rollback: judge every step, undo a miss and go "
        "on from the step before. stop: judge every step and end the run at the first that misses.",
    )

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if sum(limit is not None for limit in (self.max_drop, self.min_value, self.max_value)) != 1:
            raise ValueError("needs exactly one of `max_drop`, `min_value` and `max_value`")
        return self


class ReportSettings(_Strict):
    """What is measured, and how."""

    batch_sizes: list[Annotated[int, Field(ge=1, le=4096)]] = Field(
        [1, 8], min_length=1, description="Batch sizes that latency is measured at."
    )
    threads: int = Field(2, ge=1, le=1024, description="Threads of every measurement.")
    runtimes: list[Literal["torch", "onnxruntime", "openvino"]] = Field(
        ["torch", "onnxruntime"],
        min_length=1,
        description="Runtimes that every step is measured in. With both, the gain of the runtime and of compression stand apart.",
    )
    seconds: float = Field(
        2.0, gt=0, le=600, description="Time spent on each latency figure, in seconds (at least 20 calls are made)."
    )
    side_by_side: bool = Field(
        True,
        description="Time the models that the headline compares again when the run ends: all at once, in turns, the baseline "
        "twice. Without it ratios are those of processes that ran one after another, with no interval and no noise beside them.",
    )
    margin: float = Field(
        1.0,
        ge=0,
        le=100,
        description="The loss of quality that is taken as harmless where no gate with max_drop says so, in points: a difference "
        "whose whole 95% interval lies above it is called no worse.",
    )
    slices: list[str] | None = Field(
        None,
        description="Columns of `data.eval` that quality is compared in slices of. Where left out: all of texts or whole numbers "
        "with 2 to 20 different values, and the speaker. Classes, sizes, brightness, loudness and lengths are always looked at.",
    )
    price_per_hour: float | None = Field(
        None, gt=0, le=1e6, description="What an hour of this machine costs; the report then says what a million examples cost."
    )
    currency: str = Field("USD", min_length=1, max_length=12, description="The currency of `price_per_hour`.")
    device: Literal["auto", "cuda", "mps", "cpu"] = Field(
        "cpu", description="Where torch is measured; ONNX Runtime and OpenVINO are measured on the CPU."
    )

    @field_validator("runtimes")
    @classmethod
    def _are_installed(cls, runtimes: list[str]) -> list[str]:
        if "openvino" in runtimes and importlib.util.find_spec("openvino") is None:
            raise ValueError("OpenVINO is not installed; pip install 'mmcompress[openvino]'")
        return runtimes

    robustness: Robustness | None = Field(
        None,
        description="Evaluate the baseline and the final model on damaged pictures, recordings and texts too: `true`, or a "
        "mapping. Off where left out: it takes some 60 evaluations of each model; `mmcompress check` counts them.",
    )

    @field_validator("robustness", mode="before")
    @classmethod
    def _robustness_switch(cls, value: Any) -> Any:
        return switch(value)


class Recipe(_Strict):
    """A model, a task with its data, and an ordered list of passes."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="The run's name: letters, digits, dot, dash, underscore."
    )
    model: str = Field(min_length=1, description="Hub id, local folder, or `bundled:<name>`.")
    trust_remote_code: bool = Field(
        False, description="Let transformers run code that comes with the model. Off unless you say so."
    )
    model_license: str | None = Field(
        None,
        min_length=1,
        max_length=100,
        description="The model's licence, as the hub names them (`apache-2.0`); for the report and the model card. What its "
        "README.md says where left out.",
    )
    model_origin: str | None = Field(
        None, min_length=1, max_length=300, description="Where the model comes from, a URL; for the report and the model card."
    )
    task: Any = Field(description="What the model is for; decides loss and metrics.")
    data: Data
    passes: list[Any] = Field(default_factory=list, description="The steps, run in this order; a pass may repeat.")
    gates: list[Gate] = Field(default_factory=list, description="Conditions that the result must meet.")
    report: ReportSettings = Field(default_factory=lambda: ReportSettings.model_validate({}))
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of everything random in the run.")

    @field_validator("model")
    @classmethod
    def _model_could_be(cls, model: str) -> str:
        return _could_be_a_path(model)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        made: str | None = None
        for i, step in enumerate(self.passes):
            if made and (step.changes == "weights" or step.name == "quantize"):
                raise ValueError(
                    f"passes.{i}: {step.name} after {made} would leave the ONNX files of {made} stale; move it before {made}"
                )
            if step.makes_files and step.name != "export":
                made = step.name
            missing = [s for s in step.uses if getattr(self.data, s) is None and not (s == "calibration" and self.data.train)]
            if missing:
                raise ValueError(f"passes.{i}: {step.name} reads data.{missing[0]}, which the recipe does not have")
            placement = getattr(step, "placement", "fixed")
            names = [placement] if isinstance(placement, str) else list(placement.values())
            here = getattr(step, "runtime", "onnxruntime") == "onnxruntime"
            fused = any((name == "measure" and here) or name.endswith("-fused") for name in names)
            if "openvino" in self.report.runtimes and fused:
                raise ValueError(
                    f"passes.{i}: placement: fused placements, which `measure` may choose, run in ONNX Runtime alone, and "
                    "report.runtimes has openvino; name others, measure in `runtime: openvino`, or take it out"
                )
        for i, gate in enumerate(self.gates):
            if gate.metric not in self.task.metrics:
                raise ValueError(f"gates.{i}.metric: " + one_of("metric", gate.metric, self.task.metrics))
            lower = gate.metric in self.task.lower_is_better
            if (gate.min_value if lower else gate.max_value) is not None:
                better, wrong, right = ("lower", "min_value", "max_value") if lower else ("higher", "max_value", "min_value")
                raise ValueError(f"gates.{i}.{wrong}: {better} values of {gate.metric} are better; give `{right}` or `max_drop`")
        for which in ("train", "calibration"):
            source = getattr(self.data, which)
            if source is not None and source.from_ in (which, "eval"):
                raise ValueError(
                    f"data.{which}.from: {source.from_!r} would read {'itself' if source.from_ == which else 'the test data'}"
                )
        for which in ("eval", "ood"):
            source = getattr(self.data, which)
            if source is not None and source.from_ is not None:
                raise ValueError(f"data.{which}.from: scoring needs examples of its own; give a path")
        kind = next(kind for kind in BY_KIND if kind in self.task.roles)
        for name in (self.report.robustness.corruptions if self.report.robustness else None) or ():
            if name not in BY_KIND[kind]:
                said = one_of("corruption", name, BY_KIND[kind])
                raise ValueError(f"report.robustness.corruptions: {self.task.type} has no such: {said}")
        return self


@cache
def recipe_model() -> type[Recipe]:
    """The schema with all passes and tasks that there are, those of other packages included."""
    passes = tuple(registry.find("passes", n).PASS for n in registry.names("passes"))
    tasks = tuple(registry.find("tasks", n).TASK for n in registry.names("tasks"))
    some_pass = Annotated[Union[passes], Field(discriminator="name")]  # type: ignore[valid-type]  # noqa: UP007  (made at run time)
    some_task = Annotated[Union[tasks], Field(discriminator="type")]  # type: ignore[valid-type]  # noqa: UP007
    fields: dict[str, Any] = {
        "task": (some_task, Field(description=Recipe.model_fields["task"].description)),
        "passes": (list[some_pass], Field(default_factory=list, description=Recipe.model_fields["passes"].description)),
    }
    return create_model("Recipe", __base__=Recipe, __doc__=Recipe.__doc__, **fields)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **recipe_model().model_json_schema(by_alias=True)}


def margins(recipe: Recipe) -> dict[str, float]:
    """For each metric with a gate on its loss the strictest such limit, in points: what its verdicts are held against."""
    limits = sorted(((g.metric, g.max_drop) for g in recipe.gates if g.max_drop is not None), key=lambda pair: -pair[1])
    return dict(limits)


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data with every default written out."""
    found: dict[str, Any] = recipe.model_dump(mode="json", by_alias=True, serialize_as_any=True)
    return found


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe; nothing else is loaded.

    Args:
        path: a YAML file.
        overrides: ``key.path=value`` each, as given to ``--set``; the value is YAML.

    Raises:
        RecipeError: with every mistake that was found, each with file, line, key, what was found and what is allowed.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise RecipeError(f"{file}: no such recipe") from e
    except (OSError, UnicodeDecodeError) as e:
        raise RecipeError(f"{file}: cannot be read as a text file: {e}") from e
    raw, lines = parse_yaml(text, str(file))
    for override in overrides:
        set_value(raw, override, lines)
    return make_recipe(raw, lines, near=file.parent)


def make_recipe(raw: Mapping[str, Any], lines: LineMap | None = None, near: Path | None = None) -> Recipe:
    """Checks a recipe given as plain data.

    Args:
        near: relative paths that do not exist in the working directory are looked for here (the recipe's own folder).
    """
    where = lines or LineMap("recipe", {})
    try:
        recipe = recipe_model().model_validate(raw if near is None else _localise(raw, near))
    except ValidationError as e:
        raise RecipeError(explain(e, recipe_model(), where)) from e
    return recipe


def set_value(raw: dict[str, Any], override: str, lines: LineMap) -> None:
    """Applies one ``key.path=value`` to plain recipe data; list items are addressed by number (``passes.0.ratio``).

    Raises:
        RecipeError: the override has no ``=``, its value is not YAML, or its path leads nowhere.
    """
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise RecipeError(f"--set {override}: allowed: key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise RecipeError(f"--set {override}: the value is not valid YAML") from e
    keys = [int(k) if k.isdigit() else k for k in re.sub(r"\[(\d+)\]", r".\1", path.strip()).split(".")]
    lines.overridden[tuple(keys)] = override
    here: Any = raw
    for i, key in enumerate(keys):
        last = i == len(keys) - 1
        shown = ".".join(map(str, keys[: i + 1]))
        if isinstance(here, list):
            if not isinstance(key, int) or key >= len(here):
                raise RecipeError(f"--set {override}: {shown} is no item of the list; allowed: 0 to {len(here) - 1}")
        elif not isinstance(here, dict):
            raise RecipeError(f"--set {override}: {'.'.join(map(str, keys[:i]))} holds {here!r}, which has no keys")
        else:
            key = str(key)
        if last:
            here[key] = value
        else:
            if isinstance(here, dict) and here.get(key) is None:
                here[key] = {}
            here = here[key]


def _localise(raw: Mapping[str, Any], near: Path) -> dict[str, Any]:
    """Rewrites relative paths that exist beside the recipe but not in the working directory."""

    def local(value: Any) -> Any:
        if isinstance(value, list):
            return [local(v) for v in value]
        # Unlike Path.exists, os.path.exists takes names that are too long for a file as absent.
        if isinstance(value, str) and value and ":" not in value and not os.path.exists(value) and os.path.exists(near / value):
            return str(near / value)
        return value

    found = dict(raw)
    if isinstance(found.get("model"), str):
        found["model"] = local(found["model"])
    if isinstance(found.get("data"), dict):
        found["data"] = {
            which: {**source, "path": local(source["path"])} if isinstance(source, dict) and "path" in source else source
            for which, source in found["data"].items()
        }
    return found
