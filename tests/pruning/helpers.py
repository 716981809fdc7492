"""What the tests of pruning share: a model without zeros and ones in it, a context with data, outputs of both towers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPModel

from mmcompress.context import Context
from mmcompress.data.examples import as_examples
from mmcompress.model import CompressedModel
from mmcompress.tasks.zero_shot_image_classification import ZeroShotImageClassification
from tests import tiny


def full(model: CompressedModel) -> CompressedModel:
    """Gives every parameter random values: fresh biases are 0 and LayerNorm scales 1, which would hide a wrong cut."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.module.named_parameters():
            if name != "logit_scale":
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (1.0 if "norm" in name else 0.0))
    return model


def context(count: int = 24, seed: int = 0) -> Context:
    """A task with training examples."""
    task = ZeroShotImageClassification(type="zero-shot-image-classification")
    return Context(task=task, train=as_examples(tiny.dataset(count)), seed=seed, device="cpu")


def embeds(model: CompressedModel, module: torch.nn.Module | None = None) -> dict[str, torch.Tensor]:
    """Both towers' embeddings for random inputs."""
    batch = model.family.example_batch(model.module.config, 3, seed=5)
    with torch.no_grad():
        return model.family.forward(module if module is not None else model.module, batch).embeds


def stock_reload_is_equal(model: CompressedModel, folder: Path) -> CLIPModel:
    """Saves with transformers, loads with transformers alone, and compares outputs bit by bit."""
    model.module.save_pretrained(folder)
    again, info = CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, theirs = embeds(model), embeds(model, again.eval())
    assert all(torch.equal(ours[t], theirs[t]) for t in ours)
    return again
