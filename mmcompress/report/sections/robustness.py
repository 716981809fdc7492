"""What damaged inputs, attacks and foreign data cost the compressed model, beside what they cost the baseline."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from markupsafe import Markup

from mmcompress.report.alerts import Alert
from mmcompress.report.format import MISSING, MetricFormat, metric_format
from mmcompress.report.multiples import Line, multiple
from mmcompress.report.plots import marker
from mmcompress.report.schema import Report
from mmcompress.report.schema_robustness import Condition, Degree, Estimate, Robustness, Shift
from mmcompress.report.sections import Section
from mmcompress.report.tables import Cell, Table
from mmcompress.report.views import escape_markdown, html_table, markdown_table, nice, text_table

ORDER = 50
ANCHOR = "robustness"
WIDTH = 110
SHARE = MetricFormat("right", "percent", 1, higher_is_better=True)
SHAPES = {"torch": ("circle", 0), "onnxruntime": ("square", 1), "openvino": ("diamond", 2)}
GROUPS = {
    "media": "Damaged pictures or recordings",
    "text": "Damaged texts",
    "modality": "Missing and shuffled inputs",
    "attack": "Attacks",
}
NAMED = 4
"""An alert names so many conditions; the section has all of them."""
TONES = {"loses more": "bad", "loses less": "good", "no clear difference": ""}


def section(report: Report, folder: Path | None) -> Section | None:
    """Words, small pictures of the metric against severity, and tables; None where nothing of it was measured."""
    found = report.robustness
    if found is None:
        return None
    fmt = metric_format(report, found.metric)
    said, tables = words(found, fmt), _tables(found, fmt)
    lead, *rest = [Markup("<p>{}</p>").format(nice(text)) for text in said] or [Markup("")]
    html = Markup("").join([lead, pictures(found, fmt), *rest, *(html_table(table, (0,)) for table in tables)])
    lines = [textwrap.fill(text, WIDTH, initial_indent="- ", subsequent_indent="  ") for text in said]
    return Section(
        ANCHOR,
        "Robustness and shift",
        html,
        "\n\n".join(
            ["\n".join(f"- {escape_markdown(text)}" for text in said)]
            + [f"#### {table.caption}\n\n{markdown_table(table)}" for table in tables]
        ),
        "\n\n".join(["\n".join(lines), *(f"{table.caption}\n{_short(table)}" for table in tables)]),
    )


def alerts(report: Report) -> list[Alert]:
    """Damage that the compressed model stands clearly less well than the baseline, and media that do not matter."""
    found = report.robustness
    if found is None:
        return []
    fmt = metric_format(report, found.metric)
    said = []
    worse = _worse([c for c in found.conditions if c.group in ("media", "text")])
    if worse:
        said.append(Alert("bad", f"Compression cost robustness that clean examples do not show. {_named(worse, fmt, found.n)}"))
    attacked = _worse(found.attacks)
    if attacked:
        said.append(Alert("bad", f"The compressed model is easier to attack. {_named(attacked, SHARE, found.attack_n)}"))
    said += [Alert("bad", f"The compressed model could not be scored: {note}") for note in found.notes if found.final in note]
    for condition in found.conditions:
        degree = condition.degrees[0]
        if condition.name.startswith("shuffled") and degree.final_drop.low <= 0:
            said.append(Alert("caution", _ignored(condition, degree, found, fmt)))
    if found.shift is not None and found.shift.auroc["difference"].high < 0:
        said.append(Alert("caution", f"Confidence says less about foreign data than before. {_shift_words(found.shift)}"))
    return said


def _worse(conditions: Sequence[Condition]) -> list[Condition]:
    return sorted((c for c in conditions if c.verdict == "loses more"), key=lambda c: -c.extra.value)


def _named(worse: Sequence[Condition], fmt: MetricFormat, n: int) -> str:
    """``To darkness it loses 13.5 points more than the baseline does (...)``."""
    parts = [f"{_title(c)} {_amount(c.extra.value, fmt)} more ({_interval(c.extra, fmt)})" for c in worse[:NAMED]]
    rest = f", and more to {len(worse) - NAMED} others" if len(worse) > NAMED else ""
    where = f"means over severities, 95% intervals, n = {n:,}"
    return f"It loses more than the baseline itself does to {'; to '.join(parts)}{rest}: {where}."


def _ignored(condition: Condition, degree: Degree, found: Robustness, fmt: MetricFormat) -> str:
    what = "questions" if condition.name.endswith("text") else "pictures or recordings"
    also = "; nor does it the baseline's" if degree.baseline_drop.low <= 0 else ""
    return (
        f"The compressed model may not look at the {what}: giving every example those of another one does not clearly lower its "
        f"{fmt.name} ({fmt.value(found.clean['final'].value)} before, {fmt.value(degree.final.value)} after){also}."
    )


def words(found: Robustness, fmt: MetricFormat) -> list[str]:
    """The section in sentences."""
    said = []
    damaged = [c for c in found.conditions if c.group in ("media", "text")]
    if damaged:
        worse, better = _worse(damaged), [c for c in damaged if c.verdict == "loses less"]
        before, after = fmt.value(found.clean["baseline"].value), fmt.value(found.clean["final"].value)
        said.append(
            f"Of {len(damaged)} kinds of damage {len(worse) or 'none'} cost the compressed model ({found.final}) clearly more "
            f"than the baseline ({found.baseline}), and {len(better) or 'none'} clearly less. What is compared is each model's "
            f"loss of {fmt.name} against its own clean value (baseline {before}, compressed {after}), on the same {found.n:,} "
            f"examples, damaged in the same way; p-values are adjusted by Holm's method. Intervals are over examples: noise, "
            f"typos and angles were drawn once."
        )
        if worse:
            said.append(_named(worse, fmt, found.n))
    said += _ratios(found)
    for condition in found.conditions:
        if condition.group == "modality":
            one, two = (fmt.value(e.value) for e in (condition.degrees[0].baseline, condition.degrees[0].final))
            what = f"{_title(condition).capitalize()} ({condition.description})"
            said.append(f"{what}: {fmt.name} {one} for the baseline, {two} for the compressed model.")
    if found.attacks:
        one, two = (SHARE.value(e.value) for e in (found.attack_clean["baseline"], found.attack_clean["final"]))
        said.append(
            f"Attacks follow each model's own gradient in torch; a model with ONNX files is attacked as the torch model that "
            f"they were made from. Of {found.attack_n:,} examples {one} (baseline) and {two} (compressed) are right before."
        )
    if found.shift is not None:
        said.append(_shift_words(found.shift))
    return said + found.notes


def _ratios(found: Robustness) -> list[str]:
    said = []
    if found.mean_error_ratio is not None:
        said.append(
            f"Mean corruption error, the compressed model's errors over the baseline's: {_ratio(found.mean_error_ratio)}; below "
            f"1 is fewer (Hendrycks and Dietterich 2019, with the baseline in the place of AlexNet)."
        )
    if found.mean_drop_ratio is not None:
        said.append(
            f"Relative mean corruption error, the same of losses against clean examples, over the {found.drop_ratio_over} "
            f"corruptions that the baseline clearly loses to: {_ratio(found.mean_drop_ratio)}."
        )
    return said


def _ratio(found: Estimate) -> str:
    return f"{found.value:.2f} (95% interval {found.low:.2f} to {found.high:.2f})"


def _shift_words(shift: Shift) -> str:
    score = "class probability" if shift.score == "softmax" else "similarity"
    area, change = shift.auroc, shift.auroc["difference"]
    one, two = (SHARE.value(e.value) for e in (shift.fpr95["baseline"], shift.fpr95["final"]))
    return (
        f"A model's largest {score} tells the task's {shift.n_inside:,} examples from {shift.n_outside:,} of {shift.data} with "
        f"an AUROC of {area['baseline'].value:.3f} for the baseline and {area['final'].value:.3f} for the compressed model "
        f"(difference {change.value:+.3f}, 95% interval {change.low:+.3f} to {change.high:+.3f}; 0.5 is chance). At a threshold "
        f"that 95% of its own examples pass, {one} (baseline) and {two} (compressed) of the others pass too."
    )


def pictures(found: Robustness, fmt: MetricFormat) -> Markup:
    """The metric against severity, a small picture for each corruption; all share their axes."""
    graded = [c for c in found.conditions if c.degrees[0].severity > 0]
    parts = []
    if graded:
        parts.append(_grid(graded, found.clean, fmt, found))
    if found.attacks:
        parts.append(_grid(found.attacks, found.attack_clean, SHARE, found))
    return Markup("").join(parts)


def _grid(
    conditions: Sequence[Condition], clean: Mapping[Literal["baseline", "final"], Estimate], fmt: MetricFormat, found: Robustness
) -> Markup:
    runtime = found.final.rpartition(".")[2] if conditions[0].group != "attack" else "torch"
    shape, series = SHAPES.get(runtime, SHAPES["torch"])
    seen = [e for c in conditions for d in c.degrees for e in (d.baseline, d.final)] + list(clean.values())
    span = (fmt.scale * min(e.low for e in seen), fmt.scale * max(e.high for e in seen))
    figures = []
    for condition in conditions:
        lines = [
            Line(
                "baseline",
                [_scaled(e, fmt) for e in (clean["baseline"], *(d.baseline for d in condition.degrees))],
                8,
                hollow=True,
            ),
            Line("compressed", [_scaled(e, fmt) for e in (clean["final"], *(d.final for d in condition.degrees))], series, shape),
        ]
        degrees = ["0", *(f"{d.severity:g}" for d in condition.degrees)]
        picture = multiple(
            lines,
            degrees,
            f"{fmt.title} under {_title(condition)} against severity; 0 is clean",
            f"{ANCHOR}-{condition.name}",
            span,
            lambda value: f"{value:.{fmt.decimals}f}",
        )
        caption = Markup("<figcaption><b>{}</b>: {}</figcaption>").format(_title(condition), nice(_verdict(condition, fmt)))
        figures.append(Markup("<figure>{}{}</figure>").format(picture, caption))
    axis = "distance in 255ths" if conditions[0].group == "attack" else "severity"
    return Markup(
        '<ul class="legend"><li>{}baseline</li><li>{}compressed</li>'
        '<li>{} against {}; 0 is clean; bars are 95% intervals</li></ul><div class="multiples">{}</div>'
    ).format(marker("circle", 8, "hollow"), marker(shape, series), fmt.title, axis, Markup("").join(figures))


def _scaled(e: Estimate, fmt: MetricFormat) -> tuple[float, float, float]:
    return fmt.scale * e.value, fmt.scale * e.low, fmt.scale * e.high


def _verdict(condition: Condition, fmt: MetricFormat) -> str:
    if condition.verdict == "no clear difference":
        return f"no clear difference ({_interval(condition.extra, fmt)})"
    return f"{condition.verdict} than the baseline, {_amount(abs(condition.extra.value), fmt)}"


def _tables(found: Robustness, fmt: MetricFormat) -> list[Table]:
    tables = []
    for group, caption in GROUPS.items():
        own = [c for c in (*found.conditions, *found.attacks) if c.group == group]
        if own:
            tables.append(_table(group, caption, own, SHARE if group == "attack" else fmt))
    return tables


def _table(group: str, caption: str, conditions: Sequence[Condition], fmt: MetricFormat) -> Table:
    name = "right" if group == "attack" else fmt.name
    ratios = any(c.error_ratio is not None for c in conditions)
    columns = [
        ("", "condition"),
        (f"{name} at the strongest", "baseline"),
        (f"{name} at the strongest", "compressed"),
        ("mean loss", "baseline"),
        ("mean loss", "compressed"),
        ("mean loss", "more by"),
        ("", "p, adjusted"),
        *([("corruption error", "whole"), ("corruption error", "relative")] if ratios else []),
        ("", "verdict"),
    ]
    rows = []
    for c in conditions:
        last = c.degrees[-1]
        strongest = last.strength or (f"severity {last.severity:g}" if last.severity else "")
        rows.append(
            (
                Cell(_title(c), (c.description,)),
                Cell(fmt.value(last.baseline.value), (strongest,)),
                Cell(fmt.value(last.final.value), (strongest,)),
                Cell(fmt.bare(_mean([d.baseline_drop.value for d in c.degrees]))),
                Cell(fmt.bare(_mean([d.final_drop.value for d in c.degrees]))),
                Cell(fmt.signed(c.extra.value), (_interval(c.extra, fmt),), "" if group == "modality" else TONES[c.verdict]),
                Cell(f"{c.p_adjusted:.3f}" if c.p_adjusted >= 0.001 else "< 0.001"),
                *([Cell(_number(c.error_ratio)), Cell(_number(c.drop_ratio))] if ratios else []),
                Cell(c.verdict),
            )
        )
    note = f"Losses in {fmt.unit or 'units of the metric'}, over severities, positive is worse; small print is the 95% interval."
    if ratios:
        note += " Corruption errors are over the baseline's; the relative ones of losses, where the baseline clearly loses."
    return Table(f"{ANCHOR}-{group}", caption, tuple(columns), tuple(rows), words=(0, len(columns) - 1), note=note)


def _short(table: Table) -> str:
    """The table for terminals: losses and verdicts alone."""
    rows = tuple((Cell(row[0].text), *row[1:]) for row in table.rows)
    return text_table(replace(table, rows=rows), [0, 3, 4, 5, len(table.columns) - 1])


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _title(condition: Condition) -> str:
    return condition.name.upper() if condition.name in ("jpeg", "fgsm", "pgd") else condition.name.replace("-", " ")


def _amount(value: float, fmt: MetricFormat) -> str:
    return f"{fmt.bare(value)} {fmt.unit}".rstrip()


def _interval(e: Estimate, fmt: MetricFormat) -> str:
    return f"{fmt.signed(e.low)} to {fmt.signed(e.high)}"
