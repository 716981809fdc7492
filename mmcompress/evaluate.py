"""A recipe's task on any model: for ``mmcompress eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tabulate import tabulate

from mmcompress.config import resolve
from mmcompress.data.sources import load_source
from mmcompress.errors import ModelError
from mmcompress.measure.clusters import clustered
from mmcompress.measure.quality import class_scores, qualities
from mmcompress.model import load
from mmcompress.processor import load_processor
from mmcompress.progress import SILENT, Reporter
from mmcompress.recipe import Recipe
from mmcompress.robust import render_robustness, robustness_of_model
from mmcompress.runtimes.base import Predict
from mmcompress.runtimes.onnx_predict import OnnxPredict
from mmcompress.runtimes.torch_predict import TorchPredict


def evaluate_model(recipe: Recipe, source: str, *, robustness: bool = False, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Scores a model folder, a hub id or a folder with ONNX components.

    A folder that holds weights is run by torch; one that holds only ``.onnx`` files (beside the tokenizer and image processor)
    by ONNX Runtime.

    Args:
        robustness: score it under the conditions of ``report.robustness`` too, the default ones where the recipe has none.
    """
    where = resolve(source)
    examples = load_source(recipe.data.eval, "eval", recipe.seed)
    examples.narrow(recipe.task.roles, recipe.task.type, recipe.task.optional)
    predict: Predict
    if isinstance(where, Path) and is_onnx_folder(where):
        predict, processor = OnnxPredict(where), load_processor(where)
    else:
        model = load(source, trust_remote_code=recipe.trust_remote_code)
        predict, processor = TorchPredict(model, recipe.report.device), model.processor
    if processor.family is not None:
        recipe.task.fits(processor.family.abilities, processor.family.name)
    scores = clustered(recipe.task.evaluate(predict, processor, examples, SILENT), examples)
    return {
        "model": source,
        "runtime": predict.runtime,
        "task": recipe.task.type,
        "data": examples.name,
        "synthetic": examples.synthetic or source.startswith("bundled:"),
        "quality": {k: v.model_dump() for k, v in qualities(scores).items()},
        "lower_is_better": sorted(recipe.task.lower_is_better),
        "classes": {k: v.model_dump() for k, v in class_scores(scores).items()},
        "skipped": scores.skipped,
        **({"robustness": robustness_of_model(recipe, predict, processor, examples, reporter)} if robustness else {}),
    }


def is_onnx_folder(folder: Path) -> bool:
    """True for a folder with ONNX components and no weights.

    Raises:
        ModelError: the folder holds neither.
    """
    if any(folder.glob("*.safetensors")):
        return False
    if any(folder.glob("*.onnx")) or any((folder / "onnx").glob("*.onnx")):
        return True
    if not (folder / "config.json").exists():
        raise ModelError(f"model {folder}: holds neither config.json with safetensors nor ONNX components")
    return False


def render_evaluation(found: dict[str, Any]) -> str:
    """The same as text."""
    rows = [
        [_titled(name, found), f"{100 * q['value']:.2f}", f"{100 * q['low']:.2f} to {100 * q['high']:.2f}", q["n"]]
        for name, q in found["quality"].items()
    ]
    lines = [f"{found['model']} ({found['runtime']}) on {found['data']}{' (synthetic)' if found['synthetic'] else ''}", ""]
    lines.append(tabulate(rows, headers=["metric", "percent", "95% interval", "n"], disable_numparse=True))
    if found["classes"]:
        worst = sorted(found["classes"].items(), key=lambda kv: (kv[1]["recall"] is None, kv[1]["recall"]))[:5]
        shown = [[k, _percent(c["precision"]), _percent(c["recall"]), c["n"]] for k, c in worst]
        lines += ["", "lowest recall:", tabulate(shown, headers=["class", "precision", "recall", "n"], disable_numparse=True)]
    if "robustness" in found:
        lines += ["", render_robustness(found["robustness"], next(iter(found["quality"])))]
    if found["skipped"]:
        lines.append(f"\n{found['skipped']} examples were skipped: they do not decode")
    return "\n".join(lines)


def _titled(name: str, found: dict[str, Any]) -> str:
    return f"{name} (lower is better)" if name in found["lower_is_better"] else name


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
