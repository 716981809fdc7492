"""What quantization costs in quality and leaves in size, on small trained models, against their float32 files.

    python benchmarks/quality.py --fashion-model FOLDER --fashion-data FOLDER --whisper-model FOLDER --whisper-data FOLDER

Subjects: ``fashion``, a CLIP trained on Fashion-MNIST's layout (train.parquet and test.parquet with image and label; zero-shot
top-1), ``whisper``, a Whisper trained on spoken digits (audio, text, speaker; word error rate), and ``emoji``, the CLIP that
`emoji_clip.py` leaves (R@10 from pictures to names on the held-out vendor); those whose folders are given. Contenders are the
schemes of `quantize`, the roundings of weights, and `qat`, which learns from the float model alone, not from labels.

And training under rounding against calibration alone, at one placement: the layers that `qat` rounds, weights of 8, 4 and 3 bits
with a scale for each output, activations of 8 bits, the same observer of ranges. At 8 bits there is nothing to win back, which is
why the narrower ones are there; they are made by setting `fake.WEIGHT_LEVELS`, and are no product.

Points are to the float32 files in ONNX Runtime, paired by example, with the 95% interval; for the word error rate lower is
better. Cosines are means over all examples of pooled outputs. Shares are bytes of all components over those of the float32
files. What was found is kept in --out, and a second call goes on from there.

Shape legend: N test examples, E of them whose embeddings are kept, D width.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import torch
from emoji_clip import METRIC, VENDORS, vendor
from tabulate import tabulate

import mmcompress as mm
from mmcompress.context import Context
from mmcompress.data.examples import Examples, as_examples
from mmcompress.data.sources import load_source
from mmcompress.environment import environment
from mmcompress.files import write_json
from mmcompress.logs import silence_libraries
from mmcompress.measure.statistics import difference_interval
from mmcompress.model import CompressedModel
from mmcompress.progress import SILENT
from mmcompress.quantization import fake
from mmcompress.recipe import Source
from mmcompress.runtimes.onnx_predict import OnnxPredict
from mmcompress.tasks.automatic_speech_recognition import AutomaticSpeechRecognition
from mmcompress.tasks.base import Scores, Task
from mmcompress.tasks.image_text_retrieval import ImageTextRetrieval
from mmcompress.tasks.zero_shot_image_classification import ZeroShotImageClassification

TEMPLATES = ["a photo of a {}", "a {}", "a picture of a {}", "a product photo of a {}"]
SUBJECTS = ("fashion", "whisper", "emoji")
SCHEMES: dict[str, dict[str, Any]] = {
    "int8-static": {"scheme": "int8-static"},
    "int8-dynamic": {"scheme": "int8-dynamic"},
    "int8-weight-only": {"scheme": "int8-weight-only"},
    "int4 rtn": {"scheme": "int4-weight-only"},
    "int4 awq": {"scheme": "int4-weight-only", "algorithm": "awq"},
    "int4 gptq": {"scheme": "int4-weight-only", "algorithm": "gptq"},
    "int4 gptq, blocks of 32": {"scheme": "int4-weight-only", "algorithm": "gptq", "block_size": 32},
    "float16": {"scheme": "float16"},
}
BITS = {8: 127, 4: 7, 3: 3}
"""The largest number of a weight, by bits."""
TRAINING: dict[str, dict[str, Any]] = {
    "fashion": {"epochs": 1, "batch_size": 128, "learning_rate": 2e-4},
    "whisper": {"epochs": 2, "batch_size": 32, "learning_rate": 2e-4},
    "emoji": {"epochs": 2, "batch_size": 64, "learning_rate": 1e-4},
}
LABEL_FREE = {
    "fashion": {"task": 0.0, "affinity": 1.0, "feature": 4.0},
    "emoji": {"task": 0.0, "affinity": 1.0, "feature": 4.0},
    "whisper": {"task": 0.0, "logit": 1.0},
}
"""Losses against the float model alone: labels would teach a model something that calibration cannot."""


class Subject:
    """A model, its task and its data."""

    def __init__(self, name: str, given: argparse.Namespace) -> None:
        self.name, self.folder, self.lower = name, getattr(given, f"{name}_model"), name == "whisper"
        data = getattr(given, f"{name}_data")
        if name == "emoji":
            self.task: Task = ImageTextRetrieval(type="image-text-retrieval")
            self.metric = METRIC
            seen = [vendor(data, v).rows.select_columns(["image", "text"]) for v in VENDORS if v != given.held_out]
            self.train = as_examples(datasets.concatenate_datasets([rows.cast(seen[0].features) for rows in seen]))
            self.test = vendor(data, given.held_out)
        elif name == "fashion":
            self.task = ZeroShotImageClassification(type="zero-shot-image-classification", templates=TEMPLATES)
            self.metric, columns = "accuracy", {"image": "image", "label": "label"}
            self.train, self.test = (load(data / f"{split}.parquet", columns, split) for split in ("train", "test"))
        else:
            self.task = AutomaticSpeechRecognition(
                type="automatic-speech-recognition", normalizer="basic", language=None, max_new_tokens=11
            )
            self.metric, columns = "wer", {"audio": "audio", "text": "text", "speaker": "speaker"}
            self.train, self.test = (load(data / f"{split}.parquet", columns, split) for split in ("train", "test"))
        self.train, self.test = some(self.train, given.train), some(self.test, given.test)

    def load(self) -> CompressedModel:
        """The float model."""
        return mm.load(str(self.folder))

    def context(self, folder: Path, seed: int) -> Context:
        """What passes may use."""
        return Context(task=self.task, train=self.train, baseline=self.load, seed=seed, device="cpu", workdir=folder)


def load(path: Path, columns: dict[str, str], split: str) -> Examples:
    """Rows of a Parquet file."""
    return load_source(Source.model_validate({"path": str(path), "columns": columns}), split, 0)


def some(examples: Examples, most: int | None) -> Examples:
    """Examples at random, the same ones each time."""
    if most is None or len(examples) <= most:
        return examples
    return examples.take(sorted(np.random.default_rng(0).permutation(len(examples))[:most].tolist()))


def exported(subject: Subject, folder: Path, seed: int) -> Path:
    """The float32 files."""
    return files_of(mm.passes.Export(combined=False).apply(subject.load(), context=subject.context(folder, seed)))


def quantized(subject: Subject, folder: Path, seed: int, contender: str) -> Path:
    """The files of a scheme."""
    return files_of(mm.passes.Quantize(**SCHEMES[contender]).apply(subject.load(), context=subject.context(folder, seed)))


def trained(subject: Subject, folder: Path, seed: int, bits: int) -> Path:
    """The files of training under rounding."""
    fake.WEIGHT_LEVELS = BITS[bits]
    step = mm.passes.Qat(**TRAINING[subject.name], losses=LABEL_FREE[subject.name], reduce_range=False)
    return files_of(step.apply(subject.load(), context=subject.context(folder, seed)))


def calibrated(subject: Subject, folder: Path, seed: int, bits: int) -> Path:
    """The same layers and ranges without a step of training."""
    fake.WEIGHT_LEVELS = BITS[bits]
    model, step = subject.load(), mm.passes.Qat(**TRAINING[subject.name], losses=LABEL_FREE[subject.name], reduce_range=False)
    fake.insert_fake_quant(model.module, reduce_range=False)
    batch = step._calibrate(model, subject.context(folder, seed))
    fake.set_observing(model.module, False)
    (folder / "onnx").mkdir(parents=True)
    step._export(model, folder / "onnx", batch)
    return folder / "onnx"


def files_of(model: CompressedModel) -> Path:
    """The folder of a model's files."""
    if model.onnx is None:
        raise SystemExit("the pass left no ONNX files")
    return model.onnx


def jobs(given: argparse.Namespace) -> list[tuple[str, str, int]]:
    """Subject, contender and seed of all that is to be run; float32 first."""
    found = []
    for subject in given.only:
        found += [(subject, contender, 0) for contender in ("float32", *SCHEMES)]
        found += [(subject, "qat", seed) for seed in given.seeds]
        narrow = [bits for bits in BITS if bits != 8 and subject != "whisper"]
        found += [
            (subject, f"{kind} {b} bits", seed) for b in narrow for seed in given.seeds for kind in ("calibrated", "trained")
        ]
    return found


def measured(subject: Subject, contender: str, seed: int, folder: Path) -> dict[str, Any]:
    """Makes the files of one contender and scores them."""
    start = time.perf_counter()
    kind, *words = contender.split()
    if contender == "float32":
        files = exported(subject, folder, seed)
    elif contender == "qat" or kind == "trained":
        files = trained(subject, folder, seed, int(words[0]) if words else 8)
    elif kind == "calibrated":
        files = calibrated(subject, folder, seed, int(words[0]))
    else:
        files = quantized(subject, folder, seed, contender)
    seconds = time.perf_counter() - start
    scores = subject.task.evaluate(OnnxPredict(files, 1), subject.load().processor, subject.test, SILENT)
    named: dict[str, Any] = {"seconds": seconds, "bytes": sum(path.stat().st_size for path in files.iterdir())}
    np.savez(folder / "scores.npz", **arrays(scores, subject.metric))
    return named


def arrays(scores: Scores, metric: str) -> dict[str, np.ndarray]:
    """What comparisons need: values (N,), perhaps weights and clusters (N,), embeddings (E, D) by component."""
    found = {"values": scores.per_example[metric]}
    found |= {"weights": scores.weights[metric]} if metric in scores.weights else {}
    clusters = scores.clusters_of(metric)
    found |= {} if clusters is None else {"clusters": clusters}
    seen = {} if scores.seen is None else scores.seen.embeddings
    return found | {f"embeddings.{name}": values for name, values in seen.items()}


def cosines(new: dict[str, np.ndarray], old: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of each component's embeddings to the float ones, (E,)."""
    found = {}
    for name in (key for key in old if key.startswith("embeddings.")):
        a, b = new[name].astype(np.float64), old[name].astype(np.float64)
        found[name] = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return found


def mean_cosine(new: dict[str, np.ndarray], old: dict[str, np.ndarray]) -> float:
    """Of the component whose embeddings drift most."""
    return min(float(values.mean()) for values in cosines(new, old).values())


def nearer(new: list[dict[str, np.ndarray]], old: list[dict[str, np.ndarray]], base: dict[str, np.ndarray]) -> str:
    """How much nearer to the float embeddings in cosine, averaged over seeds, of the component where the old ones drift most."""
    found = [[cosines(one, base) for one in side] for side in (new, old)]
    name = min(found[1][0], key=lambda one: float(np.mean([c[one] for c in found[1]])))
    ours, theirs = (np.mean([one[name] for one in side], axis=0) for side in found)
    low, high = difference_interval(ours, theirs)
    return f"{ours.mean() - theirs.mean():+.5f} [{low:+.5f}, {high:+.5f}]"


def points(new: list[dict[str, np.ndarray]], old: list[dict[str, np.ndarray]]) -> tuple[float, float, float]:
    """The difference in points, averaged over seeds, with its interval over examples."""
    values = [np.mean([one["values"] for one in side], axis=0) for side in (new, old)]
    weights = old[0].get("weights")
    both = None if weights is None else (weights, weights)
    low, high = difference_interval(values[0], values[1], weights=both, clusters=old[0].get("clusters"))
    means = [np.average(one, weights=weights) for one in values]
    return 100 * float(means[0] - means[1]), 100 * low, 100 * high


def table(kept: dict[str, Any], held: Callable[[str, str, int], dict[str, np.ndarray]], given: argparse.Namespace) -> str:
    """All that was found so far: contenders against float32, then training against calibration."""
    rows, against = [], []
    for subject in given.only:
        if f"{subject} float32 0" not in kept:
            continue
        base = held(subject, "float32", 0)
        names = ["float32", *SCHEMES, "qat", *(f"{kind} {b} bits" for b in BITS for kind in ("calibrated", "trained"))]
        for contender in names:
            seeds = [s for s in {0, *given.seeds} if f"{subject} {contender} {s}" in kept]
            if not seeds:
                continue
            new = [held(subject, contender, s) for s in seeds]
            facts = kept[f"{subject} {contender} {seeds[0]}"]
            change, low, high = points(new, [base])
            value = 100 * np.average(np.mean([one["values"] for one in new], axis=0), weights=base.get("weights"))
            share = facts["bytes"] / kept[f"{subject} float32 0"]["bytes"]
            cosine = np.mean([mean_cosine(one, base) for one in new])
            said = "-" if contender == "float32" else f"{change:+.2f} [{low:+.2f}, {high:+.2f}]"
            rows.append(
                [subject, contender, len(seeds), f"{value:.2f}", said, f"{cosine:.5f}", f"{share:.3f}", f"{facts['seconds']:.0f}"]
            )
        for bits in BITS:
            pairs = [(f"trained {bits} bits", f"calibrated {bits} bits"), ("qat", "int8-static")][:: 1 if bits != 8 else -1]
            seeds = [s for s in given.seeds if all(f"{subject} {name} {s}" in kept for name in pairs[0])]
            if seeds:
                new, old = ([held(subject, name, s) for s in seeds] for name in pairs[0])
                change, low, high = points(new, old)
                said = f"{change:+.2f} [{low:+.2f}, {high:+.2f}]"
                against.append([subject, *pairs[0], len(seeds), said, nearer(new, old, base)])
    heads = ["subject", "contender", "seeds", "metric %", "points to float32", "cosine", "share of bytes", "seconds"]
    text = tabulate(rows, heads, disable_numparse=True)
    return text + (
        "\n\n" + tabulate(against, ["subject", "", "against", "seeds", "points [95%]", "cosine [95%]"]) if against else ""
    )


def main() -> None:
    """Runs what is missing, then prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in SUBJECTS:
        parser.add_argument(f"--{name}-model", type=Path)
        parser.add_argument(f"--{name}-data", type=Path)
    parser.add_argument("--held-out", default="twemoji", choices=VENDORS)
    parser.add_argument("--test", type=int, default=2000, help="test examples at most")
    parser.add_argument("--train", type=int, default=10_000, help="training examples at most")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality"), help="a folder")
    given = parser.parse_args()
    given.only = [name for name in SUBJECTS if getattr(given, f"{name}_model") and getattr(given, f"{name}_data")]
    if not given.only:
        raise SystemExit("name a model and its data, such as --fashion-model FOLDER --fashion-data FOLDER")
    silence_libraries()
    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    facts = given.out / "quality.json"
    kept = json.loads(facts.read_text()) if facts.exists() else {"found": {}, "environment": environment()}
    settings = {"test": given.test, "train": given.train, "held_out": given.held_out}
    if kept.setdefault("settings", settings) != settings:
        raise SystemExit(f"{facts} was made with {kept['settings']}, not {settings}; name another --out")

    def held(subject: str, contender: str, seed: int) -> dict[str, np.ndarray]:
        with np.load(given.out / f"{subject} {contender} {seed}.npz") as found:
            return dict(found)

    subjects: dict[str, Subject] = {}
    for name, contender, seed in jobs(given):
        if (key := f"{name} {contender} {seed}") in kept["found"]:
            continue
        print(key, file=sys.stderr, flush=True)
        subject = subjects.setdefault(name, Subject(name, given))
        with TemporaryDirectory(prefix="mmcompress-") as scratch:
            facts_of = measured(subject, contender, seed, Path(scratch))
            shutil.move(Path(scratch) / "scores.npz", given.out / f"{key}.npz")
        kept["found"][key] = facts_of
        write_json(facts, kept)
    print(table(kept["found"], held, given))


if __name__ == "__main__":
    main()
