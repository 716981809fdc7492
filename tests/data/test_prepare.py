"""Prepared pictures are kept for who prepares them the same way, and for nobody else."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmcompress.data.examples import Examples, as_examples
from mmcompress.data.prepare import prepared
from mmcompress.model import load
from mmcompress.passes.prune import Prune
from mmcompress.processor import Processor
from tests import tiny


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each call of a processor was given."""
    found: list[int] = []
    stock = Processor.media

    def media(self: Processor, kind: str, items: list[Image.Image]) -> list[dict[str, object]]:
        found.append(len(items))
        return stock(self, kind, items)  # type: ignore[return-value] # its tensors are passed on as they are

    monkeypatch.setattr(Processor, "media", media)
    return found


def pixels(examples: Examples, processor: Processor) -> np.ndarray:
    return np.concatenate([media["pixel_values"] for _, media in prepared(examples, processor)])


def test_another_processor_never_sees_what_the_first_one_made(asked: list[int]) -> None:
    model, examples = tiny.clip(), as_examples(tiny.dataset(20))
    other = copy.copy(model.processor)
    other.image_processor = copy.deepcopy(model.processor.image_processor)
    other.image_processor.image_mean = [0.1, 0.2, 0.3]
    first, second = pixels(examples, model.processor), pixels(examples, other)
    assert asked == [20, 20]
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(second, np.stack([m["pixel_values"] for m in other.media("image", list(_images(examples)))]))
    np.testing.assert_array_equal(pixels(examples, model.processor), first)


def _images(examples: Examples) -> list[Image.Image]:
    return [examples.media(i) for i in range(len(examples))]


def test_a_pruned_and_reloaded_model_uses_what_the_baseline_prepared(asked: list[int], tmp_path: Path) -> None:
    model, examples = tiny.clip(), as_examples(tiny.dataset(20))
    first = pixels(examples, model.processor)
    cut = Prune(axis="ffn", ratio={"vision": 0.5}).apply(model)
    cut.save(tmp_path / "cut")
    again = load(tmp_path / "cut")
    assert again.processor is not model.processor
    asked.clear()
    np.testing.assert_array_equal(pixels(examples, again.processor), first)
    assert asked == []
