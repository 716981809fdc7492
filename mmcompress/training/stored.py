"""Rows of floats on disk that several runs and processes share: what teachers said, so that each is asked once.

A store is a folder of segments below one root. A segment is a plain .npy file of records (key, row) that is written beside,
flushed and renamed into place, and never changed afterwards: what is there is whole, whenever a process dies, and processes that
write at once write segments of their own. Segments are memory-mapped. The name of each holds the checksum of its bytes; one that
does not match, or does not fit the store, is deleted when the store is opened, and its rows are asked for again.

Shapes: N rows that are looked up, D their width.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from mmcompress.errors import UserError
from mmcompress.files import PARTIAL, folder_bytes, write_json

log = logging.getLogger(__name__)

KEY_BYTES = 16
"""Of a row's key, a truncated SHA-256: 2^64 rows would have to be stored before two are likely to share one."""
SUFFIX = ".npy"
ABANDONED_SECONDS = 3600
"""Nothing takes so long to write: what is older was left by a process that was killed."""
ABOUT = "about.json"
FOLDER_VARIABLE = "MMCOMPRESS_CACHE"


def cache_folder() -> Path:
    """Where stored rows lie: ``teacher`` in the folder that MMCOMPRESS_CACHE names, or in the user's cache directory."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named).expanduser() / "teacher"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "mmcompress" / "teacher"


def row_key(*parts: bytes) -> bytes:
    """A key of `KEY_BYTES` bytes for what a row was computed from."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest()[:KEY_BYTES]


class Store:
    """Float32 rows of one width by key. Rows that are put are known at once, and on disk after ``flush``.

    Nothing that happens to the disk stops the caller: what cannot be read is asked for again, what cannot be written is not
    stored, with a warning.

    Attributes:
        seconds_per_row: what a row took to compute when some last were, None where that is not known.
    """

    def __init__(self, name: str, width: int, limit_bytes: int, root: Path | None = None) -> None:
        """Opens a store, or begins one.

        Args:
            name: the store's folder; must say everything that its rows depend on beside their keys.
            width: D.
            limit_bytes: what all stores below the root may take; those not used for longest are deleted for a new segment.
            root: the folder of all stores; `cache_folder` where left out.
        """
        self.root = root if root is not None else cache_folder()
        self.folder, self.limit_bytes = self.root / name, limit_bytes
        self.record = np.dtype([("key", np.void, KEY_BYTES), ("row", "<f4", (width,))])
        self.seconds_per_row: float | None = None
        self._places: dict[bytes, tuple[int, int]] = {}
        self._maps: list[np.ndarray] = []
        self._pending: dict[bytes, np.ndarray] = {}
        self._writes = True
        self._open()

    def __len__(self) -> int:
        return len(self._places) + len(self._pending)

    @property
    def pending(self) -> int:
        """How many rows are not on disk yet."""
        return len(self._pending)

    def get(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Which keys are known, (N,) of bool, and the rows of those, (number of them, D)."""
        known = np.array([key in self._places or key in self._pending for key in keys], dtype=bool)
        rows = np.empty((int(known.sum()), *self.record["row"].shape), dtype=np.float32)
        for i, key in enumerate(key for key, there in zip(keys, known, strict=True) if there):
            if key in self._pending:
                rows[i] = self._pending[key]
            else:
                segment, place = self._places[key]
                rows[i] = self._maps[segment][place]["row"]
        return known, rows

    def put(self, keys: Sequence[bytes], rows: np.ndarray) -> None:
        """Adds rows, (N, D); a key that is known keeps the row that it has."""
        for key, row in zip(keys, rows, strict=True):
            if key not in self._places and key not in self._pending:
                self._pending[key] = np.array(row, dtype=np.float32)

    def flush(self) -> None:
        """Writes what is not on disk yet as one segment, if there is room; it stays known to this process in any case."""
        if not self._pending or not self._writes:
            return
        records = np.empty(len(self._pending), dtype=self.record)
        for i, (key, row) in enumerate(self._pending.items()):
            records[i] = (key, row)
        try:
            if not self._make_room(records.nbytes + 4096):
                self._stop(f"teacher embeddings take {self.limit_bytes:,} bytes, the limit of the cache; more are not stored")
                return
            path = self._write(records)
            self._map(path)
            self._pending = {}
        except (OSError, UserError) as e:
            self._stop(f"{self.folder}: teacher embeddings cannot be stored: {e}")

    def _open(self) -> None:
        with suppress(OSError, ValueError, TypeError):  # the rate is an estimate's basis, and nothing else
            found = json.loads((self.folder / ABOUT).read_text(encoding="utf-8"))["seconds_per_row"]
            self.seconds_per_row = float(found) if found is not None else None
        with suppress(OSError):  # nothing is there yet
            os.utime(self.folder)
        self._tidy()
        for path in sorted(self.folder.glob("*" + SUFFIX)):
            try:
                if hashlib.sha256(path.read_bytes()).hexdigest()[:16] != path.stem.split("-")[-1]:
                    raise ValueError("its bytes are not those that were written")
                self._map(path)
            except (OSError, ValueError, EOFError) as e:
                log.warning("%s: a damaged file of the teacher's cache is removed, and the teacher asked again: %s", path, e)
                with suppress(OSError):
                    path.unlink()

    def _tidy(self) -> None:
        """Removes what processes left that were killed while they wrote."""
        for path in self.folder.glob("*" + PARTIAL):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()

    def _map(self, path: Path) -> None:
        records = np.load(path, mmap_mode="r", allow_pickle=False)
        if records.dtype != self.record or records.ndim != 1:
            raise ValueError(f"holds {records.dtype}, not {self.record}")
        self._maps.append(records)
        for place, key in enumerate(records["key"].tolist()):
            self._places[key] = (len(self._maps) - 1, place)

    def _write(self, records: np.ndarray) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.folder / f"{uuid.uuid4().hex}{PARTIAL}"
        try:
            with beside.open("wb") as file:
                np.save(file, records, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            digest = hashlib.sha256(beside.read_bytes()).hexdigest()[:16]
            target = beside.with_name(f"{beside.stem}-{digest}{SUFFIX}")
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
        with suppress(UserError):  # another process writes it at this moment, and as well as this one
            write_json(self.folder / ABOUT, {"seconds_per_row": self.seconds_per_row})
        return target

    def _make_room(self, more: int) -> bool:
        """Deletes other stores, the one that was not used for longest first, until so many bytes more are within the limit."""
        total = folder_bytes(self.root)
        others = sorted((p for p in self.root.glob("*") if p.is_dir() and p != self.folder), key=lambda p: p.stat().st_mtime)
        while total + more > self.limit_bytes and others:
            oldest = others.pop(0)
            total -= folder_bytes(oldest)
            shutil.rmtree(oldest, ignore_errors=True)
            log.info("%s: deleted to make room for other teachers' embeddings", oldest)
        return total + more <= self.limit_bytes

    def _stop(self, why: str) -> None:
        self._writes = False
        log.warning("%s", why)


def usage() -> tuple[Path, int]:
    """Where stored rows lie, and how many bytes they take."""
    folder = cache_folder()
    return folder, folder_bytes(folder) if folder.is_dir() else 0
