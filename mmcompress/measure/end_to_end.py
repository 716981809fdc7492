"""Queries as they come in, bytes of a picture or recording and a text, and what is done to them before the model sees them.

``write_queries`` runs where the data is; ``Preparation`` in the process that is timed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import soundfile
import torch
from PIL import Image

from mmcompress.data.audio import decode_audio
from mmcompress.data.examples import Examples, decode_image
from mmcompress.errors import DataError
from mmcompress.processor import load_processor

QUERIES = 16
"""Evaluation examples that queries go round in."""
TEXTS = ("text", "question", "caption")


def write_queries(examples: Examples, folder: Path) -> int:
    """Writes the first examples as files of bytes, and their texts: the caption or question, else the name of the class.

    Pictures that the data holds unpacked are written as PNG, recordings as WAV: decoding those is what is timed then.

    Returns:
        How many there are; those that do not decode are left out.
    """
    folder.mkdir(parents=True)
    queries: list[dict[str, str]] = []
    for i in range(min(4 * QUERIES, len(examples))):
        try:
            content = _bytes(examples, i)
        except (DataError, OSError):
            continue
        row = examples.without_media(i)
        text = next((row[role] for role in TEXTS if role in row), None)
        if text is None and examples.classes and "label" in row:
            text = examples.classes[row["label"]]
        (folder / f"{i}.bytes").write_bytes(content)
        queries.append({"file": f"{i}.bytes", "text": text[0] if isinstance(text, list) else text or "a text"})
        if len(queries) == QUERIES:
            break
    (folder / "queries.json").write_text(json.dumps({"kind": examples.kind, "queries": queries}))
    return len(queries)


def _bytes(examples: Examples, i: int) -> bytes:
    """The file of an example's picture or recording; made from the decoded one where the data holds no file."""
    decoded = examples.media(i)  # what does not decode is no query
    value: Any = examples.rows[i][examples.columns[examples.kind]]
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str | Path):
        return ((examples.folder or Path()) / value).read_bytes()
    buffer = io.BytesIO()
    if isinstance(decoded, Image.Image):
        decoded.save(buffer, "PNG")
    else:
        soundfile.write(buffer, decoded.samples, decoded.rate, format="WAV")
    return buffer.getvalue()


class Preparation:
    """Decodes and prepares one query after the other when it is called."""

    def __init__(self, queries: Path, model: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        found = json.loads((queries / "queries.json").read_text())
        self.processor = load_processor(model)
        decode: Callable[[Any, str], Any] = decode_audio if found["kind"] == "audio" else decode_image
        self.kind, self.decode = found["kind"], decode
        self.queries = cycle([((queries / one["file"]).read_bytes(), one["text"]) for one in found["queries"]])

    def __call__(self) -> None:
        """The next query, from its bytes to the tensors that the model takes."""
        content, text = next(self.queries)
        self.processor.media(self.kind, [self.decode(content, "query")])
        self.processor.tokens([text])
