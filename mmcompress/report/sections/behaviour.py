"""What changed underneath the quality numbers: flips with examples, the worst slices, agreement, drift and alignment."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from mmcompress.report.alerts import Alert
from mmcompress.report.format import MISSING, MetricFormat, final_row, headline_metric, metric_format, row_name
from mmcompress.report.schema import Report
from mmcompress.report.schema_behaviour import Behaviour, Slice, Slices
from mmcompress.report.sections import Run, Section
from mmcompress.report.sections._estimates import PERCENT, cell, interval, number, share
from mmcompress.report.sections._gallery import gallery_html, gallery_markdown
from mmcompress.report.tables import Cell, Table
from mmcompress.report.views import escape_markdown, html_table, markdown_table, nice, text_table

ORDER = 20
ANCHOR = "underneath"
WIDTH = 110
NAMED = 3
"""So many failing slices are named on the first screen; the table has all of them."""
MANY_FLIPS = 0.1
"""A share of answers that turned right or wrong which a reader would not expect behind an unchanged metric."""


def section(report: Report, folder: Path | None) -> Section | None:
    """Sentences, the gallery, and tables; None where the final model was not compared with the baseline."""
    row = final_row(report)
    found = row.behaviour if row else None
    if row is None or found is None or found.flips is None:
        return None
    said, parts = words(found, row_name(row)), tables(found, report)
    html = Markup("").join(Markup("<p>{}</p>").format(nice(text)) for text in said)
    html += gallery_html(found.gallery, folder, ANCHOR)
    html += Markup("").join(html_table(table, (0,)) for table in parts)
    left = Markup("").join(Markup("<li>{}</li>").format(text) for text in found.left_out)
    html += Markup('<ul class="small">{}</ul>').format(left) if left else Markup("")
    markdown = ["\n".join(f"- {escape_markdown(text)}" for text in [*said, *found.left_out]), gallery_markdown(found.gallery)]
    markdown += [f"#### {table.caption}\n\n{markdown_table(table)}\n\n{escape_markdown(table.note)}".rstrip() for table in parts]
    lines = [textwrap.fill(text, WIDTH, initial_indent="- ", subsequent_indent="  ") for text in [*said, *found.left_out]]
    swapped = any(e.swapped for e in found.exchanged)
    shown = [table for table in parts if table.key in ("slices", "agreement") or (table.key == "exchanged" and swapped)]
    text = ["\n".join(lines), *(f"{table.caption}\n{text_table(table, _short(table))}" for table in shown)]
    return Section(ANCHOR, "What changed underneath", html, "\n\n".join(p for p in markdown if p), "\n\n".join(text))


def alerts(report: Report) -> list[Alert]:
    """Answers that look swapped, slices that lost clearly more than the rest, and flips that an unchanged metric hides."""
    row = final_row(report)
    found = row.behaviour if row else None
    if row is None or found is None:
        return []
    said, swapped = [], set()
    for e in found.exchanged:
        if e.swapped:
            swapped |= {f"class {e.one}", f"class {e.two}"}
            said.append(
                Alert(
                    "bad",
                    f"“{e.one}” and “{e.two}” look swapped: of {e.n_one:,} that the baseline calls {e.one} this model calls "
                    f"{e.one_as_two:,} {e.two}, and of {e.n_two:,} that it calls {e.two} this model calls {e.two_as_one:,} "
                    f"{e.one}.",
                )
            )
    if found.slices is not None:
        failing = [s for s in found.slices.worst if s.worse_than_rest and not (s.by == "class" and s.name in swapped)]
        fmt = metric_format(report, found.slices.metric)
        said += [Alert("bad", _failing(s, found.slices, fmt)) for s in failing[:NAMED]]
        if len(failing) > NAMED:
            said.append(Alert("bad", f"{len(failing) - NAMED} more slices lost clearly more than the rest; see the table."))
    said += _hidden_flips(report, found)
    return said


def _failing(s: Slice, slices: Slices, fmt: MetricFormat) -> str:
    rest = "" if s.rest is None else f", all others by {_points(s.rest, fmt)}"
    p = "below 0.001" if (s.p_adjusted or 0) < 0.001 else f"{s.p_adjusted:.3f}"
    return (
        f"Clearly worse on {s.name}: {fmt.name} {fmt.value(s.before)} to {fmt.value(s.after)} on {s.n:,} examples, changed by "
        f"{_points(s.change.value, fmt)} (95% interval {_ends(s, fmt)}){rest}. {slices.tested:,} slices were tested; "
        f"adjusted p {p}."
    )


def _points(value: float, fmt: MetricFormat) -> str:
    return f"{fmt.signed(value)} {fmt.unit}".rstrip()


def _ends(s: Slice, fmt: MetricFormat) -> str:
    return interval(s.change, fmt.scale, fmt.decimals, sign=True)


def _hidden_flips(report: Report, found: Behaviour) -> list[Alert]:
    row, metric = final_row(report), headline_metric(report)
    change = row.change.get(metric) if row else None
    if found.flips is None or change is None or change.verdict == "worse" or not found.flips.n:
        return []
    flips = found.flips.right_to_wrong + found.flips.wrong_to_right
    if flips < MANY_FLIPS * found.flips.n:
        return []
    return [
        Alert(
            "caution",
            f"Behind {metric} without a clear loss {flips / found.flips.n:.0%} of the answers turned: "
            f"{found.flips.right_to_wrong:,} from right to wrong, {found.flips.wrong_to_right:,} from wrong to right.",
        )
    ]


def words(found: Behaviour, name: str) -> list[str]:
    """The section in sentences."""
    said = []
    if found.flips is not None:
        f = found.flips
        other = "" if f.wrong_to_other is None else f" and {f.wrong_to_other:,} from one wrong answer to another"
        what = "answers" if f.wrong_to_other is not None else "answers turned right or wrong"
        said.append(
            f"Of {f.n:,} answers of {name}, {f.right_to_wrong:,} went from right to wrong, {f.wrong_to_right:,} from wrong to "
            f"right{other}: {share(f.share)} of all {what} changed. Right means: {f.right_means}."
        )
    if found.gallery:
        said.append(
            "Of each kind up to twelve examples are shown: half are those that the model is surest of, or whose score changed "
            "most; the other half are drawn at random."
        )
    if found.alignment is not None and found.alignment_change is not None:
        a, before = found.alignment, found.alignment_change.before
        gap = ""
        if a.gap is not None and before.gap is not None:
            gap = f" The gap between the two kinds of embeddings was {number(before.gap, 1, 2)} and is {number(a.gap, 1, 2)}."
        said.append(
            f"What belongs together is closer than what does not by a cosine of {number(before.margin.value)} before and "
            f"{number(a.margin.value)} now (change {number(found.alignment_change.margin.value, sign=True)}, 95% interval "
            f"{interval(found.alignment_change.margin, sign=True)}).{gap}"
        )
    return said


def tables(found: Behaviour, report: Report) -> list[Table]:
    """The tables of the section; those without rows are left out."""
    made = [_slices(found.slices, report), _exchanged(found), _agreement(found), _drift(found), _alignment(found)]
    return [table for table in made if table is not None and table.rows]


def _slices(slices: Slices | None, report: Report) -> Table | None:
    if slices is None:
        return None
    fmt = metric_format(report, slices.metric)
    rows = []
    for s in slices.worst:
        tone = "bad" if s.worse_than_rest else ""
        p = MISSING if s.p_adjusted is None else "< 0.001" if s.p_adjusted < 0.001 else f"{s.p_adjusted:.3f}"
        caveat = ("too few to say",) if s.small else ()
        rows.append(
            (
                Cell(s.name, tags=caveat),
                Cell(f"{s.n:,}"),
                Cell(fmt.value(s.before)),
                Cell(fmt.value(s.after)),
                Cell(fmt.signed(s.change.value), (_ends(s, fmt),), tone),
                Cell(MISSING if s.rest is None else fmt.signed(s.rest)),
                Cell(p),
            )
        )
    title = f"change, {fmt.unit}" if fmt.unit else "change"
    heads = ("slice", "n", "before", "now", f"{title} [95%]", "all others", "p, adjusted")
    return Table(
        "slices",
        f"Where {slices.metric} lost most, of {slices.looked_at:,} slices",
        tuple(("", head) for head in heads),
        tuple(rows),
        words=(0,),
        note=f"Intervals are of each slice by itself. p: the chance of losing so much more than the other examples by accident, "
        f"adjusted (Holm) for the {slices.tested:,} slices of at least 20 examples; red is below 0.01. Slices are classes, "
        f"columns, and quarters (of few examples thirds) by length, size, brightness or loudness.",
    )


def _exchanged(found: Behaviour) -> Table | None:
    rows = [
        (
            Cell(f"{e.one} and {e.two}", tags=("look swapped",) if e.swapped else ()),
            Cell(f"{e.one_as_two:,} of {e.n_one:,}"),
            Cell(f"{e.two_as_one:,} of {e.n_two:,}"),
        )
        for e in found.exchanged
    ]
    heads = ("answers", "the first became the second", "the second became the first")
    return Table("exchanged", "Answers that were exchanged most", tuple(("", h) for h in heads), tuple(rows), words=(0,))


def _agreement(found: Behaviour) -> Table | None:
    a = found.agreement
    if a is None:
        return None
    rows = []
    if a.top1 is not None:
        rows.append((Cell("the same first answer, %"), cell(a.top1, PERCENT, 1), Cell(f"{a.top1.n:,}")))
    if a.top5 is not None:
        rows.append((Cell("of five first answers the same, %"), cell(a.top5, PERCENT, 1), Cell(f"{a.top5.n:,}")))
    for name, e in a.ranked.items():
        words_ = f"of ten nearest the same, {name.replace('_', ' ')}, %"
        rows.append((Cell(words_), cell(e, PERCENT, 1), Cell(f"{e.n:,}")))
    if a.kl is not None:
        rows.append((Cell("KL divergence from the baseline, nats"), cell(a.kl, 1, 4), Cell(f"{a.kl.n:,}")))
    heads = ("agreement with the baseline", "mean [95%]", "n")
    return Table("agreement", "How alike the two models answer", tuple(("", h) for h in heads), tuple(rows), words=(0,))


def _drift(found: Behaviour) -> Table | None:
    rows = []
    for tower, d in found.drift.items():
        n = d.cosine or d.cka or None
        rows.append(
            (Cell(tower), cell(d.cosine, 1, 4), cell(d.cka, 1, 4), Cell(f"{d.width:,}"), Cell(f"{n.n:,}" if n else MISSING))
        )
    heads = ("part", "mean cosine [95%]", "linear CKA [95%]", "width", "n")
    few = any((d.cka and d.cka.n < 2 * d.width) for d in found.drift.values())
    note = (
        "Cosine of each embedding with the baseline's, missing where widths differ; CKA is 1 where one set is the other turned "
    )
    note += "and scaled."
    note += " Of few items for its width CKA is high by itself." if few else ""
    return Table("drift", "How far embeddings moved", tuple(("", h) for h in heads), tuple(rows), words=(0,), note=note)


def _alignment(found: Behaviour) -> Table | None:
    if found.alignment is None or found.alignment_change is None:
        return None
    now, before = found.alignment, found.alignment_change.before
    pairs = (
        ("matched", before.matched, now.matched),
        ("unmatched", before.unmatched, now.unmatched),
        ("matched less unmatched", before.margin, now.margin),
    )
    rows = tuple((Cell(name), cell(one), cell(two)) for name, one, two in pairs)
    heads = ("mean cosine of media and texts", "before [95%]", "now [95%]")
    return Table("alignment", "Cross-modal alignment", tuple(("", h) for h in heads), rows, words=(0,))


def _short(table: Table) -> Sequence[int] | None:
    return (0, 1, 4, 5, 6) if table.key == "slices" else None


def compare(runs: Sequence[Run]) -> Section | None:
    """Flips and agreement of each run's final model."""
    rows = []
    for run in runs:
        row = final_row(run.report)
        found = row.behaviour if row else None
        if found is None or found.flips is None:
            continue
        a = found.agreement
        rows.append(
            (
                Cell(run.name),
                Cell(f"{found.flips.right_to_wrong:,}"),
                Cell(f"{found.flips.wrong_to_right:,}"),
                cell(found.flips.share, PERCENT, 1),
                cell(a.kl if a else None, 1, 4),
                Cell(f"{found.flips.n:,}"),
            )
        )
    if not rows:
        return None
    heads = ("run", "right to wrong", "wrong to right", "answers changed, % [95%]", "KL, nats [95%]", "n")
    note = "Each run against its own baseline."
    table = Table("flips", "Answers that changed", tuple(("", h) for h in heads), tuple(rows), words=(0,), note=note)
    return Section(ANCHOR, "What changed underneath", html_table(table), markdown_table(table), text_table(table))
