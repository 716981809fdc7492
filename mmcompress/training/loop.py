"""The one training loop, on Accelerate: seeded, checked at every step, and without a trace left in the process.

Shapes: B examples in a batch, U distinct texts, D embedding width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from transformers import PreTrainedModel

from mmcompress.context import Context
from mmcompress.errors import RecipeError, TrainingError
from mmcompress.families.base import Batch, Family, Outputs
from mmcompress.model import CompressedModel
from mmcompress.training.autocast import Float32Attention
from mmcompress.training.device import pick_device, pick_precision
from mmcompress.training.feed import Feed
from mmcompress.training.objective import Objective
from mmcompress.training.settings import TrainingSettings

MOST_LOG_SCALE = math.log(100)
"""CLIP's limit on the logit scale (Radford et al. 2021, section 2.5)."""


def train(
    model: CompressedModel,
    context: Context,
    settings: TrainingSettings,
    objective: Objective,
    what: str = "finetune",
    before_step: Callable[[int, int], None] | None = None,
    span: tuple[float, float] = (0.0, 1.0),
) -> dict[str, Any]:
    """Trains a model's module in place.

    Twice with the same arguments on the same machine gives bit-equal weights on a CPU, whatever random numbers were drawn
    before; the caller's random state is as it was afterwards.

    Args:
        model: the passes give a clone; after an error it is of no use.
        context: gives the task, the training examples and the seed, and receives timings and warnings.
        objective: what to minimise.
        what: the pass's name, for messages and the progress bar.
        before_step: called with the step's number and the number of steps.
        span: which part of the learning rate's schedule this training is, from 0 to 1: several in a row share one.

    Returns:
        Facts for the history, the same in every repetition: steps, examples, losses.

    Raises:
        TrainingError: a loss or a gradient is not finite.
        DataError: a picture or recording that does not decode and may not be skipped.
        RecipeError: ``freeze`` names no tower, or all of them; the task asks for what the model cannot do.
    """
    task, examples = context.need_task(what), context.need_train(what)
    examples.need(task.roles, task.type, task.optional)
    task.fits(model.family.abilities, model.family.name)
    device = pick_device(settings.device if settings.device != "auto" else context.device)
    precision = pick_precision(settings.precision, device)
    feed = Feed(examples, model.processor, task, settings.batch_size, context.seed, settings.workers)
    steps = count_steps(settings, feed.steps_per_epoch)
    home = next(model.module.parameters()).device
    began = time.perf_counter()
    with _seeded(context.seed, device), _accelerator(device, precision) as accelerator, _frozen(model, settings, what):
        objective.start(accelerator.device, precision)
        runner = _Runner(model, objective, settings, accelerator, steps, what, span)
        batches = context.reporter.track(feed.batches(steps), what, total=steps)
        for step, batch in enumerate(batches):
            if before_step is not None:
                before_step(step, steps)
            loss = runner.step(step, {name: values.to(accelerator.device) for name, values in batch.items()})
            context.reporter.note(f"loss {loss:.3f}")
        accelerator.free_memory()
    model.module.to(home).eval()
    _report(context, what, runner, feed, time.perf_counter() - began)
    return {
        **runner.facts(),
        "batch_size": feed.batch_size,
        "precision": precision,
        "device": device.type,
        "skipped": len(feed.damaged),
    }


def _report(context: Context, what: str, runner: _Runner, feed: Feed, seconds: float) -> None:
    """Gives the context what may differ between repetitions, and a sentence about examples that were left out."""
    context.facts |= {
        "steps": len(runner.losses),
        "examples_seen": runner.examples,
        "seconds": round(seconds, 3),
        "data_seconds": round(feed.seconds, 3),
        "examples_per_second": round(runner.examples / seconds, 2),
        "final_loss": runner.facts()["final_loss"],
        **runner.objective.facts(),
    }
    if feed.damaged:
        context.warnings.append(
            f"{what}: {len(feed.damaged)} of {len(feed.examples)} training examples were left out because they cannot be used; "
            f"the first: {next(iter(feed.damaged.values()))}"
        )


def count_steps(settings: TrainingSettings, steps_per_epoch: int) -> int:
    """The number of steps: epochs rounded to whole steps, at least one, at most ``max_steps``."""
    steps = max(1, round(settings.epochs * steps_per_epoch))
    return min(steps, settings.max_steps) if settings.max_steps is not None else steps


def rate_share(step: int, steps: int, warmup: float, span: tuple[float, float] = (0.0, 1.0)) -> float:
    """The learning rate of a step as a share of its peak: a straight rise over ``warmup`` of all steps, then a half cosine.

    The rise ends at 1 in its last step; the cosine starts from 1 and would reach 0 one step after the last one, so that no
    step is wasted (Loshchilov and Hutter 2017, equation 5).

    Args:
        steps: of this training.
        span: where in the whole schedule this training begins and ends, 0 to 1.
    """
    start, end = span
    every = steps / (end - start)
    place = step + start * every
    rise = math.ceil(warmup * every)
    if place < rise:
        return min(1.0, (place + 1) / rise)
    return 0.5 * (1 + math.cos(math.pi * (place - rise) / (every - rise)))


def parameter_groups(module: nn.Module, extra: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of what is trained: matrices and kernels with decay; biases, norms, scales, embeddings, ``extra`` without."""
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    trained = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1 and id(p) not in tables]
    known = {id(p) for p in decayed}
    rest = [p for p in trained if id(p) not in known]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [*rest, *extra], "weight_decay": 0.0},
    ]


class _Forward(nn.Module):
    """The family's forward pass as a module, which is what Accelerate wraps in autocast."""

    def __init__(self, family: Family, module: PreTrainedModel, float32_attention: bool) -> None:
        super().__init__()
        self.family, self.module, self.float32_attention = family, module, float32_attention

    def forward(self, batch: Batch) -> dict[str, Any]:
        """The outputs as a dict, which Accelerate knows how to turn back into float32."""
        with Float32Attention() if self.float32_attention else nullcontext():
            outputs = self.family.forward(self.module, batch)
        found = {"embeds": outputs.embeds, "logit_scale": outputs.logit_scale}
        found |= {"logits": outputs.logits, "logit_bias": outputs.logit_bias}
        return {name: value for name, value in found.items() if value is not None}


class _Runner:
    """Model, optimiser and schedule; one step at a time."""

    def __init__(
        self,
        model: CompressedModel,
        objective: Objective,
        settings: TrainingSettings,
        accelerator: Accelerator,
        steps: int,
        what: str,
        span: tuple[float, float],
    ) -> None:
        self.objective, self.settings, self.accelerator = objective, settings, accelerator
        self.steps, self.what, self.span = steps, what, span
        on_cpu = accelerator.device.type == "cpu"
        slow = on_cpu and accelerator.mixed_precision == "bf16"
        forward = _Forward(model.family, model.module, slow).to(accelerator.device)
        groups = parameter_groups(model.module, list(objective.parameters()), settings.weight_decay)
        fused = accelerator.device.type in ("cpu", "cuda")
        # CLIP's betas and epsilon (Radford et al. 2021, table 19, for ViT).
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=fused)
        self.parameters = [p for group in groups for p in group["params"]]
        self.forward, self.optimizer = accelerator.prepare(forward, optimizer)
        scale = getattr(model.module, "logit_scale", None)
        self.log_scale = scale if isinstance(scale, nn.Parameter) else None
        # Some models (SigLIP) come with a higher scale than CLIP's limit: it may stay, but not rise.
        start = self.log_scale.detach().max().item() if self.log_scale is not None else 0.0
        self.most = max(MOST_LOG_SCALE, start)
        self.losses: list[float] = []
        self.parts: list[dict[str, float]] = []
        self.examples = 0

    def step(self, step: int, batch: Batch) -> float:
        """Forward, backward, update; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * rate_share(step, self.steps, self.settings.warmup, self.span)
        found = self.forward({name: values for name, values in batch.items() if name not in ("target", "index")})
        parts = self.objective(Outputs(**found), batch)
        total = torch.stack(list(parts.values())).sum()
        said = {name: value.item() for name, value in parts.items()}
        for name, value in said.items():
            self._check(value, f"the loss {name!r} is", step)
        self.accelerator.backward(total)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.settings.grad_clip or math.inf)
        if norm is not None:
            self._check(float(norm), "the norm of the gradients is", step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.log_scale is not None:
            self.log_scale.data.clamp_(max=self.most)
        self.examples += len(batch["index"])
        self.losses.append(total.item())
        self.parts.append(said)
        return self.losses[-1]

    def _check(self, value: float, said: str, step: int) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"{self.what}: step {step + 1} of {self.steps}: {said} {value}; a lower learning_rate or precision: fp32 may help"
            )

    def facts(self) -> dict[str, Any]:
        """What was done, and the losses: of the first step, and the mean over the last tenth, in all and by part."""
        last = max(1, len(self.losses) // 10)
        tail = self.parts[-last:]
        return {
            "steps": len(self.losses),
            "examples": self.examples,
            "first_loss": round(self.losses[0], 6),
            "final_loss": round(sum(self.losses[-last:]) / last, 6),
            "final_losses": {name: round(sum(part[name] for part in tail) / last, 6) for name in self.parts[0]},
        }


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from the seed in the block, and the caller's own ones after it."""
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _accelerator(device: torch.device, precision: str) -> Iterator[Accelerator]:
    """An Accelerator of its own kind, whatever kind was made in this process before.

    Accelerate keeps the first one's device and precision in class-wide dicts and refuses others; they are set aside.
    """
    states: list[Any] = [AcceleratorState, PartialState, GradientState]
    kept = [dict(state._shared_state) for state in states]
    try:
        for state in states:
            state._shared_state.clear()
        yield Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if precision == "bf16" else "no")
    finally:
        for state, old in zip(states, kept, strict=True):
            state._shared_state.clear()
            state._shared_state.update(old)


@contextmanager
def _frozen(model: CompressedModel, settings: TrainingSettings, what: str) -> Iterator[None]:
    """Train mode in the block, with the towers of ``freeze`` left alone; afterwards everything can be trained again."""
    towers = model.family.tower_modules(model.module)
    wrong = settings.freeze_mistakes(list(towers))
    if wrong:
        raise RecipeError(f"{what}: " + "; ".join(wrong))
    model.module.train()
    stopped = [p for name in settings.freeze for part in towers[name] for p in part.parameters() if p.requires_grad]
    try:
        for name in settings.freeze:
            for part in towers[name]:
                part.eval()
        for parameter in stopped:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in stopped:
            parameter.requires_grad_(True)
        model.module.eval()
