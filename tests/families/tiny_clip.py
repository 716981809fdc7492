"""CLIP in small; see tests/tiny.py."""

from __future__ import annotations

from tests import tiny

MODELS = {"clip": tiny.clip}
TASKS = {"clip": "zero-shot-image-classification"}
