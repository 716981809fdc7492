"""How far the models' confidence can be believed: calibration numbers and reliability diagrams, before and after."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from mmcompress.report.alerts import Alert
from mmcompress.report.format import MISSING, baseline_row, final_row
from mmcompress.report.reliability import reliability
from mmcompress.report.schema import Report, Row
from mmcompress.report.schema_behaviour import Calibration, CalibrationNumbers
from mmcompress.report.sections import Run, Section
from mmcompress.report.sections._estimates import PERCENT, cell, interval, number
from mmcompress.report.tables import Cell, Table
from mmcompress.report.views import escape_markdown, html_table, markdown_table, nice, text_table

ORDER = 30
ANCHOR = "calibration"
WIDTH = 110
NOTABLE, BAD = 0.02, 0.05
"""From these changes of confidence less accuracy on, an alert is raised, and is red."""
NUMBERS = (
    ("over_confidence", "confidence less accuracy, points", PERCENT, 1),
    ("ece", "calibration error (ECE), %", PERCENT, 1),
    ("ece_adaptive", "adaptive ECE, %", PERCENT, 1),
    ("brier", "Brier score", 1.0, 3),
    ("nll", "negative log-likelihood, nats", 1.0, 3),
)
SERIES = {"torch": 0, "onnxruntime": 1, "openvino": 2}


def section(report: Report, folder: Path | None) -> Section | None:
    """Numbers and diagrams of the baseline and of the final model; None where neither has probabilities."""
    before, after = _of(baseline_row(report)), _of(final_row(report))
    if before is None and after is None:
        return None
    table, said = _table(before, after), words(before, after)
    html = Markup("").join(Markup("<p>{}</p>").format(nice(text)) for text in said)
    html += _pictures(report, before, after) + html_table(table)
    lines = [textwrap.fill(text, WIDTH, initial_indent="- ", subsequent_indent="  ") for text in said]
    markdown = ["\n".join(f"- {escape_markdown(text)}" for text in said), markdown_table(table), escape_markdown(table.note)]
    return Section(ANCHOR, "Calibration", html, "\n\n".join(markdown), "\n".join(lines) + "\n\n" + text_table(table))


def alerts(report: Report) -> list[Alert]:
    """A final model that is clearly more over- or under-confident than the baseline."""
    found = _of(final_row(report))
    change = found.changes.get("over_confidence") if found else None
    if found is None or change is None or change.low is None or change.high is None:
        return []
    own = found.as_it_is.over_confidence
    over = change.low > 0 and change.value >= NOTABLE and own.low is not None and own.low > 0
    under = change.high < 0 and change.value <= -NOTABLE and own.high is not None and own.high < 0
    if not over and not under:
        return []
    word, much = ("over-confident", "too sure") if over else ("under-confident", "too unsure")
    before = own.value - change.value
    ece = found.as_it_is.ece.value
    text = (
        f"The final model is {word}: its mean confidence is {found.confidence:.1%} and {found.accuracy:.1%} of its answers are "
        f"right, {abs(own.value) * 100:.1f} points {much} (the baseline: {number(before, PERCENT, 1, sign=True)}; change "
        f"{number(change.value, PERCENT, 1, sign=True)}, 95% interval {interval(change, PERCENT, 1, sign=True)}). Its "
        f"calibration error is {ece:.1%}"
    )
    if "ece" in found.changes:
        text += f", the baseline's {ece - found.changes['ece'].value:.1%}"
    if found.refitted is not None and found.refitted.ece.value < ece / 2:
        text += f"; dividing its logits by one temperature ({_temperature(found)}) brings it to {found.refitted.ece.value:.1%}"
    return [Alert("bad" if over and change.value >= BAD else "caution", text + ".")]


def words(before: Calibration | None, after: Calibration | None) -> list[str]:
    """The section in sentences."""
    said = []
    for name, found in (("The baseline", before), ("The final model", after)):
        if found is None:
            said.append(f"{name} has no probabilities to calibrate.")
            continue
        own = found.as_it_is
        refit = ""
        if found.refitted is not None:
            refit = (
                f" With one temperature refitted ({_temperature(found)}) the error is {found.refitted.ece.value:.1%}; each half "
                f"of the examples is scored with the temperature that was fitted on the other half."
            )
        said.append(
            f"{name} is right on {found.accuracy:.1%} of {found.n:,} examples at a mean confidence of {found.confidence:.1%}. "
            f"Its calibration error (ECE, 15 bins) is {own.ece.value:.1%}; a perfectly calibrated model would show "
            f"{found.ece_if_calibrated:.1%} on as many examples, since the error is biased upwards.{refit}"
        )
    return said


def _of(row: Row | None) -> Calibration | None:
    return row.behaviour.calibration if row is not None and row.behaviour is not None else None


def _temperature(found: Calibration) -> str:
    return " and ".join(dict.fromkeys(f"{t:.2f}" for t in found.temperatures))


def _pictures(report: Report, before: Calibration | None, after: Calibration | None) -> Markup:
    final = final_row(report)
    series = SERIES[final.runtime] if final is not None else 0
    figures = []
    for name, key, found, colour, hollow in (
        ("baseline", "before", before, 8, True),
        ("final model", "after", after, series, False),
    ):
        if found is None:
            continue
        for kind, numbers in (("as it is", found.as_it_is), ("temperature refitted", found.refitted)):
            if numbers is not None:
                ids = f"{ANCHOR}-{key}-{'refit' if numbers is found.refitted else 'own'}"
                picture = reliability(numbers.bins, f"Reliability of the {name}, {kind}", ids, colour, hollow)
                words_ = f"{name}, {kind}: ECE {numbers.ece.value:.1%}"
                figures.append(Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(picture, words_))
    return Markup(
        '<div class="multiples">{}</div><p class="small">A bar is the share of right answers in a bin of confidence, the line '
        "across it their mean confidence; bars below their line are over-confident. Below stands how many answers are in each "
        "bin.</p>"
    ).format(Markup("").join(figures))


def _table(before: Calibration | None, after: Calibration | None) -> Table:
    sets: list[tuple[str, str, CalibrationNumbers | None]] = []
    for name, found in (("baseline", before), ("final", after)):
        if found is not None:
            sets += [(name, "as it is", found.as_it_is), (name, "refitted", found.refitted)]
    columns = [("", "95% intervals below"), *((name, kind) for name, kind, _ in sets), ("final, as it is", "change")]
    rows = []
    for key, title, scale, decimals in NUMBERS:
        cells = [
            cell(getattr(numbers, key) if numbers else None, scale, decimals, key == "over_confidence") for *_, numbers in sets
        ]
        change = after.changes.get(key) if after else None
        tone = ""
        if change is not None and change.low is not None and change.high is not None and key in ("brier", "nll"):
            tone = "bad" if change.low > 0 else "good" if change.high < 0 else ""
        rows.append((Cell(title), *cells, cell(change, scale, decimals, sign=True, tone=tone) if change else Cell(MISSING)))
    return Table(
        "calibration",
        "Confidence against what is right",
        tuple(columns),
        tuple(rows),
        words=(0,),
        note="Confidence is the largest class probability: the softmax over the classes of the model's scaled similarities, for "
        "models with a sigmoid too. Brier scores go from 0 to 2. Changes are paired with the baseline as it is; against a well "
        "calibrated baseline the change of the ECE is understated.",
    )


def compare(runs: Sequence[Run]) -> Section | None:
    """The calibration of each run's final model."""
    rows = []
    for run in runs:
        found = _of(final_row(run.report))
        if found is not None:
            numbers = [cell(getattr(found.as_it_is, k), s, d, k == "over_confidence") for k, _, s, d in NUMBERS]
            refit = cell(found.refitted.ece, PERCENT, 1) if found.refitted else Cell(MISSING)
            rows.append((Cell(run.name), *numbers, refit, Cell(f"{found.n:,}")))
    if not rows:
        return None
    heads = ("run", *(title for _, title, *_ in NUMBERS), "ECE with temperature refitted, %", "n")
    table = Table("calibration", "Calibration", tuple(("", h) for h in heads), tuple(rows), words=(0,))
    return Section(ANCHOR, "Calibration", html_table(table), markdown_table(table), text_table(table))
