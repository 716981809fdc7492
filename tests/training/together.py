"""Trainings of several kinds, done by this process or by several together, for `test_parallel`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mmcompress import processes, registry
from mmcompress.context import Context
from mmcompress.model import CompressedModel
from mmcompress.passes.base import Pass
from mmcompress.passes.distill import Distill
from mmcompress.passes.finetune import Finetune
from mmcompress.training.settings import EarlyStop
from tests import tiny, tiny_data
from tests.families import tiny_blip, tiny_siglip, tiny_vilt

SHORT: dict[str, Any] = {"batch_size": 12, "precision": "fp32", "learning_rate": 1e-3, "epochs": 2}
STOP = EarlyStop(every=0.5, holdout=0.2, patience=50)
LOSSES = {"task": 1.0, "affinity": 1.0, "interactive": 1.0}
Case = tuple[Callable[[], CompressedModel], str, Pass, int]
CASES: dict[str, Case] = {
    "pairs": (tiny.clip, "image-text-retrieval", Finetune(**SHORT), 24),
    "uneven": (tiny_siglip.siglip, "image-text-retrieval", Finetune(**{**SHORT, "batch_size": 7}, micro_batch=2), 24),
    "distilled": (tiny.clip, "image-text-retrieval", Distill(**SHORT, losses=LOSSES, freeze=["text"], ema=0.9), 24),
    "watched": (tiny.clip, "zero-shot-image-classification", Finetune(**SHORT, early_stop=STOP), 40),
    "captions": (tiny_blip.captions, "image-to-text", Finetune(**SHORT, micro_batch=4), 24),
    "answers": (tiny_vilt.MODELS["vilt"], "visual-question-answering", Distill(**SHORT), 24),
    "fewer": (tiny.clip, "zero-shot-image-classification", Finetune(**{**SHORT, "batch_size": 1}, max_steps=2), 4),
}


def train(name: str, checkpoints: Path | None = None) -> tuple[CompressedModel, Context]:
    """One of the cases."""
    make, kind, step, count = CASES[name]
    task = registry.find("tasks", kind).TASK.model_validate({"type": kind})
    examples = tiny_data.examples(count)
    examples.narrow(task.roles, task.type, task.optional)
    where = Context(task=task, train=examples, device="cpu", baseline=lambda: make(), checkpoints=checkpoints)
    return step.apply(make(), context=where), where


def main(folder: Path) -> None:
    """All cases; each process leaves its own weights and facts."""
    torch.set_num_threads(1)
    with processes.joined():
        for name in CASES:
            model, _ = train(name)
            save_file(
                {n: p.detach().contiguous() for n, p in model.module.named_parameters()},
                folder / f"{name}-{processes.rank()}.safetensors",
            )
            (folder / f"{name}-{processes.rank()}.json").write_text(json.dumps(model.history[0]["result"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
