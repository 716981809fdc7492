"""Pictures and recordings that are in training and in evaluation data: exact duplicates by their bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast

import datasets

from mmcompress.data.examples import Examples


def shared_media(train: Examples, test: Examples) -> int:
    """How many evaluation pictures or recordings are, byte for byte, among the training ones.

    Bundled data is made without overlap and is not looked through. They are compared as they are stored, without decoding.
    """
    if not isinstance(train.rows, datasets.Dataset) or not isinstance(test.rows, datasets.Dataset):
        return 0
    seen = set(_hashes(train))
    return sum(found in seen for found in _hashes(test))


def same_media(examples: Examples) -> list[bytes] | list[int]:
    """For each example a value that is equal where pictures or recordings are, byte for byte as they are stored.

    Data that is no `datasets.Dataset` (made, bundled, relabelled) is taken to have none twice.
    """
    return _hashes(examples) if isinstance(examples.rows, datasets.Dataset) else list(range(len(examples)))


def _hashes(examples: Examples) -> list[bytes]:
    values = cast(datasets.Dataset, examples.rows)[examples.columns[examples.kind]]
    return [hashlib.blake2b(_bytes(value, examples), digest_size=16).digest() for value in values]


def _bytes(value: Any, examples: Examples) -> bytes:
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    if isinstance(value, bytes):
        return value
    path = (examples.folder or Path()) / str(value)
    return path.read_bytes() if path.is_file() else str(value).encode()
