"""Reads the report of a run's folder. Torch-free."""

from __future__ import annotations

from pathlib import Path

from mmcompress.errors import ModelError
from mmcompress.report.schema import Report


def open_run(folder: str | Path) -> Report:
    """The report of a finished or half-finished run.

    Raises:
        ModelError: the folder holds no report, or a damaged one.
    """
    path = Path(folder) / "report.json"
    if not path.exists():
        raise ModelError(f"{folder}: holds no report.json; `mmcompress run RECIPE -o {folder}` makes one")
    try:
        return Report.model_validate_json(path.read_text())
    except (ValueError, OSError) as e:
        raise ModelError(f"{path}: damaged, or of another version: {str(e).splitlines()[0]}") from e
