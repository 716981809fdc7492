"""Exact duplicates between training, calibration and evaluation data, whatever bytes they are stored as.

Two rows are the same example where their pictures have the same pixels (their recordings the same samples) and, in data with
questions, their normalised questions are the same too; without pictures and recordings, where their texts are. Bytes are compared
first. Only what could still be a copy is decoded: files whose header names a size (a number of samples) that another split has
too. At worst that is one decoding of everything, about what one epoch of training decodes.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import datasets
import numpy as np
import soundfile
from PIL import Image

from mmcompress.data.audio import decode_audio
from mmcompress.data.examples import KINDS, Examples, decode_image
from mmcompress.errors import DataError
from mmcompress.progress import SILENT, Reporter
from mmcompress.report.schema_data import Leaks, Overlap, Split

SHOWN = 5
"""How many rows messages and reports name."""
PAIRS: tuple[tuple[Split, Split], ...] = (("train", "eval"), ("calibration", "eval"), ("train", "calibration"))
SPLITS = ("train", "calibration", "eval")
WHAT: Mapping[str, Literal["picture", "recording", "text"]] = {"image": "picture", "audio": "recording"}
AT_ONCE = 64
MANY = 5_000
"""Decoding more than this takes long enough to say so."""


@dataclass
class _Rows:
    """What stands for the rows of one split.

    Attributes:
        stored: a hash of each row's bytes.
        media: the same where nothing was decoded, else of what the bytes say; equal where pictures are.
        texts: the normalised question or text; None where the media alone are the example.
        headers: of each distinct stored media the size in its header, and a row that has it.
    """

    examples: Examples
    stored: list[bytes]
    media: list[bytes]
    texts: list[str] | None
    headers: dict[bytes, tuple[Any, int]] = field(default_factory=dict)


def find_leaks(
    splits: Mapping[str, Examples], *, drawn: Mapping[str, str] | None = None, decode: bool = True, reporter: Reporter = SILENT
) -> Leaks:
    """Looks for rows that two splits share.

    Args:
        splits: the examples by split.
        drawn: for each split that the recipe takes from another the other's name.
        decode: False compares bytes only, which misses copies that were stored anew.

    Returns:
        The counts. Data that is made here shares nothing by construction, and is not looked through.
    """
    start = time.monotonic()
    if len([which for which in SPLITS if which in splits]) < 2:
        return Leaks(looked=True)
    looked = {which: split for which, split in splits.items() if which in SPLITS and isinstance(split.rows, datasets.Dataset)}
    if len(looked) < 2 or "eval" not in looked:
        return Leaks(looked=False)
    kind = next((kind for kind in KINDS if kind in looked["eval"].columns), "")
    rows = {which: _read(split, kind, which, reporter) for which, split in looked.items()}
    decoded = _decode(rows, kind, reporter) if decode and kind else 0
    drawn = drawn or {}
    pairs = []
    for first, second in PAIRS:
        if first in rows and second in rows:
            pair = _compare(rows[first], rows[second], first, second)
            pair.drawn = drawn.get(second) == first or drawn.get(first) == second
            pairs.append(pair)
    own = rows["eval"]
    counted = Counter(_keys(own))
    return Leaks(
        looked=True,
        what=WHAT.get(kind, "text"),
        pairs=pairs,
        repeated=sum(counted.values()) - len(counted),
        decoded=decoded,
        seconds=time.monotonic() - start,
    )


def refuse(leaks: Leaks, names: Mapping[str, str]) -> None:
    """Ends a run whose evaluation examples were trained or calibrated on.

    Args:
        names: what messages call each split.

    Raises:
        DataError: there are some.
    """
    if not leaks.found:
        return
    said = []
    for pair in leaks.found:
        rows = ", ".join(map(str, pair.second_rows)) + (", ..." if pair.examples > len(pair.second_rows) else "")
        theirs = ", ".join(map(str, pair.first_rows)) + (", ..." if pair.examples > len(pair.first_rows) else "")
        anew = f" ({pair.reencoded} of them as other bytes, with the same content)" if pair.reencoded else ""
        said.append(
            f"{pair.examples} of {pair.n} {leaks.what}s of {names[pair.second]} are also in {names[pair.first]}{anew}: "
            f"rows {rows} are rows {theirs} there"
        )
    raise DataError(
        f"{'; '.join(said)}. Quality would be overstated. Take them out of one of the two, or set data.allow_leaks: true; the "
        "report then says so first"
    )


def same_media(examples: Examples) -> list[bytes] | list[int]:
    """For each example a value that is equal where pictures or recordings are, byte for byte as they are stored.

    Data that is no `datasets.Dataset` (made, bundled, relabelled) is taken to have none twice.
    """
    if not isinstance(examples.rows, datasets.Dataset):
        return list(range(len(examples)))
    return [_hash(_bytes(value, examples.folder)) for value in _column(examples, examples.kind)]


def normalised(text: str | Sequence[str]) -> str:
    """A text without what makes no difference to a reader: Unicode form (NFKC), case, punctuation and white space."""
    if not isinstance(text, str):
        return "\n".join(normalised(str(one)) for one in text)
    folded = unicodedata.normalize("NFKC", text).casefold()
    bare = "".join(" " if unicodedata.category(c).startswith("P") else c for c in folded)
    return " ".join(bare.split()) or " ".join(folded.split())


def _column(examples: Examples, role: str) -> Sequence[Any]:
    found: Sequence[Any] = cast(datasets.Dataset, examples.rows)[examples.columns[role]]
    return found


def _read(examples: Examples, kind: str, which: str, reporter: Reporter) -> _Rows:
    """Hashes and headers of a split, without decoding."""
    role = "question" if kind and "question" in examples.columns else "" if kind else "text"
    texts = None
    if role:
        texts = [normalised(value if isinstance(value, (str, list)) else str(value)) for value in _column(examples, role)]
    if not kind:
        nothing = [b""] * len(examples)
        return _Rows(examples, nothing, nothing, texts)
    stored: list[bytes] = []
    headers: dict[bytes, tuple[Any, int]] = {}
    values = reporter.track(_column(examples, kind), f"looking for duplicates ({which})", len(examples))
    for i, value in enumerate(values):
        raw = _bytes(value, examples.folder)
        stored.append(_hash(raw))
        if stored[-1] not in headers:
            headers[stored[-1]] = (_header(raw, kind), i)
    return _Rows(examples, stored, stored, texts, headers)


def _decode(rows: Mapping[str, _Rows], kind: str, reporter: Reporter) -> int:
    """Replaces hashes of bytes by those of content where one split could hold a copy of another's; how many were decoded."""
    by_size: dict[Any, dict[bytes, tuple[str, int]]] = {}
    owners: dict[Any, set[str]] = {}
    for which, split in rows.items():
        for stored, (size, row) in split.headers.items():
            if size is not None:
                by_size.setdefault(size, {}).setdefault(stored, (which, row))
                owners.setdefault(size, set()).add(which)
    wanted = {
        stored: place
        for size, group in by_size.items()
        if len(group) > 1 and len(owners[size]) > 1
        for stored, place in group.items()
    }
    if not wanted:
        return 0
    if len(wanted) > MANY:
        reporter.say(
            f"looking for duplicates: {len(wanted):,} {WHAT[kind]}s have the size of another split's; decoding them once"
        )
    content: dict[bytes, bytes] = {}
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        batches = list(_batches(list(wanted.items())))
        for batch in reporter.track(batches, "comparing content of equal size", len(batches)):
            media = [(rows[which].examples, _value(rows[which].examples, kind, row)) for _, (which, row) in batch]
            for (stored, _), found in zip(batch, pool.map(lambda pair: _content(pair[1], pair[0], kind), media), strict=True):
                if found is not None:
                    content[stored] = found
    for split in rows.values():
        split.media = [content.get(stored, stored) for stored in split.stored]
    return len(wanted)


def _batches(items: list[Any]) -> Iterator[list[Any]]:
    yield from (items[start : start + AT_ONCE] for start in range(0, len(items), AT_ONCE))


def _value(examples: Examples, kind: str, row: int) -> Any:
    return cast(datasets.Dataset, examples.rows)[row][examples.columns[kind]]


def _content(value: Any, examples: Examples, kind: str) -> bytes | None:
    """A hash of pixels (of the picture as the model is given it) or of samples; None where it does not decode."""
    try:
        if kind == "image":
            picture = decode_image(value, "", examples.folder)
            return _hash(b"%dx%d " % picture.size + picture.tobytes())
        recording = decode_audio(value, "", examples.folder)
        return _hash(b"%d " % recording.rate + recording.samples.tobytes())
    except DataError:
        return None  # a damaged file is told of by who scores it


def _compare(first: _Rows, second: _Rows, one: Split, other: Split) -> Overlap:
    theirs: dict[Any, int] = {}
    for i, key in enumerate(_keys(first)):
        theirs.setdefault(key, i)
    keys = _keys(second)
    shared = [i for i, key in enumerate(keys) if key in theirs]
    stored = set(first.stored)
    media = set(first.media)
    return Overlap(
        first=one,
        second=other,
        examples=len(shared),
        n=len(keys),
        reencoded=sum(second.stored[i] not in stored for i in shared),
        same_media=sum(m in media for m in second.media) - len(shared) if second.texts is not None and second.headers else 0,
        first_rows=[first.examples.place(theirs[keys[i]]) for i in shared[:SHOWN]],
        second_rows=[second.examples.place(i) for i in shared[:SHOWN]],
    )


def _keys(rows: _Rows) -> list[Any]:
    return rows.media if rows.texts is None else list(zip(rows.media, rows.texts, strict=True))


def _hash(raw: bytes) -> bytes:
    return hashlib.blake2b(raw, digest_size=16).digest()


def _header(raw: bytes, kind: str) -> Any:
    """The size that a file says it has, read without decoding it; None where it says none."""
    try:
        if kind == "image":
            with Image.open(io.BytesIO(raw)) as picture:
                return picture.size
        info = soundfile.info(io.BytesIO(raw))
        return info.frames, info.samplerate
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, RuntimeError, Image.DecompressionBombError):
        return None


def _bytes(value: Any, folder: Path | None) -> bytes:
    if isinstance(value, dict):
        if value.get("array") is not None:
            return np.asarray(value["array"]).tobytes()
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return value
    path = (folder or Path()) / str(value)
    return path.read_bytes() if path.is_file() else str(value).encode()
