"""mmcompress: compress pretrained multimodal models by recipe, and report honestly what was gained and lost.

Public names are loaded on first use, so that ``import mmcompress`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mmcompress import passes as passes
    from mmcompress.build import build_dual_encoder as build_dual_encoder
    from mmcompress.chain import RunResult as RunResult
    from mmcompress.chain import run as run
    from mmcompress.curves import sensitivity as sensitivity
    from mmcompress.model import CompressedModel as CompressedModel
    from mmcompress.model import load as load
    from mmcompress.recipe import Recipe as Recipe
    from mmcompress.recipe import load_recipe as load_recipe
    from mmcompress.report.schema import Report as Report

_WHERE = {
    "build_dual_encoder": "mmcompress.build",
    "CompressedModel": "mmcompress.model",
    "load": "mmcompress.model",
    "Recipe": "mmcompress.recipe",
    "load_recipe": "mmcompress.recipe",
    "Report": "mmcompress.report.schema",
    "RunResult": "mmcompress.chain",
    "run": "mmcompress.chain",
    "sensitivity": "mmcompress.curves",
}

__all__ = [
    "CompressedModel",
    "Recipe",
    "Report",
    "RunResult",
    "__version__",
    "build_dual_encoder",
    "load",
    "load_recipe",
    "passes",
    "run",
    "sensitivity",
]


def __getattr__(name: str) -> Any:
    if name == "passes":
        return importlib.import_module("mmcompress.passes")
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'mmcompress' has no attribute {name!r}")
