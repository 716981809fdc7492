"""Trainings of several kinds, done by this process or by several together, for `test_parallel`."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from mmcompress import processes, registry
from mmcompress.context import Context
from mmcompress.model import CompressedModel
from mmcompress.passes.base import Pass
from mmcompress.passes.distill import Distill
from mmcompress.passes.finetune import Finetune
from mmcompress.passes.qat import Qat
from mmcompress.quantization.fake import FakeQuantLinear
from mmcompress.training import parallel
from mmcompress.training.settings import EarlyStop
from tests import tiny, tiny_data
from tests.families import tiny_blip, tiny_siglip, tiny_vilt

SHORT: dict[str, Any] = {"batch_size": 12, "precision": "fp32", "learning_rate": 1e-3, "epochs": 2}
STOP = EarlyStop(every=0.5, holdout=0.2, patience=50)
LOSSES = {"task": 1.0, "affinity": 1.0, "interactive": 1.0}


class Unexported(Qat):
    """The training alone."""

    def _export(self, *_: Any) -> dict[str, Any]:
        return {}


Case = tuple[Callable[[], CompressedModel], str, Pass, int]
QUICK = ("pairs", "distilled")
CASES: dict[str, Case] = {
    "pairs": (tiny.clip, "image-text-retrieval", Finetune(**SHORT), 24),
    "uneven": (tiny_siglip.siglip, "image-text-retrieval", Finetune(**{**SHORT, "batch_size": 7}, micro_batch=2), 24),
    "distilled": (tiny.clip, "image-text-retrieval", Distill(**SHORT, losses=LOSSES, freeze=["text"], ema=0.9), 24),
    "watched": (tiny.clip, "zero-shot-image-classification", Finetune(**SHORT, early_stop=STOP), 40),
    "captions": (tiny_blip.captions, "image-to-text", Finetune(**SHORT, micro_batch=4), 24),
    "answers": (tiny_vilt.MODELS["vilt"], "visual-question-answering", Distill(**SHORT), 24),
    "rounded": (tiny.clip, "image-text-retrieval", Unexported(**SHORT, freeze_ranges=0.0), 24),
    "fewer": (tiny.clip, "zero-shot-image-classification", Finetune(**{**SHORT, "batch_size": 1}, max_steps=2), 4),
}


def train(name: str) -> CompressedModel:
    """One of the cases."""
    make, kind, step, count = CASES[name]
    task = registry.find("tasks", kind).TASK.model_validate({"type": kind})
    examples = tiny_data.examples(count)
    examples.narrow(task.roles, task.type, task.optional)
    model = make()
    if processes.rank():  # the main process's weights are what counts
        for parameter in model.module.parameters():
            parameter.data *= 1.5
    with tempfile.TemporaryDirectory() as work:
        where = Context(task=task, train=examples, device="cpu", baseline=make, workdir=Path(work))
        return step.apply(model, context=where)


def seen(rank: int) -> dict[str, float]:
    """What layers remember of rows that are other ones in each process, once they were told of each other's."""
    linear, norm = FakeQuantLinear(nn.Linear(1, 1)), nn.BatchNorm1d(1)
    rows = torch.tensor([[[-1.0], [2.0]], [[-3.0], [1.0]]][rank])
    linear(rows)
    norm(rows)
    parallel.share_seen(nn.ModuleList([linear, norm]))
    return {"minimum": float(linear.minimum), "maximum": float(linear.maximum), "mean": float(norm.running_mean)}


def one(rank: int, port: int, folder: Path, names: list[str]) -> None:
    """What one of two processes does: it leaves its own weights and facts."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with processes.joined():
        (folder / f"seen-{rank}.json").write_text(json.dumps(seen(rank)))
        for name in names:
            model = train(name)
            weights = {n: p.detach().contiguous() for n, p in model.module.named_parameters()}
            save_file(weights, folder / f"{name}-{rank}.safetensors")
            (folder / f"{name}-{rank}.json").write_text(json.dumps(model.history[0]["result"]))


def main(folder: Path, names: list[str]) -> int:
    """Two processes that are forked, so that the imports, which take longest, are done once; how many failed."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=one, args=(rank, port, folder, names), daemon=True) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(250)
    return sum(process.exitcode != 0 for process in started)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
