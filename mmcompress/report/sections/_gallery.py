"""The gallery of examples that two models answer differently, with their pictures and recordings inside the page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from mmcompress.report.format import MISSING
from mmcompress.report.schema_behaviour import Answer, GalleryEntry
from mmcompress.report.views import escape_markdown

TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".flac": "audio/flac", ".wav": "audio/wav"}
LARGEST_FILE = 110_000
ROOM = 1_800_000
"""Bytes of media that the gallery may put into the page, before base64 makes them a third more."""
HEADINGS = {
    "right to wrong": "Right before, wrong now",
    "wrong to right": "Wrong before, right now",
    "other answer": "Wrong before and now, with another answer",
}


def gallery_html(entries: Sequence[GalleryEntry], folder: Path | None, anchor: str) -> Markup:
    """A grid of examples for each kind of change.

    Args:
        folder: the run's folder; where it is None, or a file is gone or too large for the page, a word stands for it.
        anchor: what ids begin with.
    """
    room = ROOM
    parts = []
    for kind, heading in HEADINGS.items():
        own = [entry for entry in entries if entry.kind == kind]
        if not own:
            continue
        figures = []
        for entry in own:
            media, used = media_html(entry, folder, room)
            room -= used
            figures.append(_figure(entry, media))
        place = f"{anchor}-{kind.replace(' ', '-')}"
        parts.append(
            Markup('<h3 id="{}">{}</h3><div class="gallery" role="group" aria-labelledby="{}">{}</div>').format(
                place, heading, place, Markup("").join(figures)
            )
        )
    return Markup("").join(parts)


def media_html(entry: GalleryEntry, folder: Path | None, room: int) -> tuple[Markup, int]:
    """An example's picture or recording as part of the page, and how many bytes of the room it takes."""
    if entry.media is None:
        return Markup(""), 0
    name = Path(entry.media).name  # a report may come from anywhere: nothing outside of the folder is read
    kind = TYPES.get(Path(name).suffix)
    what = "recording" if kind is not None and kind.startswith("audio/") else "picture"
    file = folder / "measurements" / "media" / name if folder is not None else None
    if file is None or kind is None or not file.is_file():
        return Markup('<p class="gone">The {} is not kept here.</p>').format(what), 0
    size = file.stat().st_size
    if size > min(LARGEST_FILE, room):
        return Markup('<p class="gone">The {} is too large for this page.</p>').format(what), 0
    data = f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
    if what == "recording":
        label = f"Recording of row {entry.index}"
        return Markup('<audio controls preload="none" src="{}" aria-label="{}"></audio>').format(data, label), size
    alt = f"Row {entry.index}: {entry.truth}" if entry.truth else f"Row {entry.index}"
    small = Markup(' class="tiny"') if kind == "image/png" else Markup("")
    return Markup('<img src="{}" alt="{}"{}>').format(data, alt, small), size


def _figure(entry: GalleryEntry, media: Markup) -> Markup:
    lines = [Markup("<div>{}</div>").format(entry.text)] if entry.text else []
    lines.append(Markup('<div class="muted">row {}, true: <b>{}</b></div>').format(f"{entry.index:,}", entry.truth or MISSING))
    for name, answer in (("before", entry.before), ("now", entry.after)):
        tone = "good" if answer.right else "bad"
        lines.append(Markup('<div class="answer {}">{}: {}</div>').format(tone, name, said(answer)))
    return Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(media, Markup("").join(lines))


def said(answer: Answer) -> str:
    """``"coat, 54%, right"``."""
    sure = [] if answer.confidence is None else [f"{answer.confidence:.0%}"]
    return ", ".join([answer.text or "no answer", *sure, "right" if answer.right else "wrong"])


def gallery_markdown(entries: Sequence[GalleryEntry], most: int = 6) -> str:
    """The first examples of each kind as lists; the pictures are in the HTML report."""
    parts = []
    for kind, heading in HEADINGS.items():
        own = [entry for entry in entries if entry.kind == kind]
        if own:
            lines = [f"- {escape_markdown(line(entry))}" for entry in own[:most]]
            parts.append(f"#### {heading}: examples\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def line(entry: GalleryEntry) -> str:
    """An example on one line."""
    asked = f" {entry.text!r}" if entry.text else ""
    return f"row {entry.index}{asked}, true {entry.truth!r}; before: {said(entry.before)}; now: {said(entry.after)}"
