"""Where int8 went in the graphs: what was tried on this machine, how fast it was, why the others lost, how to say it again."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from mmcompress.report.alerts import Alert
from mmcompress.report.format import MISSING, RUNTIMES, seconds_text
from mmcompress.report.schema import Report
from mmcompress.report.sections import Section
from mmcompress.report.tables import Cell, Table
from mmcompress.report.views import escape_markdown, html_table, markdown_table

ORDER = 6
WIDTH = 110
SHOWN = 4
"""Operators named of a call's time."""
MEANING = {
    "float32": "the file that was not quantized",
    "static": "inputs and weights of layers, ranges from calibration",
    "static-fused": "the same in ONNX Runtime's fused operators",
    "static-outputs": "outputs of layers too",
    "static-attention": "the products inside of attention too",
    "static-scores": "the products of queries and keys too",
    "static-scores-per-tensor": "the same, one scale for a whole weight",
    "static-conv-float": "convolutions stay float",
    "static-per-tensor": "one scale for a whole weight",
    "static-per-tensor-fused": "one scale for a whole weight, in ONNX Runtime's fused operators",
    "static-signed": "signed activations (S8S8 instead of U8S8)",
    "dynamic": "ranges taken at run time",
    "dynamic-fused": "the same in ONNX Runtime's fused operators",
    "dynamic-per-tensor": "ranges taken at run time, one scale for a whole weight",
    "dynamic-per-tensor-fused": "the same in ONNX Runtime's fused operators",
}
"""What the names mean, in a few words; ``quantization/arrangements.py`` has them as data."""

Found = dict[str, Any]


def alerts(report: Report) -> list[Alert]:
    """Nothing: where int8 does not pay, the pass has warned of it."""
    return []


def section(report: Report, folder: Path | None) -> Section | None:
    """A table and sentences for each component; None where no placement was searched."""
    searched = placements(report)
    if not searched:
        return None
    html, markdown, text = [], [], []
    for step, found in searched.items():
        again = to_paste(found)
        for component, one in found.items():
            table, words = candidates_table(step, component, one), sentences(one)
            html += [html_table(table), _list(words)]
            markdown += [markdown_table(table), "\n".join(f"- {escape_markdown(word)}" for word in words)]
            text += [f"{step}, {component}", *_lines(one), *words]
        say = f"To use this choice again without measuring, write in the pass quantize of {step}:"
        html += [Markup("<p>{}</p><pre><code>{}</code></pre>").format(say, again)]
        markdown += [escape_markdown(say), f"```yaml\n{again}\n```"]
        text += [say, *(f"  {line}" for line in again.splitlines())]
    lines = [line for one in text for line in textwrap.wrap(one, WIDTH, subsequent_indent="      ")]
    return Section("placement", "Where int8 went, and why", Markup("").join(html), "\n\n".join(markdown), "\n".join(lines))


def placements(report: Report) -> dict[str, dict[str, Found]]:
    """What was searched, by step and component."""
    found: dict[str, dict[str, Found]] = {}
    for row in report.rows:
        one = row.facts.get("placement")
        if isinstance(one, dict) and one and not row.rolled_back:
            found.setdefault(row.step, one)
    return found


def to_paste(found: dict[str, Found]) -> str:
    """The part of a recipe that makes the same files without measuring; components that stayed in float are left out."""
    chosen = [f"{component}: {one['chosen']}" for component, one in found.items() if one.get("chosen")]
    line = f"placement: {{{', '.join(chosen)}}}"
    return line if len(line) <= WIDTH - 2 else "\n  ".join(["placement:", *chosen])


def candidates_table(step: str, component: str, found: Found) -> Table:
    """All that was tried, the fastest first."""
    columns = (("", "placement"), ("", "what it is"), ("", "median, ms"), ("", "rounds"), ("", "cosine to float32"), ("", "why"))
    lines = []
    for one in found["candidates"]:
        name = one["name"]
        timed = one["ms"] is not None
        ms = Cell(f"{one['ms']:.2f}", (f"{one['low']:.2f} to {one['high']:.2f}",)) if timed else Cell(MISSING)
        tone = "good" if name == found["chosen"] and found["pays"] else ""
        lines.append(
            (
                Cell(name, tone=tone, tags=("chosen",) if name == found["chosen"] else ()),
                Cell(MEANING.get(name, "")),
                ms,
                Cell(str(one["rounds"]) if timed else MISSING),
                Cell(MISSING if one["cosine"] is None else f"{one['cosine']:.4f}"),
                Cell(one["why"]),
            )
        )
    note = "Median of the rounds' medians, with the fastest and the slowest round; all took turns, each in a process of its own."
    return Table(f"placement-{step}-{component}", f"{step}, {component}", columns, tuple(lines), words=(1, 5), note=note)


def sentences(found: Found) -> list[str]:
    """How much faster the chosen file is, what its time goes to, what the search took, and why int8 does not pay."""
    words = []
    speed = found.get("speedup")
    if speed is None:
        words.append("No placement keeps the bound on the outputs' cosine: this component stays in float32.")
    else:
        span = f"95% interval {speed['low']:.2f} to {speed['high']:.2f}, {speed['rounds']} rounds"
        name = RUNTIMES[found.get("runtime", "onnxruntime")]
        words.append(
            f"{found['chosen']} is {speed['ratio']:.2f} times as fast as float32 in {name} ({span}), at one example a call."
        )
    if not found["pays"] and found["reasons"]:
        words.append(f"Int8 is not faster than float32 here: {'; '.join(found['reasons'])}.")
    total = sum(found["profile_ms"].values())
    if total:
        shares = [f"{kind} {ms / total:.0%}" for kind, ms in list(found["profile_ms"].items())[:SHOWN]]
        words.append(f"Its time goes to {', '.join(shares)}, by ONNX Runtime's profiler.")
    seconds = found["seconds"]
    spent = ", ".join(f"{what} {seconds_text(took)}" for what, took in seconds.items())
    words.append(f"The search took {seconds_text(sum(seconds.values()))}: {spent}.")
    if found.get("cpu_features"):
        words.append(f"The processor's instructions for it: {', '.join(found['cpu_features'])}.")
    return words


def _list(words: list[str]) -> Markup:
    items = Markup("").join(Markup("<li>{}</li>").format(escape(word)) for word in words)
    return Markup("<ul>{}</ul>").format(items)


def _lines(found: Found) -> list[str]:
    """The candidates for a terminal."""
    lines = []
    for one in found["candidates"]:
        ms = f"{one['ms']:9.2f} ms" if one["ms"] is not None else f"{MISSING:>12}"
        lines.append(f"  {one['name']:<18} {ms}  {one['why']}")
    return lines
