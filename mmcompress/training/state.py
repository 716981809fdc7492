"""The whole state of a training on disk, so that one that was killed goes on in the middle of an epoch to the same weights.

All that a next step depends on is in the state, or a function of the seed and the step's number (the order of the examples,
dropout). Only safetensors and JSON.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mmcompress import __version__
from mmcompress.context import Context
from mmcompress.files import write_json, writing_folder
from mmcompress.training import parallel
from mmcompress.training.feed import Feed
from mmcompress.training.holdout import Watch
from mmcompress.training.step import Runner

TENSORS, NUMBERS = "state.safetensors", "state.json"


class Checkpoints:
    """Writes the state of one training now and then, and reads it back.

    Attributes:
        seconds: what the trainings that were cut off had taken up to the state that was read.
        finished: whether the state that was read was one of a training at its end.
    """

    def __init__(self, context: Context, runner: Runner, feeds: tuple[Feed, Feed | None], watch: Watch | None) -> None:
        """Takes the next folder of the context's; without one, and where ``checkpoint_minutes`` is 0, nothing is written."""
        self.runner, self.watch = runner, watch
        self.feed, self.held = feeds
        self.seconds, self.finished = 0.0, False
        self._every = 60 * runner.settings.checkpoint_minutes
        self._began = self._last = time.monotonic()
        self.folder: Path | None = None
        if context.checkpoints is not None and self._every:
            self.folder = context.checkpoints / f"{context.trainings:02d}"
        context.trainings += 1
        self._identity = self._describe(context) if self.folder is not None else {}

    def _describe(self, context: Context) -> dict[str, Any]:
        """What must be the same for a state to be of this training; the weights that it begins with say what came before."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in [*self.runner.model.module.parameters(), *self.runner.model.module.buffers()]:
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        plan, settings = self.runner.plan, self.runner.settings
        return {
            "mmcompress": __version__,
            "torch": torch.__version__,
            "plan": [plan.what, plan.steps, plan.seed, plan.device.type, plan.precision, *plan.span],
            "settings": settings.model_dump(mode="json"),
            "task": context.need_task(plan.what).model_dump(mode="json"),
            "examples": [len(self.feed.examples), self.feed.batch_size],
            "objective": [[name, list(p.shape)] for name, p in self.runner.objective.named_parameters()],
            "weights": digest.hexdigest(),
        }

    def load(self) -> int:
        """Puts the state that is there into model, optimizer and all; the step of the feed to go on with, 0 without one.

        A state of another recipe, seed, version or beginning is thrown away, as is one that cannot be read.
        """
        if self.folder is None:
            return 0
        try:
            numbers = json.loads((self.folder / NUMBERS).read_text())
            if numbers["identity"] != json.loads(json.dumps(self._identity)):
                return self._forget()
            stored = load_file(self.folder / TENSORS, device="cpu")
            places = dict(self._tensors(numbers["looks"]))
            if {n: t.shape for n, t in stored.items()} != {n: t.shape for n, t in places.items()}:
                return self._forget()
        except FileNotFoundError:
            return 0
        except (OSError, json.JSONDecodeError, KeyError, TypeError, SafetensorError):
            return self._forget()
        with torch.no_grad():
            for name, tensor in places.items():
                tensor.copy_(stored[name])
        runner = self.runner
        runner.losses, runner.parts, runner.examples = numbers["losses"], numbers["parts"], numbers["examples"]
        if runner.average is not None:
            runner.average.steps = len(runner.losses)
        if self.watch is not None:
            self.watch.curve = [(step, loss) for step, loss in numbers["curve"]]
        for feed, damaged in zip((self.feed, self.held), numbers["damaged"], strict=True):
            if feed is not None:
                feed.damaged = {int(index): said for index, said in damaged.items()}
        self.seconds, self.finished = numbers["seconds"], numbers["finished"]
        self.feed.reached = int(numbers["reached"])
        return self.feed.reached

    def _forget(self) -> int:
        if self.folder is not None and parallel.rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        return 0

    def save_if_due(self) -> None:
        """Writes the state where the last one is old enough."""
        if self.folder is not None and time.monotonic() - self._last >= self._every:
            self.save()

    def save(self, *, finished: bool = False) -> None:
        """Writes the state beside and renames it into place; the main process alone does, as all hold the same.

        Raises:
            UserError: it cannot be written, such as on a full disk.
        """
        if self.folder is None or parallel.rank():
            return
        # What the teacher said is stored with it: asked again for other examples together, its last digits would differ.
        self.runner.objective.stop()
        tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self._tensors(self._looks())}
        numbers = {
            "identity": self._identity,
            "reached": self.feed.reached,
            "losses": self.runner.losses,
            "parts": self.runner.parts,
            "examples": self.runner.examples,
            "looks": self._looks(),
            "curve": self.watch.curve if self.watch is not None else [],
            "damaged": [feed.damaged if feed is not None else {} for feed in (self.feed, self.held)],
            "seconds": self.seconds + time.monotonic() - self._began,
            "finished": finished,
        }
        with writing_folder(self.folder) as beside:
            save_file(tensors, beside / TENSORS)
            write_json(beside / NUMBERS, numbers)
        self._last = time.monotonic()

    def _looks(self) -> bool:
        """Whether there are best weights."""
        return self.watch is not None and bool(self.watch.best)

    def _tensors(self, looks: bool) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the state by a name of its own; those that are not there yet, such as moments, are made."""
        runner = self.runner
        yield from _named("model", runner.model.module)
        yield from _named("objective", runner.objective)
        for i, parameter in enumerate(runner.parameters):
            state = _moments(runner.optimizer, parameter)
            yield from ((f"optimizer.{i}.{name}", value) for name, value in sorted(state.items()))
        if runner.average is not None:
            yield from ((f"average.{i}", value) for i, value in enumerate(runner.average.values))
        if self.watch is not None and looks:
            if not self.watch.best:
                self.watch.best = [value.detach().clone() for value in self.watch.state()]
            yield from ((f"best.{i}", value) for i, value in enumerate(self.watch.best))


def _named(what: str, module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        yield f"{what}.{name}", value


def _moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Mapping[str, torch.Tensor]:
    """AdamW's state of a parameter; for one that had no gradient yet as AdamW begins it: zeros, which change nothing."""
    state: dict[str, torch.Tensor] = optimizer.state[parameter]
    if not state:
        # The counter of steps lives where AdamW puts it: beside the parameter where the update is fused.
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if optimizer.defaults["fused"] else "cpu")
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state
