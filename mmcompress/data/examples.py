"""Examples as tasks see them: rows with a picture or a recording, texts and labels, decoded when asked for."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import datasets
from PIL import Image, UnidentifiedImageError

from mmcompress.data.audio import Audio, decode_audio
from mmcompress.errors import DataError, one_of

KINDS = ("image", "audio")
"""The roles whose values are media: decoded when asked for, prepared by the model's processor, and cached."""


GROUPING = ("cluster", "speaker")
"""The roles whose values only say which examples belong together; read as they are, and never refused."""


class Examples(Sequence[dict[str, Any]]):
    """Rows by role (see `ROLES`), whatever the columns of the source are called.

    Attributes:
        name: what messages call it, such as ``data.eval (test.parquet)``.
        classes: names of the labels, or None where the data has no labels.
        synthetic: True for bundled data, which reports must say.
        folder: where relative paths of pictures and recordings begin.
        places: for each row its number in the source, where some were chosen; None where these are all.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        name: str,
        columns: Mapping[str, str] | None = None,
        classes: Sequence[str] | None = None,
        skip_damaged: bool = False,
        synthetic: bool = False,
        folder: Path | None = None,
    ) -> None:
        self.rows = rows
        self.folder = folder
        self.name = name
        self.columns = dict(columns or {})
        self.classes = list(classes) if classes is not None else None
        self.skip_damaged = skip_damaged
        self.synthetic = synthetic
        self.places: list[int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | Examples:
        """Row ``index`` by role, its picture decoded to RGB or its recording to `Audio`; a slice gives Examples.

        Raises:
            DataError: the picture or recording does not decode, or a label is outside the classes.
        """
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        return self._row(index, dict(self.columns))

    @property
    def kind(self) -> str:
        """``image`` or ``audio``: which of them the examples hold.

        Raises:
            DataError: neither.
        """
        found = next((kind for kind in KINDS if kind in self.columns), None)
        if found is None:
            have = ", ".join(self.column_names()) or "none"
            raise DataError(f"{self.name}: no column of pictures or recordings is known; the data's columns are: {have}")
        return found

    def media(self, index: int) -> Image.Image | Audio:
        """The picture (RGB) or recording of row ``index``; nothing else of the row is looked at."""
        found: Image.Image | Audio = self._row(index, {self.kind: self.columns[self.kind]})[self.kind]
        return found

    def without_media(self, index: int) -> dict[str, Any]:
        """Row ``index`` by role without its picture or recording, which need not decode."""
        return self._row(index, {role: column for role, column in self.columns.items() if role not in KINDS})

    def _row(self, index: int, columns: Mapping[str, str]) -> dict[str, Any]:
        try:
            row = self.rows[index]
        except UnicodeDecodeError as e:
            raise DataError(f"{self.name}, row {index}: holds text that is not UTF-8: {_said(e)}") from e
        found: dict[str, Any] = {"index": index}
        for role, column in columns.items():
            if role == "label" and self.classes is None:
                continue  # `need` has words for it where a task asks
            if column not in row:
                raise DataError(f"{self.name}: " + one_of("column", column, row))
            value = row[column]
            if role == "image":
                value = decode_image(value, f"{self.name}, row {index}, column {column!r}", self.folder)
            elif role == "audio":
                value = decode_audio(value, f"{self.name}, row {index}, column {column!r}", self.folder)
            elif role == "label":
                value = self._label(value, index, column)
            elif role not in GROUPING:
                value = self._text(_said_by_people(value) if role == "answers" else value, index, column)
            found[role] = value
        return found

    def take(self, indices: Sequence[int]) -> Examples:
        """The examples at these indices, in this order."""
        rows = self.rows.select(list(indices)) if isinstance(self.rows, datasets.Dataset) else _Chosen(self.rows, indices)
        found = Examples(rows, self.name, self.columns, self.classes, self.skip_damaged, self.synthetic, self.folder)
        found.places = [self.place(i) for i in indices]
        return found

    def place(self, index: int) -> int:
        """The number that row ``index`` has in the source, where these examples were chosen from more."""
        return index if self.places is None else self.places[index]

    def need(self, roles: Mapping[str, str], who: str, optional: Collection[str] = ()) -> None:
        """Checks that every role a task reads has a column, but for those it can do without.

        Raises:
            DataError: a role has none.
        """
        for role, what in roles.items():
            if role in optional and role not in self.columns:
                continue
            if role not in self.columns:
                have = ", ".join(self.column_names()) or "none"
                raise DataError(
                    f"{self.name}: {who} needs a column for {role!r} ({what}); the data's columns are: {have}. "
                    f"Name one with columns: {{{role}: <column>}}"
                )
            if role == "label" and self.classes is None:
                column = self.columns[role]
                raise DataError(f"{self.name}: the labels in {column!r} name no classes; give their names with classes: [...]")

    def narrow(self, roles: Mapping[str, str], who: str, optional: Collection[str] = ()) -> None:
        """Checks as ``need``, then keeps only the columns that a task reads, and those that say what belongs together.

        What is wrong with others stops nothing.
        """
        self.need(roles, who, optional)
        self.columns = {role: column for role, column in self.columns.items() if role in roles or role in GROUPING}

    def column_names(self) -> list[str]:
        """The names of the source's columns."""
        if isinstance(self.rows, datasets.Dataset):
            return list(self.rows.column_names)
        return list(self.rows[0]) if len(self.rows) else []

    def values(self, role: str) -> Sequence[Any]:
        """A role's column as it is in the data."""
        column = self.columns[role]
        found: Sequence[Any] = self.rows[column] if isinstance(self.rows, datasets.Dataset) else [r[column] for r in self.rows]
        return found

    def labels(self) -> list[int]:
        """All labels as indices into ``classes``, without decoding pictures."""
        column = self.columns["label"]
        values = self.rows[column] if isinstance(self.rows, datasets.Dataset) else [r[column] for r in self.rows]
        return [self._label(v, i, column) for i, v in enumerate(values)]

    def _label(self, value: Any, index: int, column: str) -> int:
        where = f"{self.name}, row {index}, column {column!r}"
        classes = self.classes or []
        if isinstance(value, str):
            if value not in classes:
                raise DataError(f"{where}: " + one_of("label", value, classes[:20]))
            return classes.index(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise DataError(f"{where}: label {value!r} is neither a class name nor a class number")
        if not 0 <= value < len(classes):
            raise DataError(f"{where}: label {value} is outside the classes 0 to {len(classes) - 1}")
        return value

    def _text(self, value: Any, index: int, column: str) -> str | list[str]:
        if isinstance(value, str) and value.strip():
            return value
        if isinstance(value, list) and value and all(isinstance(v, str) and v.strip() for v in value):
            return value
        empty = value in ([], None) or (isinstance(value, str) and not value.strip())
        found = "an empty text" if empty else type(value).__name__
        raise DataError(f"{self.name}, row {index}, column {column!r}: {found}; allowed: a text or a list of texts")


def _said_by_people(value: Any) -> Any:
    """The texts alone of answers as VQA v2 records them: ``[{"answer": "yes", "answer_id": 1, ...}, ...]``."""
    if isinstance(value, dict) and isinstance(value.get("answer"), list):
        return value["answer"]
    if isinstance(value, list) and value and all(isinstance(v, dict) and "answer" in v for v in value):
        return [v["answer"] for v in value]
    return value


class _Chosen(Sequence[Mapping[str, Any]]):
    """A view of some rows of a lazy sequence."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], indices: Sequence[int]) -> None:
        self.rows, self.indices = rows, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[self.indices[index]]


def decode_image(value: Any, where: str, folder: Path | None = None) -> Image.Image:
    """A picture from PIL, bytes, a path, or a ``{"bytes", "path"}`` record, as RGB.

    Transparent pixels are laid on white: dropping the alpha channel would show whatever colour hides under it.

    Raises:
        DataError: it does not decode.
    """
    try:
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else str(value["path"])
        if isinstance(value, bytes):
            value = Image.open(io.BytesIO(value))
        elif isinstance(value, (str, Path)):
            value = Image.open((folder or Path()) / value)
        if not isinstance(value, Image.Image):
            raise DataError(f"{where}: {type(value).__name__} is no picture; allowed: PIL, PNG/JPEG bytes, or a path")
        if value.mode in ("RGBA", "LA", "PA") or "transparency" in value.info:
            value = value.convert("RGBA")
            ground = Image.new("RGBA", value.size, (255, 255, 255, 255))
            value = Image.alpha_composite(ground, value)
        rgb: Image.Image = value.convert("RGB")
        return rgb
    except (OSError, SyntaxError, KeyError, TypeError, Image.DecompressionBombError) as e:
        raise DataError(f"{where}: the picture does not decode: {_said(e)}") from e
    except ValueError as e:
        if isinstance(e, DataError):
            raise
        raise DataError(f"{where}: the picture does not decode: {_said(e)}") from e


def _said(e: BaseException) -> str:
    """On one line, and short: Pillow and the system repeat the whole path, or all that they were given."""
    if isinstance(e, UnidentifiedImageError):
        return "its bytes are of no format that Pillow knows"
    text = " ".join(str(e).split())
    return text if len(text) <= 200 else f"{text[:120]} ... {text[-60:]}"


def as_examples(data: Any, name: str = "data") -> Examples:
    """Anything list-like with rows, or a `datasets.Dataset`, as Examples; roles are guessed from the column names.

    Raises:
        DataError: it has no column that looks like pictures or recordings.
    """
    if isinstance(data, Examples):
        return data
    classes = None
    names = list(data.column_names) if isinstance(data, datasets.Dataset) else list(data[0]) if len(data) else []
    columns = guess_columns(names)
    if isinstance(data, datasets.Dataset):
        data, classes = undecoded(data, columns)
    if not any(kind in columns for kind in KINDS):
        raise DataError(f"{name}: no column looks like pictures or recordings; columns are: {', '.join(names) or 'none'}")
    return Examples(data, name, columns, classes)


MOST_CLASSES = 1_000_000
"""Larger label numbers are no classes (a hash, an id, a damaged file); a list of names up to them would fill the memory."""
ROLE_NAMES = {
    "image": ("image", "img", "jpg", "png", "jpeg", "webp", "picture", "image_path", "file_name"),
    "text": ("text", "caption", "captions", "txt", "sentence", "sentences", "description", "prompt"),
    "label": ("label", "labels", "cls", "class", "fine_label", "target", "category"),
    "audio": ("audio", "wav", "flac", "mp3", "ogg", "speech", "recording", "audio_path"),
    "question": ("question", "questions", "query"),
    "answers": ("answers", "answer", "multiple_choice_answer"),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "cluster": ("cluster", "image_id", "img_id", "imageid"),
}
"""For each role the names that its column commonly has."""


def guess_columns(names: Sequence[str]) -> dict[str, str]:
    """For each role the column that is commonly called so, where there is one."""
    lower = {n.lower(): n for n in names}
    return {
        role: next(lower[n] for n in known if n in lower) for role, known in ROLE_NAMES.items() if any(n in lower for n in known)
    }


def undecoded(data: datasets.Dataset, columns: Mapping[str, str]) -> tuple[datasets.Dataset, list[str] | None]:
    """A data set whose media stay bytes until asked for, so that one bad file does not stop a scan; and its classes."""
    for kind, feature in (("image", datasets.Image), ("audio", datasets.Audio)):
        column = columns.get(kind)
        if column is not None and isinstance(data.features.get(column), feature):
            data = data.cast_column(column, feature(decode=False))
    label = columns.get("label")
    feature = data.features.get(label) if label is not None else None
    if isinstance(feature, datasets.ClassLabel):
        return data, list(feature.names)
    if label is not None and isinstance(feature, datasets.Value):
        if feature.dtype in ("string", "large_string"):
            return data, sorted({str(v) for v in data.unique(label)})
        # A label that is no whole number is named with its row when the labels are read.
        numbers = [int(v) for v in data.unique(label) if isinstance(v, (int, float)) and math.isfinite(v)]
        if numbers and min(numbers) >= 0 and max(numbers) < MOST_CLASSES:
            return data, [str(i) for i in range(max(numbers) + 1)]
    return data, None
