"""The model card: a README.md with Hugging Face metadata that says only what was measured or written in the recipe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from mmcompress.report.format import BASELINE, RUNTIMES, fill_template, final_row, headline_metric, row_name, speeds
from mmcompress.report.html import subtitle
from mmcompress.report.licences import card_datasets, card_licence, is_hub_id, licence_words
from mmcompress.report.markdown import MARKS, cost_table, results_table
from mmcompress.report.schema import Report, Row
from mmcompress.report.sections import all_sections
from mmcompress.report.sections.data import ANCHOR, origins_table
from mmcompress.report.summary import summary_table
from mmcompress.report.text import SYNTHETIC, bad_news, gate_words, speed_words
from mmcompress.report.views import escape_markdown, fence, markdown_table


def render_card(report: Report) -> str:
    """The model card of a run, for the run's own folder."""
    final, model = final_row(report), _model_row(report)
    shown = [row for row in report.rows if row.step == BASELINE or (final is not None and row.step == final.step)]
    made = cost_table(report)
    values = {
        "metadata": yaml.safe_dump(metadata(report), sort_keys=False, allow_unicode=True, width=110),
        "report": report,
        "synthetic": SYNTHETIC if report.totals.synthetic else "",
        "subtitle": subtitle(report),
        "alerts": bad_news(report),
        "gates": gate_words(report),
        "speeds": [speed_words(report, s) for s in speeds(report) if s.ratio is not None],
        "model_class": report.model_class or "AutoModel",
        "loads_with": model.loads_with if model else "",
        "has_onnx": final is not None and any(r.runtime != "torch" for r in shown if r.step == final.step),
        "final": row_name(final) if final else "",
        "summary": markdown_table(summary) if (summary := summary_table(report)) else "",
        "parts": [
            (s.title, without_examples(s.markdown)) for s in all_sections(report, None) if s.markdown and s.anchor != ANCHOR
        ],
        "marks": MARKS,
        "results": markdown_table(results_table(report.model_copy(update={"rows": shown}))) if shown else "",
        "licence": licence_words(report.origins),
        "origins": markdown_table(table) if (table := origins_table(report.origins)) else "",
        "made": markdown_table(made) if made else "",
        "environment": [(k, v) for k, v in report.environment.items() if not isinstance(v, dict | list)],
    }
    filters = {"md": escape_markdown, "fence": fence}
    return re.sub(r"\n{3,}", "\n\n", fill_template("card.md.j2", filters, values)).strip() + "\n"


def without_examples(markdown: str) -> str:
    """A part of the report without the examples that it lists: a card is published, and the data may not be."""
    return re.sub(r"#### [^\n]*: examples\n.*?(?=\n#### |\Z)", "", markdown, flags=re.DOTALL)


def metadata(report: Report) -> dict[str, Any]:
    """The card's YAML header, as https://huggingface.co/docs/hub/model-cards describes it.

    ``base_model`` and ``datasets`` are written only where hub ids are known, and licences are never guessed.
    """
    recipe = report.recipe
    model, task = str(recipe.get("model", "")), recipe.get("task")
    kind = str(task.get("type", "")) if isinstance(task, dict) else ""
    kept = _kept_passes(report)
    found: dict[str, Any] = card_licence(report.origins)
    last = _model_row(report)
    if last is None or last.loads_with == "transformers":
        found["library_name"] = "transformers"
    base = next((o.hub_id for o in report.origins if o.role == "model"), model if is_hub_id(model) else None)
    if base is not None:
        found["base_model"] = base
        if "quantize" in kept:
            found["base_model_relation"] = "quantized"
    if used := card_datasets(report.origins):
        found["datasets"] = used
    if kind:
        found["pipeline_tag"] = kind
    runtimes = {row.runtime for row in report.rows if not row.rolled_back and row.step != BASELINE}
    extra = [tag for tag, runtime in (("onnx", "onnxruntime"), ("openvino", "openvino")) if runtime in runtimes]
    found["tags"] = list(dict.fromkeys(["mmcompress", *kept, *extra, *(["synthetic"] if report.totals.synthetic else [])]))
    results = _results(report, kind)
    if results:
        found["model-index"] = [{"name": report.name, "results": results}]
    return found


def _results(report: Report, kind: str) -> list[dict[str, Any]]:
    final = final_row(report)
    if final is None or not final.quality:
        return []
    data = report.recipe.get("data")
    held_out = data.get("eval") if isinstance(data, dict) else None
    source = held_out if isinstance(held_out, dict) else {"path": held_out}
    name = str(source.get("path") or "not recorded")
    hub = next((o.hub_id for o in report.origins if o.role == "eval"), None)
    # A card is made to be shown: where data lies on one's own machine is nobody's business.
    name = hub or (Path(name).name if Path(name).is_absolute() else name)
    kind_of_data = hub or re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name).stem).strip("-") or "own-data"
    data_set = {"name": name, "type": kind_of_data} | {key: source[key] for key in ("config", "split") if source.get(key)}
    headline = headline_metric(report)
    metrics = [
        {
            "type": metric,
            "value": round(quality.value, 6),
            "name": f"{metric} ({RUNTIMES[final.runtime]}, {final.precision}, n = {quality.n})",
            "args": {"low": round(quality.low, 6), "high": round(quality.high, 6), "n": quality.n},
        }
        for metric, quality in sorted(final.quality.items(), key=lambda item: item[0] != headline)
    ]
    return [{"task": {"type": kind or "other"}, "dataset": data_set, "metrics": metrics}]


def _kept_passes(report: Report) -> list[str]:
    """The names of the passes whose step was measured and not undone; steps are called ``<number>-<pass>``."""
    steps = {row.step for row in report.rows if not row.rolled_back and row.step != BASELINE}
    return list(dict.fromkeys(step.split("-", 1)[-1] for step in sorted(steps, key=_number)))


def _number(step: str) -> tuple[int, str]:
    head = step.split("-", 1)[0]
    return (int(head) if head.isdigit() else 0, step)


def _model_row(report: Report) -> Row | None:
    """The row of what lies in ``model/``: the last torch model that was kept."""
    rows = [row for row in report.rows if row.runtime == "torch" and not row.rolled_back and row.step != BASELINE]
    return rows[-1] if rows else None
