"""Distillation's steps per second: answers of the teacher found on disk, the teacher asked each time, and a bare PyTorch loop.

    python benchmarks/distillation.py [--model MODEL] [--data DATA] [--rounds 3] [--threads 1] [--ratio 0.5] [--out R]

``warm`` is the pass `distill` with a filled cache, ``asked`` the same loop whose teacher forgets everything after each step, and
``bare`` a loop of the same arithmetic (batches, losses, AdamW, clipping, precision) over tensors that are all in memory before it
begins. The student lacks half of the FFN units of the tower that sees, or ``--ratio`` of them (0.77 is the half size of
`recovery.py`). The larger it is beside the teacher, the less a cache can save: a step costs about three forward passes of the
student, and asking one of the teacher.

Each runs in a process of its own, in interleaved rounds. The first epoch, in which pictures are decoded, is not counted but
printed. Prints medians over the rounds with their spread, and ratios within a round; writes the same as JSON. A ratio of
processor time knows less of what else the machine does than one of wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import mmcompress as mm
from mmcompress.context import Context
from mmcompress.data.examples import Examples
from mmcompress.data.sources import load_source
from mmcompress.environment import environment
from mmcompress.families.base import BESIDE_INPUTS
from mmcompress.logs import silence_libraries
from mmcompress.model import CompressedModel
from mmcompress.passes.distill import Distill
from mmcompress.passes.prune import Prune
from mmcompress.recipe import Source
from mmcompress.tasks._guess import guess_task
from mmcompress.training.device import pick_precision
from mmcompress.training.feed import Feed
from mmcompress.training.forward import Forward
from mmcompress.training.loop import train
from mmcompress.training.objective import DistillObjective, distillation
from mmcompress.training.schedule import parameter_groups, rate_share
from mmcompress.training.teacher import Teacher

CONTENDERS = ("warm", "asked", "bare")
AIMS = {"asked": 1.5, "bare": 0.95}
"""Steps per second of ``warm`` over those of the others, at least."""
CPU = torch.device("cpu")


def student_of(teacher: CompressedModel, ratio: float) -> CompressedModel:
    """Without that share of the FFN units of the tower that sees or hears."""
    tower = next(name for name in teacher.family.towers if name != "text")
    return Prune(axis="ffn", ratio={tower: ratio}).apply(teacher)


class Clock:
    """Wall and processor time from the first step that counts to the last one."""

    def __init__(self, first: int) -> None:
        self.first, self.began, self.start = first, time.perf_counter(), (0.0, 0.0)

    def tick(self, step: int) -> None:
        """Called before each step."""
        if step == self.first:
            self.start = time.perf_counter(), time.process_time()

    def rates(self, steps: int, batch_size: int) -> dict[str, float]:
        """Called after the last of ``steps`` steps."""
        counted = steps - self.first
        wall, spent = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
        return {
            "steps_per_second": counted / wall,
            "examples_per_second": counted * batch_size / wall,
            "steps_per_processor_second": counted / spent,
            "first_epoch_seconds": self.start[0] - self.began,
        }


def of_ours(name: str, teacher: CompressedModel, examples: Examples, settings: Distill, ratio: float) -> dict[str, float]:
    """The pass's own loop."""
    if name == "asked":
        settings = settings.model_copy(update={"teacher_cache_gb": 0.0})  # else the disk would answer
    student = student_of(teacher, ratio)
    context = Context(task=guess_task(examples), train=examples, baseline=teacher.clone, device="cpu")
    objective = distillation(settings, student, context, "distill")
    asked = objective.teacher
    assert asked is not None
    per_epoch = len(examples) // settings.batch_size
    steps = round(settings.epochs * per_epoch)
    clock = Clock(per_epoch)

    def before_step(step: int, _: int) -> None:
        if name == "asked":
            asked._known.zero_()
            asked._texts.clear()
        clock.tick(step)

    train(student, context, settings, objective, "distill", before_step)
    return {**clock.rates(steps, settings.batch_size), "data_seconds": context.facts["data_seconds"], **asked.facts()}


def of_bare(teacher: CompressedModel, examples: Examples, settings: Distill, ratio: float) -> dict[str, float]:
    """Everything in memory, then nothing but arithmetic; our modules of losses, none of our loop, feed or teacher."""
    student, task = student_of(teacher, ratio), guess_task(examples)
    precision = pick_precision(settings.precision, CPU)
    size, count = settings.batch_size, len(examples)
    per_epoch = count // size
    steps = round(settings.epochs * per_epoch)
    feed = Feed(examples, student.processor, task, size, 0)
    batches = list(feed.batches(per_epoch))
    see = Forward(teacher.family, teacher.module, CPU, precision)
    with torch.no_grad():
        answers = [see({k: v for k, v in batch.items() if k not in BESIDE_INPUTS}) for batch in batches]
    torch.manual_seed(0)
    weights = settings.weights(task)
    objective = DistillObjective(task, weights, student, Teacher(teacher, count))  # for its losses alone
    objective.start(CPU, precision)
    student.module.train()
    optimizer = torch.optim.AdamW(
        parameter_groups(student.module, list(objective.parameters()), settings.weight_decay),
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
        eps=1e-6,
        fused=True,
    )
    forward = Forward(student.family, student.module, CPU, precision)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    inputs = [{k: v for k, v in batch.items() if k not in BESIDE_INPUTS} for batch in batches]
    clock = Clock(per_epoch)
    for step in range(steps):
        clock.tick(step)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate_share(step, steps, settings.warmup)
        k = step % per_epoch
        outputs = forward(inputs[k])
        total = torch.stack(
            [weights[name] * loss(outputs, answers[k], batches[k]) for name, loss in objective.losses.items()]
            + [weights["task"] * task.loss(outputs, batches[k])]
        ).sum()
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    return clock.rates(steps, size)


def child(given: argparse.Namespace) -> dict[str, float]:
    """One contender in this process."""
    torch.set_num_threads(given.threads)
    silence_libraries()
    examples = load_source(Source.model_validate({"path": given.data, "samples": given.samples}), "train", 0)
    settings = Distill(batch_size=given.batch_size, epochs=given.epochs, precision=given.precision)
    teacher = mm.load(given.model)
    if given.only == "bare":
        return of_bare(teacher, examples, settings, given.ratio)
    return of_ours(given.only, teacher, examples, settings, given.ratio)


def run_child(name: str, given: argparse.Namespace, cache: str) -> dict[str, float]:
    """One contender in a process of its own, with the cache in ``cache``."""
    command = [sys.executable, __file__, "--only", name]
    for key in ("model", "data", "samples", "batch_size", "epochs", "threads", "precision", "ratio"):
        command += [f"--{key.replace('_', '-')}", str(getattr(given, key))]
    variables = {**os.environ, "MMCOMPRESS_CACHE": cache, "OMP_NUM_THREADS": str(given.threads)}
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def table(rounds: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """Medians with their spread, and ratios to each of the others, round by round."""
    rows = []
    for name in CONTENDERS:
        row: dict[str, Any] = {"contender": name}
        for key in ("steps_per_second", "examples_per_second", "steps_per_processor_second"):
            values = [one[name][key] for one in rounds]
            row[key] = statistics.median(values)
            row[f"{key}, range"] = f"{min(values):.2f} to {max(values):.2f}"
        for key, unit in (("steps_per_second", "wall"), ("steps_per_processor_second", "processor")):
            for other in ("asked", "bare"):
                ratios = [one[name][key] / one[other][key] for one in rounds]
                row[f"{unit} / {other}"] = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        row["first epoch s"] = statistics.median(one[name]["first_epoch_seconds"] for one in rounds)
        rows.append(row)
    return rows


def reached(rounds: list[dict[str, dict[str, float]]]) -> list[str]:
    """What the cache reaches of its aims, a line for each."""
    lines = []
    for other, aim in AIMS.items():
        ratio = statistics.median(one["warm"]["steps_per_second"] / one[other]["steps_per_second"] for one in rounds)
        said = "reached" if ratio >= aim else f"short by {aim - ratio:.2f}"
        lines.append(f"warm makes {ratio:.2f} times the steps per second of {other}; the aim of {aim:g} is {said}")
    most = statistics.median(one["bare"]["steps_per_second"] / one["asked"]["steps_per_second"] for one in rounds)
    return [*lines, f"a loop without any cost beside the arithmetic makes {most:.2f} times those of asked"]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled:shapes-clip")
    parser.add_argument("--data", default="bundled:shapes")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ratio", type=float, default=0.5, help="of the student's FFN units that are cut")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/distillation.json"))
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only is not None:
        print(json.dumps(child(given)))
        return
    with tempfile.TemporaryDirectory() as cache:
        run_child("warm", given, cache)  # fills the cache; what it says is of a cold one
        rounds = [{name: run_child(name, given, cache) for name in CONTENDERS} for _ in range(given.rounds)]
    rows = table(rounds)
    print(
        f"{given.model}, student without {given.ratio:.0%} of its FFN units, {given.samples} examples, "
        f"batches of {given.batch_size}, {given.threads} threads, {given.rounds} rounds"
    )
    print(tabulate([{k: v for k, v in row.items() if not k.endswith("range")} for row in rows], headers="keys", floatfmt=".2f"))
    print(*reached(rounds), sep="\n")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    said = {key: str(value) for key, value in vars(given).items() if key not in ("only", "out")}
    given.out.write_text(json.dumps({**said, "rows": rows, "rounds": rounds, "environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
