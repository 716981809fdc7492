"""What somebody else needs to make the same numbers again: commands, versions, seed, and what the inputs were."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcompress.report.schema import Report


@dataclass(frozen=True)
class Again:
    """How to run it again.

    Attributes:
        commands: for a shell, in the run's folder.
        constraints: the versions in the form of pip's constraints file; empty where they were not recorded.
        facts: (name, value) of what must be the same.
        inputs: (name, size in bytes) of the local files that the run was made from, where the run's folder is known.
    """

    commands: str
    constraints: str
    facts: tuple[tuple[str, str], ...]
    inputs: tuple[tuple[str, str], ...]


def recipe_hash(report: Report) -> str:
    """SHA-256 of the resolved recipe as JSON with sorted keys and without spaces: equal for equal settings."""
    text = json.dumps(report.recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def reproduce(report: Report, folder: Path | None) -> Again:
    """What there is to say about a run.

    Args:
        folder: the run's folder, whose ``run.json`` knows the inputs.
    """
    versions = report.environment.get("versions")
    known = {k: v for k, v in versions.items() if v and v != "missing"} if isinstance(versions, dict) else {}
    facts = [("Recipe, SHA-256", recipe_hash(report))] if report.recipe else []
    asked = [
        ("Seed", report.recipe.get("seed")),
        ("Threads", report.environment.get("threads")),
        ("mmcompress", known.get("mmcompress")),
        ("Python", report.environment.get("python")),
        ("Platform", report.environment.get("platform")),
        ("Processor", report.environment.get("cpu")),
    ]
    facts += [(name, str(value)) for name, value in asked if value is not None]
    pins = "".join(f"{name}=={version}\n" for name, version in sorted(known.items()))
    return Again("mmcompress run recipe.yaml -o again\nmmcompress compare . again\n", pins, tuple(facts), _inputs(folder))


def _inputs(folder: Path | None) -> tuple[tuple[str, str], ...]:
    path = folder / "run.json" if folder is not None else None
    if path is None or not path.is_file():
        return ()
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:  # the report stands without it; `run` says what to do about the file
        return ()
    inputs = found.get("inputs") if isinstance(found, dict) else None
    return tuple((name, size) for name, value in (inputs or {}).items() if (size := _size(value)))


def _size(value: Any) -> str:
    """The size in a fingerprint of ``fingerprints.py``: [bytes, time], or a list of [name, bytes, time]."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        return f"{sum(int(part[1]) for part in value):,} bytes"
    return f"{int(value[0]):,} bytes" if isinstance(value, list) and value else ""
