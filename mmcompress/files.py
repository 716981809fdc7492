"""Files and folders that are whole or not there: written beside, flushed, renamed into place."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmcompress.errors import UserError

PARTIAL = ".partial"


def is_full_disk(e: BaseException) -> bool:
    """True for a write that failed for want of space, whichever library says it in its own words."""
    if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left on device" in str(e) or "os error 28" in str(e)


def disk_error(e: BaseException, path: Path) -> UserError:
    """The one message for a write that failed."""
    if is_full_disk(e):
        return UserError(f"{path}: the disk is full; free some space and run the same command again to go on")
    return UserError(f"{path}: cannot be written: {getattr(e, 'strerror', None) or e}")


@contextmanager
def writing_folder(target: Path) -> Iterator[Path]:
    """A fresh folder beside ``target`` that replaces it when the block ends well, and is removed when it does not.

    Raises:
        UserError: the folder cannot be written, such as on a full disk.
    """
    beside = target.with_name(target.name + PARTIAL)
    old = target.with_name(target.name + ".old" + PARTIAL)
    made_parent = not target.parent.exists()
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        yield beside
        for path in beside.rglob("*"):
            if path.is_file():
                _flush(path)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        beside.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        raise disk_error(e, target) from e
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if made_parent:
            with suppress(OSError):  # it holds the target, or something of another's
                target.parent.rmdir()


def write_text(path: Path, text: str) -> None:
    """Writes a text file beside and renames it into place.

    Raises:
        UserError: the file cannot be written.
    """
    beside = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        _flush(beside)
        beside.replace(path)
    except OSError as e:
        beside.unlink(missing_ok=True)
        raise disk_error(e, path) from e


def write_json(path: Path, value: Any) -> None:
    """Writes JSON beside and renames it into place; NaN is refused, as JSON has none."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def folder_bytes(folder: Path, pattern: str = "*") -> int:
    """The bytes of the files in a folder (and below) whose names match a glob pattern."""
    return sum(p.stat().st_size for p in folder.rglob(pattern) if p.is_file())


def _flush(path: Path) -> None:
    with path.open("rb+") as held:
        os.fsync(held.fileno())


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under a second name, without its bytes twice where the file system can do that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
