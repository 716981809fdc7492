"""Each family at its published size, with random weights: size, speed, parity and peak memory, before and after a 50% ffn prune.

    python benchmarks/families.py [--only whisper-base]... [--threads 2] [--seconds 1] [--out results.json] [--fresh]

Every step of every family runs in a process of its own, so that its peak memory is its own: building, cutting, training, and for
the whole and the cut model exporting, quantizing (int8 with ranges at run time, which needs no data) and comparing with torch.
Speed, size and memory mean something; quality of random weights does not, and the parity is that of random inputs. Peak memory of
cutting, exporting and quantizing is held against 3 times the model's float32 bytes plus 2 GB; that of fine-tuning and distilling,
without what the process takes before it loads a model and without the activations of a batch, against 5 times those bytes. Above
that the exit code is 1.

Latency is the median at batch size 1; for families that write text, of the prompt and 15 tokens after it. Both models, in torch
and in ONNX Runtime, take turns, the latter in a process each. Families that --out holds are not measured again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from published import PUBLISHED, Published
from tabulate import tabulate
from transformers import PretrainedConfig

import mmcompress as mm
from mmcompress.config import family_of
from mmcompress.context import Context
from mmcompress.data.audio import Audio
from mmcompress.data.examples import Examples
from mmcompress.environment import environment
from mmcompress.families.base import Family, Outputs
from mmcompress.files import write_json
from mmcompress.logs import silence_libraries
from mmcompress.measure import latency, size, worker
from mmcompress.measure.rows import parity_over
from mmcompress.measure.turns import SPIN_SECONDS, Contestant, Turns, write_calls
from mmcompress.model import CompressedModel
from mmcompress.processor import Processor
from mmcompress.runtimes.onnx_predict import OnnxPredict
from mmcompress.tasks._contrastive import contrastive_loss
from mmcompress.tasks._respond import answer_loss
from mmcompress.tasks.base import ANSWER_LOSSES, DUAL_ENCODER_LOSSES, Scores, Task
from mmcompress.training.device import pick_precision
from mmcompress.training.forward import Forward
from mmcompress.training.objective import TaskObjective, distillation
from mmcompress.training.pieces import Pieces

VARIANTS = ("whole", "cut")
PRECISIONS = ("fp32", "int8")
TIMES_FLOAT, AND_BYTES = 3, 2_000_000_000
"""The most memory that cutting, exporting and quantizing may take: so many times the float32 bytes, and so many bytes more."""
TIMES_TRAINING = 5
"""The most that training may take beside its activations, in float32 bytes: weights, gradients, two moments, a teacher."""
TRAININGS = ("finetune", "distill")
BATCHES = {"clip-vit-b-32": 16, "siglip-base": 6}
OTHERWISE = 2
"""Batch sizes of the trainings: so many that the activations of a batch, and not the optimiser's step, make the peak."""
STEPS = 3


def config_of(one: Published) -> PretrainedConfig:
    """The published config, which names its architecture as the checkpoint's does."""
    config = one.config()
    config.architectures = [one.architecture]
    return config


def opened(name: str, folder: Path) -> CompressedModel:
    """A model that an earlier step wrote. No step here reads data, so that it needs no tokenizer."""
    config = config_of(PUBLISHED[name])
    family = family_of(config, name)
    module = family.model_class().from_pretrained(folder).eval()
    return CompressedModel(module, Processor(None, family=family, config=module.config), family, name)


def facts(model: CompressedModel, folder: Path) -> dict[str, Any]:
    """Parameters and bytes of a model and its towers."""
    towers = size.parameters_by_tower(model)
    return {"parameters": model.parameters(), "towers": towers, "disk_bytes": size.torch_bytes(folder)}


def build(name: str, work: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Makes the model and writes it; its number of parameters must be the published one."""
    config = config_of(PUBLISHED[name])
    family = family_of(config, name)
    torch.manual_seed(0)
    module = family.model_class()(config).eval()
    model = CompressedModel(module, Processor(None, family=family, config=config), family, name)
    if model.parameters() != PUBLISHED[name].parameters:
        raise SystemExit(f"{name}: has {model.parameters()} parameters, the published one {PUBLISHED[name].parameters}")
    module.save_pretrained(work / "whole", max_shard_size="100GB")
    return facts(model, work / "whole")


def cut(name: str, work: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Cuts half of the FFN units; the folder must load with stock transformers, which the next step does."""
    model = mm.passes.Prune(axis="ffn", ratio=0.5).apply(opened(name, work / "whole"))
    peak = worker.peak_memory_bytes()
    model.module.save_pretrained(work / "cut", max_shard_size="100GB")
    return {**facts(model, work / "cut"), "peak_memory_bytes": peak}


def make_files(name: str, work: Path, variant: str, precision: str) -> dict[str, Any]:
    """Exports, or quantizes."""
    model = opened(name, work / variant)
    made = mm.passes.Export(combined=False) if precision == "fp32" else mm.passes.Quantize(scheme="int8-dynamic")
    scratch = work / f"{variant}-{precision}"
    start = time.perf_counter()
    made.apply(model, context=Context(workdir=scratch))
    return {
        "disk_bytes": sum(size.onnx_bytes(scratch).values()),
        "peak_memory_bytes": worker.peak_memory_bytes(),
        "seconds": time.perf_counter() - start,
    }


class Blank(Processor):
    """Stands in for a tokenizer and an image processor or feature extractor, which are not at hand at the published sizes."""

    def media(self, kind: str, items: list[Any]) -> list[dict[str, torch.Tensor]]:
        """Nothing of its own: `RandomInputs` makes the batches."""
        return [{name: torch.zeros(1) for name in self.family.media[kind]} for _ in items]

    def tokens(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """The same for texts."""
        return {"input_ids": torch.zeros(len(texts), 2, dtype=torch.int64), "attention_mask": torch.ones(len(texts), 2)}


def random_batch(family: Family, config: PretrainedConfig, count: int, seed: int) -> dict[str, torch.Tensor]:
    """Random inputs with random targets."""
    batch = family.example_batch(config, count, seed)
    if "embeddings" in family.abilities:
        mask = torch.ones_like(batch["input_ids"])  # tokenizers give one; some families' examples leave it out
        return {"attention_mask": mask, **batch, "target": torch.arange(count)}
    if "labels" not in batch and config.model_type == "vilt":
        batch["labels"] = torch.rand(count, config.num_labels)
    return {"labels": batch["decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"], **batch}


class RandomInputs(Task):
    """The family's example inputs as training batches, with the loss of its tasks."""

    metrics: ClassVar = {}
    roles: ClassVar = {}
    needs: ClassVar = frozenset()
    distillation: ClassVar = ANSWER_LOSSES

    def collate(self, rows: list[Any], processor: Processor, examples: Examples, draw: int) -> dict[str, torch.Tensor]:
        """As many random inputs as there are rows, with random targets."""
        return random_batch(processor.family, processor.config, len(rows), draw)

    def loss(self, outputs: Outputs, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The contrastive one, or that of answers."""
        return contrastive_loss(outputs, batch["target"]) if "target" in batch else answer_loss(outputs, batch)

    def evaluate(self, predict: Any, processor: Processor, examples: Examples, reporter: Any) -> Scores:
        """Random inputs are not scored."""
        raise ValueError("random inputs have no right answers")


class RandomPairs(RandomInputs):
    """The same for models that give embeddings."""

    needs: ClassVar = frozenset({"embeddings"})
    distillation: ClassVar = DUAL_ENCODER_LOSSES


def activations(name: str, work: Path, what: str) -> dict[str, Any]:
    """What the activations of one batch need: the most that is held at once in the forward and backward pass of its loss.

    Counted in allocations, with the gradients there already, at two batch sizes: what does not grow with the batch (weights in
    bf16 under autocast, the gradient of one layer on its way to the others) is no activation. The loss is part of it: logits over
    a vocabulary with their softmax, and in distilling the teacher's.
    """
    model, cpu = opened(name, work / "whole"), torch.device("cpu")
    model.processor = Blank(None, family=model.family, config=model.module.config)
    model.module.train()
    context, settings = training_context(model, name, work, 1), training_pass(what, model, 1)
    task = context.need_task(what)
    objective = distillation(settings, model, context, what) if isinstance(settings, mm.passes.Distill) else TaskObjective(task)
    precision = pick_precision("auto", cpu)
    objective.start(cpu, precision)
    pieces = Pieces(Forward(model.family, model.module, cpu, precision, objective.needs), objective, None)
    for parameter in [*model.module.parameters(), *objective.parameters()]:
        parameter.grad = torch.zeros_like(parameter)

    def most(count: int, index: int) -> int:
        batch = random_batch(model.family, model.module.config, count, index)
        # Indices of their own, or the teacher would remember its answers.
        batch["index"] = torch.arange(index, index + count)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
            pieces(batch, 0, backward=True)
        events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
        return int(held.max())

    size_ = batch_size_of(name)
    small = size_ // 2
    counted = {count: most(count, index) for count, index in ((size_, 0), (small, size_))}
    per_batch = size_ * (counted[size_] - counted[small]) // (size_ - small)
    return {"bytes": per_batch, "beside_bytes": counted[size_] - per_batch, "batch_size": size_}


def batch_size_of(name: str) -> int:
    """Of the trainings."""
    return BATCHES.get(name, OTHERWISE)


def training_context(model: CompressedModel, name: str, work: Path, steps_: int) -> Context:
    """Random examples, their task, and the model itself as the teacher."""
    family = model.family
    kind = next(iter(family.media))
    nothing: Any = Image.new("RGB", (1, 1)) if kind == "image" else Audio(np.zeros(1, np.float32), 16_000)
    rows = Examples([{kind: nothing}] * ((steps_ + 1) * batch_size_of(name)), "random inputs", {kind: kind})
    task = (RandomPairs if "embeddings" in family.abilities else RandomInputs)(type="random")

    def teacher() -> CompressedModel:
        found = opened(name, work / "whole")
        return CompressedModel(found.module, model.processor, family, name)

    return Context(task=task, train=rows, baseline=teacher, device="cpu", consume=True)


def training_pass(what: str, model: CompressedModel, batch_size: int) -> mm.passes.Finetune | mm.passes.Distill:
    """A training of a few steps."""
    settings: dict[str, Any] = {"max_steps": STEPS, "epochs": STEPS, "batch_size": batch_size}
    if what == "finetune":
        return mm.passes.Finetune(**settings)
    losses = DUAL_ENCODER_LOSSES if "embeddings" in model.family.abilities else ANSWER_LOSSES
    return mm.passes.Distill(**settings, losses=dict(losses))


def train(name: str, work: Path, what: str) -> dict[str, Any]:
    """Peak memory of three steps of a training pass, and what the process took before it loaded a model."""
    before = worker.peak_memory_bytes()
    model = opened(name, work / "whole")
    model.processor = Blank(None, family=model.family, config=model.module.config)
    training_pass(what, model, batch_size_of(name)).apply(model, context=training_context(model, name, work, STEPS))
    return {"before_bytes": before, "peak_memory_bytes": worker.peak_memory_bytes()}


def compare(name: str, work: Path, variant: str, precision: str) -> dict[str, Any]:
    """The largest difference and the least cosine between each component's outputs and torch's, on two random examples."""
    model = opened(name, work / variant)
    batch = {k: v.numpy() for k, v in model.family.example_batch(model.module.config, 2).items()}
    found = parity_over(model, OnnxPredict(work / f"{variant}-{precision}"), batch)
    return {component: one.model_dump() for component, one in found.items()}


def time_all(name: str, work: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of all components and of each: both variants in torch, here, and ONNX Runtime, a process each."""
    torch.set_num_threads(given.threads)
    contestants: list[Contestant] = []
    calls: dict[str, worker.Calls] = {}
    for variant in VARIANTS:
        model = opened(name, work / variant)
        parts, own = model.family.components(model.module), model.family.calls(model.module, 1)
        calls[variant] = [(call.component, call.times, runner(parts[call.component], call.inputs)) for call in own]
        asked = {"1": write_calls(own, work / f"{variant}-calls")}
        folders = {f"{variant} {precision}": work / f"{variant}-{precision}" for precision in PRECISIONS}
        contestants += [Contestant(one, folder, "onnxruntime", asked) for one, folder in folders.items()]
    components = dict.fromkeys(call[0] for call in calls["whole"])
    figures = {"together": "1", **{component: f"{component}/1" for component in components}}
    names, seconds, least = [c.name for c in contestants], given.seconds / worker.ROUNDS, worker.LEAST_CALLS // worker.ROUNDS
    times: dict[str, dict[str, list[float]]] = {f"{variant} torch": {figure: [] for figure in figures} for variant in VARIANTS}
    with Turns(contestants, given.threads) as turns:
        for figure in figures.values():
            for one in names:
                turns.warm(one, figure, worker.WARM_UP)
        turns.begin()
        # Whatever slows the machine down for a while touches each of them.
        for number in range(worker.ROUNDS):
            for name_, figure in figures.items():
                for variant in VARIANTS:
                    chosen = [call for call in calls[variant] if name_ in ("together", call[0])]
                    times[f"{variant} torch"][name_] += worker.timed(partial(worker.run_all, chosen), seconds, least)
                time.sleep(SPIN_SECONDS["torch"])
                turns.take_turns(names, figure, number, seconds, least, 2)
        busy = turns.busy_cores()
    times |= {one: {name_: turns.figures[one, figure].times for name_, figure in figures.items()} for one in names}
    found = {one: {name_: latency.summarize(own).model_dump() for name_, own in by.items()} for one, by in times.items()}
    return {**found, "busy_cores": busy}


def runner(part: Any, inputs: Any) -> Callable[[], Any]:
    """One call of a component."""
    tensors = [inputs[i] for i in part.inputs]

    def run() -> Any:
        with torch.inference_mode():
            return part.module(*tensors)

    return run


def steps(family: str, given: argparse.Namespace) -> dict[str, Callable[[str, Path], dict[str, Any]]]:
    """What is done with ``family``, in order; each by its name in a process of its own."""
    found: dict[str, Callable[[str, Path], dict[str, Any]]] = {
        "build": lambda name, work: build(name, work, given),
        "cut": lambda name, work: cut(name, work, given),
    }
    for what in TRAININGS:
        found[f"activations {what}"] = lambda name, work, w=what: activations(name, work, w)
        found[what] = lambda name, work, w=what: train(name, work, w)
    for variant in VARIANTS:
        for precision in PRECISIONS:
            where = (variant, precision)
            found[f"make {variant} {precision}"] = lambda name, work, w=where: make_files(name, work, *w)
            found[f"parity {variant} {precision}"] = lambda name, work, w=where: compare(name, work, *w)
    if not given.no_latency:
        found["latency"] = lambda name, work: time_all(name, work, given)
    return found


def in_a_process(name: str, step: str, work: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Runs one step and reads what it found."""
    words = [__file__, "--only", name, "--step", step, "--work", str(work)]
    words += ["--threads", str(given.threads), "--seconds", str(given.seconds)]
    words += ["--no-latency"] if given.no_latency else []
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {step} failed, see above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """All that is found out about one family."""
    found: dict[str, Any] = {"family": name, "hub": PUBLISHED[name].hub}
    with tempfile.TemporaryDirectory(prefix="mmcompress-") as scratch:
        for step in steps(name, given):
            print(f"{name}: {step}", file=sys.stderr, flush=True)
            found[step] = in_a_process(name, step, Path(scratch), given)
    return found


def tables(found: dict[str, Any]) -> str:
    """Three tables of one family."""
    sizes, speeds = [], []
    for variant, step in zip(VARIANTS, ("build", "cut"), strict=True):
        row = [variant, found[step]["parameters"] / 1e6, found[step]["disk_bytes"] / 1e6]
        sizes.append(row + [found[f"make {variant} {p}"]["disk_bytes"] / 1e6 for p in PRECISIONS])
        timed = [found.get("latency", {}).get(f"{variant} {runtime}", {}) for runtime in ("torch", *PRECISIONS)]
        for component in timed[0] or found[f"parity {variant} fp32"]:
            times = [by.get(component) for by in timed]
            row = [variant, component, *(one and one["p50"] for one in times)]
            for precision in PRECISIONS:
                one = found[f"parity {variant} {precision}"].get(component)
                row += [one["max_abs_difference"], one["min_cosine"]] if one else [None, None]
            speeds.append(row)
    peaks = [[step, peak / 1e9, limit / 1e9, "yes" if peak <= limit else "NO"] for step, peak, limit in memory(found)]
    speed_heads = ["model", "component", "torch ms", "fp32 ms", "int8 ms", "fp32 gap", "fp32 cosine", "int8 gap", "int8 cosine"]
    size_heads = ["model", "M parameters", "torch MB", "ONNX fp32 MB", "ONNX int8 MB"]
    return "\n\n".join(
        [
            f"{found['family']} ({found['hub']}), random weights",
            tabulate(sizes, headers=size_heads, floatfmt=".1f"),
            tabulate(speeds, headers=speed_heads, floatfmt=("", "", ".2f", ".2f", ".2f", ".1e", ".6f", ".1e", ".6f")),
            tabulate(peaks, headers=["step", "GB", "limit GB", "within"], floatfmt=".2f"),
        ]
    )


def memory(found: dict[str, Any]) -> list[tuple[str, int, int]]:
    """For each step whose memory has a limit: what it took and the limit, in bytes.

    Of a training it is the peak without what the process took before and without what the activations of a batch need.
    """
    weights = 4 * found["build"]["parameters"]
    steps_ = ["cut", *(f"make {variant} {precision}" for variant in VARIANTS for precision in PRECISIONS)]
    rows = [(step, found[step]["peak_memory_bytes"], TIMES_FLOAT * weights + AND_BYTES) for step in steps_]
    for what in TRAININGS:
        fixed = found[what]["peak_memory_bytes"] - found[what]["before_bytes"] - found[f"activations {what}"]["bytes"]
        rows.append((f"{what}, without activations", fixed, TIMES_TRAINING * weights))
    return rows


def main() -> None:
    """Measures and prints, or does one step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=list(PUBLISHED), help="a family; may be given several times")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each latency")
    parser.add_argument("--no-latency", action="store_true", help="leave latency out, such as on a busy machine")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/families.json"))
    parser.add_argument("--fresh", action="store_true", help="measure families again that --out holds already")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    silence_libraries()
    if given.step:
        print("\n" + json.dumps(steps(given.only[0], given)[given.step](given.only[0], given.work)))
        return
    kept = json.loads(given.out.read_text())["families"] if given.out.exists() and not given.fresh else []
    there, all_found = {found["family"]: found for found in kept}, []
    for name in given.only or PUBLISHED:
        all_found.append(there.get(name) or measured(name, given))
        there[name] = all_found[-1]
        print(tables(all_found[-1]) + "\n", flush=True)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(given.out, {"families": list(there.values()), "environment": environment()})
    over = [f"{f['family']}: {step}" for f in all_found for step, peak, limit in memory(f) if peak > limit]
    if over:
        raise SystemExit("over the memory limit: " + "; ".join(over))


if __name__ == "__main__":
    main()
