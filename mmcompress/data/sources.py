"""A recipe's ``data`` section to Examples: bundled data, local files, folders of images, hub data sets."""

from __future__ import annotations

import logging
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from mmcompress.data.examples import ROLE_NAMES, Examples, guess_columns, undecoded
from mmcompress.data.scenes import Scenes
from mmcompress.data.shapes import CLASSES, Shapes
from mmcompress.data.synthetic import Synthetic
from mmcompress.data.tones import Tones
from mmcompress.errors import DataError, one_of
from mmcompress.recipe import Data, Source

BUNDLED: Mapping[str, type[Synthetic[Any]]] = {"shapes": Shapes, "scenes": Scenes, "tones": Tones}
"""Synthetic data by name: called with a split, a count and a seed; roles are guessed from the rows' keys."""
BUNDLED_SPLIT = {"train": "train", "calibration": "train", "eval": "test", "ood": "test"}
BUNDLED_COUNT = {"train": 20_000, "validation": 1_000, "test": 2_000}
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tar": "webdataset"}

log = logging.getLogger(__name__)


def load_data(data: Data, seed: int) -> dict[str, Examples]:
    """All splits that a recipe names, with one list of class names.

    Raises:
        DataError: a split is missing, empty, or not readable, or a column is not there.
    """
    found: dict[str, Examples] = {}
    for which in ("train", "eval", "calibration"):
        source: Source | None = getattr(data, which)
        if source is None:
            continue
        if source.from_ is not None:
            if source.from_ not in found:
                raise DataError(f"data.{which}.from: the recipe has no data.{source.from_}")
            found[which] = _sample(found[source.from_], source.samples, seed + 1)
        else:
            found[which] = load_source(source, which, seed)
    _same_classes(found)
    return found


def load_source(source: Source, which: str, seed: int) -> Examples:
    """One split.

    Args:
        which: ``train``, ``calibration``, ``eval`` or ``ood``; used in messages and as the default split of bundled data.
    """
    paths = [source.path] if isinstance(source.path, str) else list(source.path or [])
    name = f"data.{which} ({', '.join(Path(p).name or p for p in paths)})"
    if len(paths) == 1 and paths[0].startswith("bundled:"):
        return _bundled(source, paths[0].removeprefix("bundled:"), which, seed, name)
    rows = _read(source, paths, name)
    if len(rows) == 0:
        raise DataError(f"{name}: is empty")
    columns = guess_columns(rows.column_names) | source.columns
    _check_columns(columns, rows.column_names, name)
    try:
        rows, classes = undecoded(rows, columns)
    except UnicodeDecodeError as e:
        raise DataError(f"{name}: holds text that is not UTF-8: {_line(e)}") from e
    folder = Path(paths[0]).parent if Path(paths[0]).is_file() else Path(paths[0]) if Path(paths[0]).is_dir() else None
    examples = Examples(rows, name, columns, source.classes or classes, source.skip_damaged, folder=folder)
    return _sample(examples, source.samples, seed)


def _check_columns(columns: Mapping[str, str], names: Sequence[str], name: str) -> None:
    for role, column in columns.items():
        if role not in ROLE_NAMES:
            raise DataError(f"{name}: columns: " + one_of("role", role, ROLE_NAMES))
        if column not in names:
            raise DataError(f"{name}: columns.{role}: " + one_of("column", column, names))


def _bundled(source: Source, name: str, which: str, seed: int, shown: str) -> Examples:
    if name not in BUNDLED:
        raise DataError(f"data.{which}.path: " + one_of("bundled data set", name, list(BUNDLED)))
    split = source.split or BUNDLED_SPLIT[which]
    if split not in BUNDLED_COUNT:
        raise DataError(f"data.{which}.split: " + one_of("split", split, list(BUNDLED_COUNT)))
    rows = BUNDLED[name](cast(Any, split), source.samples or BUNDLED_COUNT[split], seed)
    columns = guess_columns(list(rows[0])) | source.columns
    _check_columns(columns, list(rows[0]), shown)
    classes = source.classes or (CLASSES if "label" in columns else None)
    return Examples(rows, shown, columns, classes, source.skip_damaged, synthetic=True)


def _read(source: Source, paths: Sequence[str], name: str) -> datasets.Dataset:
    try:
        if any(Path(p).exists() or _looks_local(p) for p in paths):
            missing = [p for p in paths if not Path(p).exists()]
            if missing:
                raise DataError(f"{name}: {missing[0]} does not exist")
            return _read_local(paths, source, name)
        if len(paths) > 1:
            raise DataError(f"{name}: several paths must be local files; {paths[0]} is none")
        found = datasets.load_dataset(paths[0], source.config, split=source.split or "train")
        return cast(datasets.Dataset, found)
    except DatasetNotFoundError as e:
        raise DataError(f"{name}: neither a local path nor a hub data set: {_line(e)}") from e
    except StopIteration as e:
        raise DataError(f"{name}: is empty") from e
    except (DatasetGenerationError, pa.ArrowInvalid, pa.ArrowTypeError, tarfile.TarError) as e:
        raise DataError(f"{name}: damaged or of mixed content: {_line(e.__cause__ or e)}") from e
    except (OSError, ValueError, KeyError) as e:
        if isinstance(e, DataError):
            raise
        if "corresponds to no data" in str(e):
            raise DataError(f"{name}: is empty") from e
        raise DataError(f"{name}: cannot be read: {_line(e)}") from e


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or Path(path).suffix in BUILDERS or path.count("/") > 1


def _read_local(paths: Sequence[str], source: Source, name: str) -> datasets.Dataset:
    folder = Path(paths[0])
    if folder.is_dir() and len(paths) == 1:
        return _read_folder(folder, source, name)
    nothing = next((p for p in paths if Path(p).is_dir() or Path(p).stat().st_size == 0), None)
    if nothing is not None:
        why = "is a folder; of several paths each must be a file" if Path(nothing).is_dir() else "is empty"
        raise DataError(f"{name}: {nothing} {why}")
    kinds = {Path(p).suffix for p in paths}
    if len(kinds) > 1 or not kinds <= BUILDERS.keys():
        raise DataError(f"{name}: " + one_of("kind of file", ", ".join(sorted(kinds)), list(BUILDERS)))
    found = datasets.load_dataset(BUILDERS[kinds.pop()], data_files=list(paths), split="train")
    return cast(datasets.Dataset, found)


def _read_folder(folder: Path, source: Source, name: str) -> datasets.Dataset:
    if (folder / "state.json").exists():
        return cast(datasets.Dataset, datasets.load_from_disk(folder))
    for suffix in (".parquet", ".tar"):
        files = sorted(str(p) for p in folder.glob(f"*{suffix}"))
        if files:
            return cast(datasets.Dataset, datasets.load_dataset(BUILDERS[suffix], data_files=files, split="train"))
    if source.split is not None and (folder / source.split).is_dir():
        folder = folder / source.split
    if not any(p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif") for p in folder.rglob("*")):
        raise DataError(f"{name}: the folder holds neither Parquet nor WebDataset files nor pictures")
    return cast(datasets.Dataset, datasets.load_dataset("imagefolder", data_dir=str(folder), split="train"))


def _sample(examples: Examples, samples: int | None, seed: int) -> Examples:
    """That many examples, chosen without replacement, in the order of the data."""
    if samples is None or samples >= len(examples):
        return examples
    chosen = np.random.default_rng(seed).choice(len(examples), size=samples, replace=False)
    return examples.take(sorted(int(i) for i in chosen))


def _same_classes(found: dict[str, Examples]) -> None:
    """Labels that are texts or plain numbers name their classes by what occurs; all splits must agree on one list.

    Class lists that the data itself declares (ClassLabel, or ``classes`` in the recipe) must be equal.
    """
    with_classes = {k: v for k, v in found.items() if v.classes is not None and "label" in v.columns}
    lists = {tuple(v.classes or ()) for v in with_classes.values()}
    if len(lists) <= 1:
        return
    if all(_inferred(v) for v in with_classes.values()):
        longest = sorted({c for names in lists for c in names}, key=lambda c: (not c.isdigit(), int(c) if c.isdigit() else 0, c))
        for examples in with_classes.values():
            examples.classes = longest
        return
    (a, one), (b, other) = list(with_classes.items())[:2]
    differ = sorted(set(one.classes or []) ^ set(other.classes or []))[:3]
    raise DataError(f"{one.name} and {other.name}: have different classes (such as {differ}); data.{a} and data.{b} must agree")


def _inferred(examples: Examples) -> bool:
    rows = examples.rows
    return isinstance(rows, datasets.Dataset) and not isinstance(
        rows.features.get(examples.columns["label"]), datasets.ClassLabel
    )


def _line(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(e).__name__


def is_local(path: str) -> bool:
    """True for bundled data and for paths that can only be files or folders here; a hub id is not."""
    return path.startswith("bundled:") or Path(path).exists() or _looks_local(path)
