"""Settings of all tests: offline, two threads, no progress bars of libraries."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tests import tiny

from mmcompress.logs import silence_libraries
from mmcompress.model import CompressedModel

torch.set_num_threads(2)
silence_libraries()


@pytest.fixture
def model() -> CompressedModel:
    """A tiny CLIP."""
    return tiny.clip()
