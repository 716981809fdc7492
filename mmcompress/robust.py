"""What a recipe asks to know of robustness, for a run's models and in the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from mmcompress.data.examples import Examples
from mmcompress.errors import ModelError
from mmcompress.measure.clusters import clustered
from mmcompress.measure.corruptions.cells import CLEAN, altered, planned, strength
from mmcompress.measure.paired_drops import Drops, Scored
from mmcompress.measure.robustness import RobustnessMeter, Subject, model_side, numbered, some
from mmcompress.model import CompressedModel, load
from mmcompress.processor import Processor
from mmcompress.progress import Reporter
from mmcompress.recipe import Recipe
from mmcompress.report.schema import Row
from mmcompress.report.schema_robustness import Robustness
from mmcompress.robustness_settings import Robustness as Settings
from mmcompress.runtimes.base import Predict
from mmcompress.runtimes.onnx_predict import OnnxPredict
from mmcompress.runtimes.torch_predict import TorchPredict

CELLS = "robustness"


def robustness_of_run(
    recipe: Recipe, folder: Path, data: Mapping[str, Examples], baseline: Row, final: Row, reporter: Reporter
) -> Robustness | None:
    """The baseline in torch against the final model in the runtime that it is shipped for; None where nothing is asked for.

    Args:
        folder: the run's.
        data: ``eval``, and ``ood`` where the recipe has it.
    """
    outside = data.get("ood")
    if recipe.report.robustness is None and outside is None:
        return None
    if final.step == baseline.step:
        reporter.say("robustness: there is no compressed model to set beside the baseline; nothing is measured")
        return None
    meter = RobustnessMeter(
        recipe.task, data["eval"], recipe.report.robustness, outside, recipe.seed, folder / "measurements" / CELLS, reporter
    )
    reporter.say("robustness: measuring the baseline and the final model")
    return meter.measure(_subject(recipe, folder, baseline, "torch"), _subject(recipe, folder, final, final.runtime))


def _subject(recipe: Recipe, folder: Path, row: Row, runtime: str) -> Subject:
    place, device = folder / row.folder, recipe.report.device
    # A step that leaves torch weights alone has its ONNX components beside them; what was only exported to be timed is gone.
    onnx = runtime == "onnxruntime" and (place / "onnx").is_dir()

    def predict(model: CompressedModel) -> Predict:
        return OnnxPredict(place, recipe.report.threads) if onnx else TorchPredict(model, device)

    return Subject(f"{row.step}.{'onnxruntime' if onnx else 'torch'}", lambda: load(place), predict, device)


def robustness_plan(recipe: Recipe) -> list[str]:
    """What it will take, a line each; none where nothing is asked for."""
    settings = recipe.report.robustness
    lines = []
    if settings is not None:
        cells = planned(settings, recipe.task)
        lines.append(
            f"robustness: {1 + len(cells)} evaluations each of the baseline and the final model, on {settings.samples:,} "
            f"examples: clean, {', '.join(dict.fromkeys(cell.name for cell in cells))}"
        )
        if settings.adversarial is not None:
            attack = settings.adversarial
            lines.append(
                f"attacks: FGSM and PGD ({attack.steps} steps) at {', '.join(f'{eps:g}' for eps in attack.eps)} 255ths on "
                f"{attack.samples:,} examples, where the model's pixels have gradients (dual encoders)"
            )
    if recipe.data.ood is not None:
        lines.append("shift: AUROC and FPR95 of the baseline's and the final model's confidence against data.ood")
    return lines


def robustness_of_model(
    recipe: Recipe, predict: Predict, processor: Processor, examples: Examples, reporter: Reporter
) -> list[dict[str, Any]]:
    """One model by itself under all conditions but attacks: plain data, a line for each, with what is lost against the clean one.

    Args:
        examples: those of ``data.eval``.
    """
    settings = recipe.report.robustness or Settings.model_validate({})
    task, metric = recipe.task, next(iter(recipe.task.metrics))
    own = some(examples, settings.samples, recipe.seed)
    cells = [CLEAN, *planned(settings, task)]
    scored: dict[tuple[int, Any], Scored] = {}
    for cell in reporter.track(cells, "robustness", len(cells)):
        view = altered(own, cell, task, recipe.seed, model_side(processor))
        scores = clustered(task.evaluate(predict, processor, view, reporter), own)
        if scores.kept is None:
            raise ModelError(f"{task.type} does not say which examples it scored")
        one = Scored(scores.per_example[metric], scores.kept, scores.weights.get(metric), numbered(scores.clusters))
        scored |= {(0, cell): one, (1, cell): one}
    drops = Drops(scored, CLEAN, metric in task.lower_is_better, recipe.seed)
    return [
        {
            "condition": cell.name,
            "severity": cell.severity,
            "strength": strength(cell),
            "n": drops.n,
            metric: drops.metric(0, cell).model_dump(),
            "drop": None if cell is CLEAN else drops.drop(0, cell).estimate(drops.n).model_dump(),
        }
        for cell in cells
    ]


def render_robustness(found: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The same as a table; losses are positive where the model is worse than on clean examples."""
    rows = [
        [
            line["condition"],
            line["strength"] or line["severity"] or "",
            f"{100 * line[metric]['value']:.1f}",
            f"{100 * line['drop']['value']:+.1f}" if line["drop"] else "",
            f"{100 * line['drop']['low']:+.1f} to {100 * line['drop']['high']:+.1f}" if line["drop"] else "",
        ]
        for line in found
    ]
    headers = ["condition", "severity", metric, "loss, points", "95% interval"]
    return f"{found[0]['n']:,} examples under each condition:\n" + tabulate(rows, headers=headers, disable_numparse=True)
