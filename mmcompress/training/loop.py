"""The one training loop: seeded, checked at every step, and without a trace left in the process.

The parts: `schedule` (steps, rates), `step` (one step), `pieces` (micro batches and shares of processes), `average` (EMA),
`holdout` (early stop), `state` (going on after a stop), `parallel` (what processes tell each other).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from mmcompress.context import Context
from mmcompress.data.prepare import WORDS
from mmcompress.errors import RecipeError, TrainingError
from mmcompress.heap import give_back_blocks, keeping_blocks
from mmcompress.model import CompressedModel
from mmcompress.quantization.onnx_export import eager_attention
from mmcompress.training import parallel
from mmcompress.training.augment_settings import OF_IMAGES, OF_SOUNDS
from mmcompress.training.device import pick_device, pick_precision
from mmcompress.training.feed import Feed
from mmcompress.training.holdout import Watch, hold_out
from mmcompress.training.memory import lean_gradients
from mmcompress.training.objective import Objective
from mmcompress.training.schedule import count_steps
from mmcompress.training.settings import TrainingSettings
from mmcompress.training.state import Checkpoints
from mmcompress.training.step import Plan, Runner


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
    if settings.augment is not None and not settings.augment.changes(examples.kind):
        allowed = OF_IMAGES if examples.kind == "image" else OF_SOUNDS
        raise RecipeError(f"{what}: augment: changes nothing of these {WORDS[examples.kind]}s; set one of {', '.join(allowed)}")
    feed, held = _feeds(model, context, settings, what)
    plan = Plan(what, count_steps(settings, feed.steps_per_epoch), context.seed, device, precision, span)
    home = next(model.module.parameters()).device
    large = give_back_blocks(sum(p.nbytes for p in model.module.parameters()))
    blocks = nullcontext() if large else keeping_blocks()
    began = time.perf_counter()
    # For the whole training: checkpointing runs layers again in the backward pass, and they must do the same.
    eager = eager_attention(model.module) if "attentions" in objective.needs else nullcontext()
    rows = lean_gradients(model.module, device)
    modes = _seeded(context.seed, device), _frozen(model, settings, what), _checkpointing(model, settings, what)
    with ExitStack() as stack:
        for one in (blocks, *modes, eager, rows):
            stack.enter_context(one)
        objective.start(device, precision)
        parallel.copy_main([*model.module.parameters(), *model.module.buffers(), *objective.parameters()])
        runner = Runner(model, objective, settings, plan)
        watch = Watch(settings.early_stop, runner, held, feed.steps_per_epoch) if settings.early_stop and held else None
        state = Checkpoints(context, runner, (feed, held), watch)
        start = state.load()
        if parallel.of_main(start, device) != start:
            raise TrainingError(f"{what}: the processes read different checkpoints; they need one file system")
        if not state.finished:
            for batch in context.reporter.track(feed.batches(plan.steps, start), what, total=plan.steps - start):
                if before_step is not None:
                    before_step(len(runner.losses), plan.steps)
                loss = runner.step(batch)
                context.reporter.note(f"loss {loss:.3f}")
                if watch is not None and watch.done():
                    break
                state.save_if_due()
            objective.stop()
            _settle(runner, watch)
            if span[1] < 1:
                state.save(finished=True)  # others follow, which begin from it
    model.module.to(home).eval()
    if state.seconds:
        context.facts["resumed_seconds"] = context.facts.get("resumed_seconds", 0.0) + round(state.seconds, 3)
    context.facts["planned_steps"] = plan.steps
    _report(context, what, runner, feed, time.perf_counter() - began + state.seconds)
    facts = {**runner.facts(), **(watch.facts() if watch is not None else {})}
    skipped = len(feed.damaged) + (len(held.damaged) if held is not None else 0)
    return {**facts, "batch_size": feed.batch_size, "precision": precision, "device": device.type, "skipped": skipped}


def _settle(runner: Runner, watch: Watch | None) -> None:
    """Puts the weights that the training ends with into the model."""
    if watch is not None and watch.best:
        watch.restore()
    elif runner.average is not None:
        runner.average.swap()


def _feeds(model: CompressedModel, context: Context, settings: TrainingSettings, what: str) -> tuple[Feed, Feed | None]:
    """What is trained on, and what is held out if anything is."""
    task, examples = context.need_task(what), context.need_train(what)
    size, seed, workers = settings.batch_size, context.seed, settings.workers
    if settings.early_stop is None:
        return Feed(examples, model.processor, task, size, seed, workers, augment=settings.augment), None
    kept, held = hold_out(examples, settings.early_stop.holdout, seed, what)
    # What is held out is looked at as it is: its loss is to say how the model does on examples, not on their variants.
    watched = Feed(examples, model.processor, task, size, seed, workers, held)
    return Feed(examples, model.processor, task, size, seed, workers, kept, settings.augment), watched


def _report(context: Context, what: str, runner: Runner, feed: Feed, seconds: float) -> None:
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


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from the seed in the block, and the caller's own ones after it."""
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _checkpointing(model: CompressedModel, settings: TrainingSettings, what: str) -> Iterator[None]:
    """Gradient checkpointing in the block where the settings ask for it.

    Raises:
        RecipeError: the model's class cannot do it.
    """
    if not settings.checkpointing:
        yield
        return
    if not model.module.supports_gradient_checkpointing:
        name = type(model.module).__name__
        raise RecipeError(f"{what}: checkpointing: {name} of transformers does not support it; leave it out")
    with warnings.catch_warnings():
        # transformers 5.23 has a new name for both methods, which 5.0 lacks, and says so at every call.
        warnings.simplefilter("ignore", FutureWarning)
        model.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            yield
        finally:
            model.module.gradient_checkpointing_disable()


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
