"""Imports run one way, and a new pass, task, criterion or loss is one file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mmcompress"
# A room may import from rooms of its own level and of those below it.
LEVELS = [
    {
        "errors",
        "files",
        "registry",
        "progress",
        "recipe",
        "recipe_errors",
        "recipe_yaml",
        "robustness_settings",
        "environment",
        "context",
        "heap",
        "politeness",
        "processes",
    },
    {"config"},
    {"processor"},
    {"model"},
    {"families", "data", "runtimes", "tasks"},
    {"training", "quantization", "pruning", "measure"},
    {"passes"},
    {
        "logs",
        "report",
        "chain",
        "curves",
        "fingerprints",
        "origins",
        "build",
        "plan",
        "plan_text",
        "inspect",
        "evaluate",
        "bench",
        "listing",
        "doctor",
        "steps",
        "robust",
        "run_folder",
    },
    {"cli"},
    {"__main__"},
]
# What each of these imports from above it, and why that is not a way up.
ALLOWED = {
    ("model", "families"): "for types only",
    ("processor", "families"): "for types only",
    ("processor", "data"): "recordings, data/audio.py, which imports nothing but errors",
    ("config", "families"): "for types only",
    ("context", "model"): "for types only",
    ("context", "data"): "for types only",
    ("context", "tasks"): "for types only",
    ("measure", "report"): "rows are the report's data model, report/schema.py",
    ("data", "report"): "leaks fill the report's data model, report/schema_data.py, which imports nothing of ours",
    ("tasks", "measure"): "formulas of metrics, which import nothing of ours",
    ("passes", "tasks"): "a task guessed from data, for passes called from Python",
    ("runtimes", "training"): "training/device.py picks the device",
}


def level(room: str) -> int:
    return next(i for i, rooms in enumerate(LEVELS) if room in rooms)


def imports(path: Path) -> set[str]:
    """Rooms of ours that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mmcompress."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("mmcompress.")}
    return found


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(PACKAGE)) for p in FILES])
def test_imports_run_one_way(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for other in imports(path):
        if (room, other) not in ALLOWED:
            assert level(other) <= level(room), f"{room} imports {other}"


def test_files_stay_readable() -> None:
    long = {str(p.relative_to(PACKAGE)): n for p in FILES if (n := len(p.read_text().splitlines())) > 450}
    assert long == {}


def test_nothing_unpickles_or_trusts_remote_code() -> None:
    for path in FILES:
        text = path.read_text()
        assert "import pickle" not in text, path
        assert "torch.load(" not in text, path
        assert "trust_remote_code=True" not in text, path
