"""One model in one runtime to one row of the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmcompress.data.examples import Examples
from mmcompress.data.prepare import WORDS, prepared, prepared_rows
from mmcompress.errors import DataError, ModelError
from mmcompress.families.base import NEW_TOKENS, Arrays
from mmcompress.measure import latency, quality, size
from mmcompress.measure.behaviour import behaviour, know_scale
from mmcompress.measure.clusters import clustered, clusters_note
from mmcompress.model import CompressedModel
from mmcompress.progress import Reporter
from mmcompress.quantization.onnx_export import export_component
from mmcompress.recipe import ReportSettings
from mmcompress.report.schema import ComponentRow, Latency, Parity, Row
from mmcompress.runtimes.base import Predict
from mmcompress.runtimes.openers import OnnxRuntime, open_folder
from mmcompress.runtimes.openvino_predict import OpenVinoPredict
from mmcompress.runtimes.torch_predict import TorchPredict
from mmcompress.tasks.base import Scores, Task

PARITY_EXAMPLES = 32
FLOAT_TOLERANCE = 1e-4
"""How far below 1 the cosine between an output of a float32 export and torch's may lie."""


@dataclass
class Meter:
    """Measures the steps of one run in the same way.

    Attributes:
        baseline: the baseline's scores in torch, which every other row is compared with example by example.
        margins: for each metric with a gate the loss that the gate takes as harmless, in points; `settings.margin` for others.
    """

    task: Task
    examples: Examples
    settings: ReportSettings
    reporter: Reporter
    baseline: Scores | None = None
    margins: Mapping[str, float] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)

    def torch_row(self, model: CompressedModel, folder: Path, step: str) -> Row:
        """Measures a saved model in torch."""
        flops = size.flops_by_component(model)
        timed = self._time(model, folder, "torch", self.settings.device)
        parts = model.family.components(model.module)
        tower_of = {name: part.tower for name, part in parts.items()}
        parameters, disk = size.parameters_by_tower(model), size.torch_bytes_by_tower(model)
        row = Row(
            step=step,
            runtime="torch",
            parameters=model.parameters(),
            disk_bytes=size.torch_bytes(folder),
            peak_memory_bytes=timed["peak_memory_bytes"],
            flops=sum(flops.values()),
            latency_ms=timed["latency_ms"],
            busy_cores=timed["busy_cores"],
            load_seconds=timed["load_seconds"],
            start_seconds=timed["start_seconds"],
            first_inference_ms=timed["first_inference_ms"],
            components=_components(tower_of, parameters, disk, flops, timed["components"]),
            loads_with="mmcompress" if model.custom else "transformers",
        )
        decoders = [part.name for part in parts.values() if part.decoder]
        if decoders and step == "baseline":
            row.notes.append(
                f"Latency and FLOPs, here and below, are those of {NEW_TOKENS} new tokens: all before {decoders[0]} once, then "
                f"{decoders[0]} over the start of the text and {NEW_TOKENS - 1} times with its cache."
            )
        self._score(row, TorchPredict(model, self.settings.device), model)
        model.module.to("cpu")
        return row

    def onnx_row(
        self, model: CompressedModel, folder: Path, step: str, precision: str, runtime: OnnxRuntime = "onnxruntime"
    ) -> Row:
        """Measures ONNX components that were made from a model, and compares them with it on real examples."""
        flops = size.flops_by_component(model)
        timed = self._time(model, folder, runtime, "cpu")
        files = size.onnx_bytes(folder)
        tower_of = {name: part.tower for name, part in model.family.components(model.module).items()}
        parameters = size.parameters_by_tower(model)
        disk: dict[str, int] = {}
        for name, found in files.items():
            disk[tower_of[name]] = disk.get(tower_of[name], 0) + found
        predict = open_folder(runtime, folder, self.settings.threads)
        row = Row(
            step=step,
            runtime=runtime,
            precision=precision,
            parameters=model.parameters(),
            disk_bytes=sum(files.values()),
            peak_memory_bytes=timed["peak_memory_bytes"],
            flops=sum(flops.values()),
            latency_ms=timed["latency_ms"],
            busy_cores=timed["busy_cores"],
            load_seconds=timed["load_seconds"],
            start_seconds=timed["start_seconds"],
            first_inference_ms=timed["first_inference_ms"],
            components=_components(tower_of, parameters, disk, flops, timed["components"]),
            parity=parity(model, predict, self.task, self.examples),
            loads_with="onnx",
        )
        if isinstance(predict, OpenVinoPredict):
            row.notes.append(predict.words())
        if precision == "float32":
            check_float_parity(row.parity, step)
        self._score(row, predict, model)
        return row

    def _time(self, model: CompressedModel, folder: Path, runtime: str, device: str) -> dict[str, Any]:
        settings = self.settings
        self.reporter.note(f"timing {runtime}")
        return latency.measure(
            folder,
            runtime,
            batch_sizes=settings.batch_sizes,
            threads=settings.threads,
            seconds=settings.seconds,
            family=model.family,
            module=model.module,
            device=device,
        )

    def _score(self, row: Row, predict: Predict, model: CompressedModel) -> None:
        scores = clustered(self.task.evaluate(predict, model.processor, self.examples, self.reporter), self.examples)
        know_scale(scores, model)
        self.scores[f"{row.step}.{row.runtime}"] = scores
        row.quality = quality.qualities(scores)
        row.classes = quality.class_scores(scores)
        if self.baseline is not None:
            row.change = quality.changes(scores, self.baseline, self.task.lower_is_better, self.margins, self.settings.margin)
        elif note := clusters_note(scores, self.examples):
            row.notes.append(note)
        row.behaviour = behaviour(scores, self.baseline, self.task, self.examples, self.settings.slices)
        if scores.skipped:
            what = WORDS[self.examples.kind]
            row.notes.append(f"{scores.skipped} of {len(self.examples)} examples were skipped: their {what} does not decode.")


def _components(
    tower_of: dict[str, str],
    parameters: dict[str, int],
    disk: dict[str, int],
    flops: dict[str, int],
    timed: dict[str, dict[str, Latency]],
) -> dict[str, ComponentRow]:
    """A row for each tower; one with several components (a decoder with its embedding table) has the sum of their FLOPs, and of
    the component that takes longest the time.
    """
    found = {}
    for tower in dict.fromkeys(tower_of.values()):
        names = [name for name in tower_of if tower_of[name] == tower]
        own = [timed[name] for name in names if name in timed]
        found[tower] = ComponentRow(
            parameters=parameters.get(tower, 0),
            disk_bytes=disk.get(tower, 0),
            flops=sum(flops[name] for name in names if name in flops) if any(name in flops for name in names) else None,
            latency_ms=max(own, key=lambda t: next(iter(t.values())).p50) if own else {},
        )
    return found


def export_float(model: CompressedModel, folder: Path, reporter: Reporter) -> Path:
    """Exports every component as ``<name>.onnx`` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = model.family.components(model.module)
    for name, part in reporter.track(parts.items(), "exporting to ONNX", len(parts)):
        export_component(part, model.family.example_inputs(model.module.config, part, 2), folder / f"{name}.onnx")
    return folder


def parity(model: CompressedModel, predict: Predict, task: Task, examples: Examples) -> dict[str, Parity]:
    """Compares components with torch on real examples: the first of the data, and the texts that go with them."""
    return parity_over(model, predict, real_inputs(model, task, examples))


def parity_over(model: CompressedModel, predict: Predict, batch: Arrays) -> dict[str, Parity]:
    """Compares components with torch on one batch, as the family's ``forward`` takes it.

    Every component is given torch's own outputs of the components before it, so that its own difference is seen. A decoder is
    compared over whole texts and with a cache.
    """
    reference = TorchPredict(model)
    found: dict[str, Parity] = {}
    for name, given in model.family.walk(reference, batch, model.module):
        ours, theirs = reference(name, given), predict(name, given)
        gaps, cosines = [], []
        for output in ours:
            # Without rows there is nothing to compare: what a decoder gives again of an encoder it was not asked about.
            if not ours[output].size:
                continue
            a, b = ours[output].astype(np.float64), theirs[output].astype(np.float64)
            gaps.append(float(np.abs(a - b).max()))
            norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
            cosines.append(float(np.where(norms > 1e-12, (a * b).sum(-1) / np.maximum(norms, 1e-12), 1.0).min()))
        new = Parity(max_abs_difference=max(gaps), min_cosine=min(cosines), n=len(next(iter(given.values()))))
        old = found.get(name, new)
        found[name] = Parity(
            max_abs_difference=max(old.max_abs_difference, new.max_abs_difference),
            min_cosine=min(old.min_cosine, new.min_cosine),
            n=new.n,
        )
    return found


def real_inputs(model: CompressedModel, task: Task, examples: Examples) -> dict[str, np.ndarray]:
    """A batch of the first examples, as the family's ``forward`` takes it.

    Raises:
        DataError: none of the first ones decodes.
    """
    block = next((b for b in prepared(examples, model.processor) if len(b[0])), None)
    if block is None:
        raise DataError(f"{examples.name}: nothing decodes")
    batch = task.collate(prepared_rows(examples, *block)[:PARITY_EXAMPLES], model.processor, examples, 0)
    return {name: value.numpy() for name, value in batch.items() if name != "target"}


def check_float_parity(found: dict[str, Parity], where: str) -> None:
    """A float32 export that differs from torch is broken, and so is every number made with it.

    Raises:
        ModelError: a component differs by more than rounding does.
    """
    for name, result in found.items():
        if result.min_cosine < 1 - FLOAT_TOLERANCE:
            raise ModelError(
                f"{where}: the ONNX export of {name} differs from torch on real examples (largest difference "
                f"{result.max_abs_difference:.3g}, smallest cosine {result.min_cosine:.6f}); it is not usable"
            )
