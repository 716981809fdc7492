"""What a recipe asks to know of robustness, for a run's models and in the plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmcompress.data.examples import Examples
from mmcompress.measure.corruptions.cells import planned
from mmcompress.measure.robustness import RobustnessMeter, Subject
from mmcompress.model import CompressedModel, load
from mmcompress.progress import Reporter
from mmcompress.recipe import Recipe
from mmcompress.report.schema import Row
from mmcompress.report.schema_robustness import Robustness
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
