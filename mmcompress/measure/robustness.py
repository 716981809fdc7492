"""Robustness of a run: the baseline and the final model under every condition, saved cell by cell, and put side by side.

Every cell (one model under one condition) is written as it is measured, so that a run that is killed goes on from there.

Shapes: N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from mmcompress.data.examples import Examples
from mmcompress.errors import DataError, ModelError
from mmcompress.files import writing_folder
from mmcompress.measure import shift
from mmcompress.measure.attack import METHODS, Attack, why_not
from mmcompress.measure.clusters import clustered
from mmcompress.measure.corruptions.cells import CLEAN, Cell, altered, planned
from mmcompress.measure.paired_drops import Drops, Scored
from mmcompress.measure.robustness_results import of_attacks, of_cells, over_all
from mmcompress.model import CompressedModel
from mmcompress.processor import Processor
from mmcompress.progress import Reporter
from mmcompress.report.schema_robustness import Robustness, Shift
from mmcompress.robustness_settings import Robustness as Settings
from mmcompress.runtimes.base import Predict
from mmcompress.tasks.base import Task

USUAL_SIDE = 384
"""The shorter side that larger pictures are brought to where a model takes them in several sizes, in pixels."""
SCORES = "scores.safetensors"


class Subject:
    """A model that is measured, opened when it is first needed.

    Attributes:
        name: the row it is: ``baseline.torch``.
    """

    def __init__(
        self,
        name: str,
        open_model: Callable[[], CompressedModel],
        open_predict: Callable[[CompressedModel], Predict],
        device: str = "cpu",
    ) -> None:
        self.name, self.device = name, device
        self._open_model, self._open_predict = open_model, open_predict

    @cached_property
    def model(self) -> CompressedModel:
        """The model in torch; of quantized ONNX components the one that they were made from."""
        return self._open_model()

    @cached_property
    def predict(self) -> Predict:
        """What runs it."""
        return self._open_predict(self.model)


@dataclass
class RobustnessMeter:
    """Measures two models of a task under all conditions.

    Attributes:
        folder: where cells are saved.
        settings: what is measured besides ``outside``; None for nothing.
        outside: another data set, for the shift; None for none.
    """

    task: Task
    examples: Examples
    settings: Settings | None
    outside: Examples | None
    seed: int
    folder: Path
    reporter: Reporter

    def measure(self, baseline: Subject, final: Subject) -> Robustness:
        """Everything that is asked for."""
        found = Robustness(baseline=baseline.name, final=final.name)
        subjects = (baseline, final)
        if self.settings is not None:
            self._under_conditions(found, subjects, self.settings)
            if self.settings.adversarial is not None:
                self._under_attack(found, subjects, self.settings)
        if self.outside is not None:
            found.shift = self._shift(found, subjects, self.outside)
        return found

    # Corruptions, texts and modalities.

    def _under_conditions(self, found: Robustness, subjects: Sequence[Subject], settings: Settings) -> None:
        examples = some(self.examples, settings.samples, self.seed)
        cells = [CLEAN, *planned(settings, self.task)]
        scored: dict[tuple[int, Any], Scored] = {}
        for cell in self.reporter.track(cells, "robustness", len(cells)):
            self.reporter.note(cell.key)
            own = self._cell(cell, subjects, examples, found.notes)
            if len(own) == len(subjects):
                scored |= {(who, cell): one for who, one in enumerate(own)}
            elif cell is CLEAN:
                return
        metric = next(iter(self.task.metrics))
        drops = Drops(scored, CLEAN, metric in self.task.lower_is_better, self.seed)
        found.metric, found.lower_is_better, found.n = metric, drops.lower_is_better, drops.n
        found.clean = {"baseline": drops.metric(0, CLEAN), "final": drops.metric(1, CLEAN)}
        there = [cell for cell in cells if (0, cell) in scored and cell is not CLEAN]
        is_share = self.task.units.get(metric, "percent") == "percent"
        found.conditions = of_cells(drops, there, is_share)
        if is_share:
            over_all(found, drops, there)

    def _cell(self, cell: Cell, subjects: Sequence[Subject], examples: Examples, notes: list[str]) -> list[Scored]:
        """Each model's scores; what cannot be scored is noted and left out."""
        done = [self._saved(subject, cell.key) for subject in subjects]
        if all(one is not None for one in done):
            return [one for one in done if one is not None]
        side = model_side(subjects[0].model.processor)
        view = altered(examples, cell, self.task, self.seed, side)
        found: list[Scored] = []
        for who, (subject, one) in enumerate(zip(subjects, done, strict=True)):
            if who and not same_media(subjects[0].model.processor, subject.model.processor):
                view = altered(examples, cell, self.task, self.seed, side)  # prepared anew, by its own processor
            try:
                found.append(one or self._score(subject, view, examples, cell.key))
            except (ModelError, DataError) as e:
                notes.append(f"{cell.name}{f' at severity {cell.severity}' * (cell.severity > 0)}: {subject.name}: {e}")
        return found

    def _score(self, subject: Subject, view: Examples, examples: Examples, key: str) -> Scored:
        metric = next(iter(self.task.metrics))
        scores = self.task.evaluate(subject.predict, subject.model.processor, view, self.reporter)
        scores = clustered(scores, examples)
        if metric not in scores.per_example or scores.kept is None:
            raise ModelError(f"{self.task.type} gives no {metric} example by example")
        made = Scored(scores.per_example[metric], scores.kept, scores.weights.get(metric), numbered(scores.clusters))
        self._save(subject, key, made)
        return made

    # Attacks.

    def _under_attack(self, found: Robustness, subjects: Sequence[Subject], settings: Settings) -> None:
        adversarial = settings.adversarial
        if adversarial is None:
            return
        examples = some(self.examples, adversarial.samples, self.seed)
        cells: list[tuple[str, float]] = [("clean", 0.0), *((m, e) for m in METHODS for e in sorted(set(adversarial.eps)))]
        scored: dict[tuple[int, Any], Scored] = {}
        for who, subject in enumerate(subjects):
            attack: Attack | None = None
            for name, eps in self.reporter.track(cells, "attacks", len(cells)):
                key = f"attack-{name}-{eps:g}"
                one = self._saved(subject, key)
                if one is None and attack is None:
                    reason = why_not(subject.model, self.task, examples)
                    if reason:
                        found.notes.append(f"Attacks were not measured: {reason}.")
                        return
                    # A view of its own for each model: what is prepared is kept by examples, whatever processor made it.
                    view = altered(examples, CLEAN, self.task, self.seed, model_side(subjects[0].model.processor))
                    attack = Attack(subject.model, self.task, view, subject.device)
                if one is None and attack is not None:
                    method = next((m for m in METHODS if m == name), None)
                    one = attack.scored(method, eps, adversarial.steps, self.seed, self.reporter)
                    self._save(subject, key, one)
                if one is not None:
                    scored[who, (name, eps)] = one
        clean = cells[0]
        drops = Drops(scored, clean, False, self.seed)
        found.attack_n = drops.n
        found.attack_clean = {"baseline": drops.metric(0, clean), "final": drops.metric(1, clean)}
        found.attacks = of_attacks(drops, {name: [c for c in cells if c[0] == name] for name in METHODS})

    # Shift.

    def _shift(self, found: Robustness, subjects: Sequence[Subject], outside: Examples) -> Shift | None:
        samples = (self.settings or Settings.model_validate({})).samples
        own, other = some(self.examples, samples, self.seed), some(outside, samples, self.seed)
        candidates = self.task.candidates(own)
        if candidates is None:
            found.notes.append(
                f"data.ood was not measured: {self.task.type} compares no similarities whose size says how sure the model is."
            )
            return None
        # With a bias every pair is judged by itself (SigLIP): the classes' probabilities need not add up to one.
        softmax = self.task.text_role == "classes" and all(scale_of(s.model)[1] is None for s in subjects)
        sure: list[list[Scored]] = [[], []]
        for subject in self.reporter.track(subjects, "shift", len(subjects)):
            for place, examples in zip(sure, (own, other), strict=True):
                key = f"shift-{'own' if examples is own else 'other'}"
                one = self._saved(subject, key)
                if one is None:
                    scale = scale_of(subject.model)[0] if softmax else None
                    # A view of its own for each model: what is prepared is kept by examples, whatever processor made it.
                    view = altered(examples, CLEAN, self.task, self.seed, model_side(subjects[0].model.processor))
                    kept, values = shift.confidences(
                        subject.predict, subject.model.processor, view, candidates[0], scale, self.reporter
                    )
                    one = Scored(values, kept)
                    self._save(subject, key, one)
                place.append(one)
        inside, beyond = (_paired(*pair) for pair in sure)
        return shift.compared(inside, beyond, outside.name, softmax, self.seed)

    # Cells on disk.

    def _place(self, subject: Subject, key: str) -> Path:
        return self.folder / subject.name / key

    def _saved(self, subject: Subject, key: str) -> Scored | None:
        path = self._place(subject, key) / SCORES
        if not path.exists():
            return None
        arrays = load_file(path)
        return Scored(arrays["values"], arrays["kept"], arrays.get("weights"), arrays.get("clusters"))

    def _save(self, subject: Subject, key: str, scored: Scored) -> None:
        arrays = {"values": scored.values, "kept": scored.kept, "weights": scored.weights, "clusters": scored.clusters}
        with writing_folder(self._place(subject, key)) as beside:
            save_file({name: np.ascontiguousarray(a) for name, a in arrays.items() if a is not None}, beside / SCORES)


def some(examples: Examples, samples: int, seed: int) -> Examples:
    """At most so many examples, chosen by the seed, in the order of the data."""
    if samples >= len(examples):
        return examples
    chosen = np.random.default_rng([seed, len(examples)]).choice(len(examples), size=samples, replace=False)
    return examples.take(sorted(int(i) for i in chosen))


def model_side(processor: Processor) -> int:
    """The shorter side, in pixels, that larger pictures are brought to: what the model takes, or `USUAL_SIDE`."""
    family, config = processor.family, processor.config
    if family is None or config is None or family.media_shapes_vary or "image" not in family.media:
        return USUAL_SIDE
    example = family.example_batch(config, 1).get("pixel_values")
    return int(min(example.shape[-2:])) if example is not None and example.dim() == 4 else USUAL_SIDE


def same_media(one: Processor, other: Processor) -> bool:
    """Whether two models are given the same tensors of a picture or recording."""

    def settings(processor: Processor) -> list[Any]:
        parts = (processor.image_processor, processor.feature_extractor)
        name = None if processor.family is None else processor.family.name
        return [name, *(None if part is None else part.to_dict() for part in parts)]

    return bool(settings(one) == settings(other)) and model_side(one) == model_side(other)


def scale_of(model: CompressedModel) -> tuple[float, float | None]:
    """A dual encoder's factor on cosine similarities, and what it adds to the product."""
    with torch.no_grad():
        found = model.family.forward(model.module, {})
    return float(found.logit_scale), None if found.logit_bias is None else float(found.logit_bias)


def numbered(clusters: np.ndarray | None) -> np.ndarray | None:
    """Clusters as numbers from 0, (N,): names of speakers are none."""
    return None if clusters is None else np.unique(clusters, return_inverse=True)[1].reshape(-1)


def _paired(one: Scored, other: Scored) -> tuple[np.ndarray, np.ndarray]:
    """The values of the examples that both models could read."""
    common = np.intersect1d(one.kept, other.kept)
    return one.values[np.searchsorted(one.kept, common)], other.values[np.searchsorted(other.kept, common)]
