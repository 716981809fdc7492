"""A run's folder: which files are the run's own, who may work in it, and what it holds at the end."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mmcompress.errors import UserError
from mmcompress.files import PARTIAL, disk_error, link_or_copy, writing_folder

STATE_FILE = "run.json"
STEP_FILE = "step.json"
LEAKS_FILE = "leaks.json"
"""In `measurements`: what the splits have in common, looked for once."""
TRAINING = ".training"
"""Where the states of a step's unfinished trainings are."""
TIMING = ".timing"
"""Where the ONNX components of the baseline and the last step are until they are timed side by side."""
OWN = ("recipe.yaml", "report.html", "report.md", "report.json", "README.md", "log.txt", STATE_FILE)
OWN_FOLDERS = ("steps", "measurements", "model", "onnx", ".work", TRAINING, TIMING)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds the folder for one run; the kernel lets go of it however the process ends.

    Raises:
        UserError: it holds what no run left, another run is at work in it, or it cannot be made.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / STATE_FILE).exists():
        strangers = sorted(
            p.name for p in folder.iterdir() if p.name not in (".lock", "log.txt") and not p.name.endswith(PARTIAL)
        )
        if strangers:
            raise UserError(
                f"{folder}: holds {', '.join(strangers[:3])}, which no run of mmcompress left; choose another folder with -o"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout as e:
        raise UserError(f"{folder}: another run is at work in this folder; wait for it, or choose another folder with -o") from e
    except OSError as e:
        raise disk_error(e, folder) from e
    try:
        yield
    finally:
        lock.release()


def clear(folder: Path) -> None:
    """Throws away what an earlier run left in the folder, and nothing else."""
    for name in OWN:
        (folder / name).unlink(missing_ok=True)
    for name in OWN_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


def write_final(folder: Path, place: Path) -> None:
    """Copies the last kept step to ``model/``, and its ONNX components to ``onnx/`` beside the config and processor files.

    ``model/`` has them too, in a folder ``onnx`` of its own: the layout of the hub, which transformers.js opens as it is.

    Args:
        place: that step's folder.
    """
    files = [p for p in sorted(place.iterdir()) if p.is_file() and p.name != STEP_FILE]
    with writing_folder(folder / "model") as beside:
        for path in files:
            shutil.copy2(path, beside / path.name)
        if (place / "onnx").is_dir():
            (beside / "onnx").mkdir()
            for path in sorted((place / "onnx").iterdir()):
                link_or_copy(path, beside / "onnx" / path.name)
    if not (place / "onnx").is_dir():
        shutil.rmtree(folder / "onnx", ignore_errors=True)
        return
    with writing_folder(folder / "onnx") as beside:
        for path in [*files, *sorted((place / "onnx").iterdir())]:
            if path.suffix != ".safetensors":
                # Only the large files have one body under several names: small ones may be edited in place.
                (link_or_copy if ".onnx" in path.name else shutil.copy2)(path, beside / path.name)
