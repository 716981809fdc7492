"""Tables and text in each of the report's forms: HTML, Markdown, terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from tabulate import tabulate

from mmcompress.report.format import RUNTIMES, fill_template
from mmcompress.report.tables import Cell, Table


def nice(text: str) -> str:
    """Real minus and multiplication signs for numbers; names with digits in them stay as they are."""
    text = re.sub(r"(?<![\w.-])-(?=\d)", "\N{MINUS SIGN}", text)
    return re.sub(r"(?<=\d)x(?=$|[\s,;)])", "\N{MULTIPLICATION SIGN}", text)


def heading_groups(table: Table) -> list[tuple[str, int, list[str]]]:
    """The headings of a table: runs of columns as (group, how many, titles)."""
    runs: list[tuple[str, int, list[str]]] = []
    for group, title in table.columns:
        if group and runs and runs[-1][0] == group:
            runs[-1] = (group, runs[-1][1] + 1, [*runs[-1][2], title])
        else:
            runs.append((group, 1, [title]))
    return runs


def html_filters() -> dict[str, Any]:
    """The filters that the HTML templates use."""
    return {"nice": nice, "runtime": _runtime, "heading_groups": heading_groups}


def _runtime(name: str) -> str:
    return RUNTIMES.get(name, name)


def html_table(table: Table, long: Sequence[int] = ()) -> Markup:
    """A table in a box of its own that scrolls where it is too wide.

    Args:
        long: columns, by number, of long texts that may break.
    """
    return Markup(fill_template("table.html.j2", html_filters(), {"table": table, "long": tuple(long)}))


def escape_markdown(text: str) -> str:
    """Makes text mean nothing but itself in a line or table cell of Markdown."""
    text = re.sub(r"([\\`*\[\]|~])", r"\\\1", " ".join(text.split()))
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def fence(text: str) -> str:
    """A row of backticks longer than any in the text."""
    return "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))


def markdown_table(table: Table) -> str:
    """A table in GitHub's Markdown; the small print follows its number in brackets."""
    titles = [f"{group}, {title}" if group else title for group, title in table.columns]
    lines = [_line([escape_markdown(t) for t in titles])]
    lines.append(_line([":--" if i in table.words else "--:" for i in range(len(titles))]))
    lines += [_line([_cell(cell) for cell in row]) for row in table.rows]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(cell: Cell) -> str:
    text = escape_markdown(cell.text)
    if cell.small:
        text += f" ({escape_markdown('; '.join(line for line in cell.small if line))})"
    return text + "".join(f" **{escape_markdown(tag)}**" for tag in cell.tags)


def text_table(table: Table, show: Sequence[int] | None = None) -> str:
    """A table for terminals; small print stands below its number.

    Args:
        show: columns, by number; all where left out.
    """
    show = range(len(table.columns)) if show is None else show
    heads = ["\n".join(part for part in table.columns[i] if part) for i in show]
    body = [["\n".join([row[i].text, *row[i].small, *(f"[{tag}]" for tag in row[i].tags)]) for i in show] for row in table.rows]
    return text_grid(heads, body, [i for i, column in enumerate(show) if column in table.words])


def text_grid(heads: Sequence[str], body: Sequence[Sequence[str]], words: Sequence[int]) -> str:
    """Cells of one or more lines set in columns; ``words`` are the columns, by number, that are set flush left."""
    # Headers go in as a row: tabulate pads its own headers by two characters each, which costs a column.
    columns = list(zip(heads, *body, strict=True))
    rules = ["-" * max(len(line) for cell in column for line in cell.splitlines() or [""]) for column in columns]
    sides = ["left" if i in words else "right" for i in range(len(heads))]
    return tabulate([list(heads), rules, *map(list, body)], tablefmt="plain", disable_numparse=True, colalign=sides)
