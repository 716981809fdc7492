"""How much quality is left at half, a quarter and an eighth of the vision tower, against Torch-Pruning and training from scratch.

    python benchmarks/emoji_clip.py --data EMOJI
    python benchmarks/recovery.py --fashion-model FOLDER --fashion-data FOLDER --emoji-data EMOJI [--seeds 0 1 2] [--only fashion]

Subjects: ``fashion``, a CLIP trained on Fashion-MNIST's layout (train.parquet and test.parquet in FOLDER with image and label;
zero-shot top-1), and ``emoji``, the CLIP that `emoji_clip.py` leaves (R@10 from pictures to names on the held-out vendor).
Contenders, at the same size of the vision tower and the same number of steps, batch size, schedule and precision:

- ours: the passes of `RECIPES`;
- torch-pruning: its GroupNormPruner with group L2 norms at one ratio for all of the vision tower's channels, then fine-tuning on
  the task's loss;
- scratch: a student of our shape whose vision tower starts from random numbers (its text tower is the teacher's), with the same
  distillation;
- uncut: the whole model, fine-tuned on the task's loss: what so many steps are worth where nothing was cut. With one seed.

And the ranking of criteria: half of the vision tower's FFN units cut by taylor, magnitude and at random, without training; and
by taylor with readers fitted by least squares.

Every contender and seed runs in a process of its own; `--jobs 2 --threads 1` keeps two of them going, which is sooner done on two
cores than one after the other on both. Seconds are then those of a process beside another.

Differences to the baseline are of the same examples, averaged over the seeds, with the 95% interval of a paired bootstrap over
the examples; what the seeds gave stands beside it as least and most. A second table sets ours against the others in the same way.
What was found is kept in --out, and a second call goes on from there.

Shape legend: N test examples.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch_pruning as tp
from emoji_clip import METRIC, VENDORS, vendor
from tabulate import tabulate
from torch import nn

import mmcompress as mm
from mmcompress.context import Context
from mmcompress.data.examples import Examples, as_examples
from mmcompress.data.sources import load_source
from mmcompress.environment import environment
from mmcompress.families.base import count, tower_parameters
from mmcompress.files import write_json
from mmcompress.logs import silence_libraries
from mmcompress.measure.statistics import difference_interval
from mmcompress.model import CompressedModel
from mmcompress.progress import SILENT
from mmcompress.pruning.cut import _SortedLayerNorm
from mmcompress.recipe import Source
from mmcompress.runtimes.torch_predict import TorchPredict
from mmcompress.tasks.base import Task
from mmcompress.tasks.image_text_retrieval import ImageTextRetrieval
from mmcompress.tasks.zero_shot_image_classification import ZeroShotImageClassification

SHARES = {"half": 1 / 2, "quarter": 1 / 4, "eighth": 1 / 8}
EPOCHS = {"half": 1, "quarter": 3, "eighth": 5}
MARGINS = {"half": 0.3, "quarter": 1.0, "eighth": 2.5}
"""How many points the compressed model may lose."""
CONTENDERS = ("ours", "torch-pruning", "scratch")
CEILING = "uncut"
CRITERIA = ("taylor", "magnitude", "random", "fitted")
"""Of FFN units; ``fitted`` is taylor with ``reconstruct``."""
TRAINING = {
    "fashion": {"batch_size": 256, "learning_rate": 1e-3},
    "emoji": {"batch_size": 32, "learning_rate": 5e-4, "freeze": ["text"]},
}
"""Of all contenders. The emoji's names are the same for all vendors: a text tower that learned on cost recall of a new one."""
LOSSES = {
    "fashion": {"task": 1.0, "affinity": 0.5},
    "emoji": {"task": 1.0, "feature": 8.0},
}
"""Fashion's were chosen without the test split (--holdout 10000): labels teach more there than that model's own answers. The
emoji's were chosen with noto held out, from another model of `emoji_clip.py` (--held-out noto --epochs 40)."""
TEMPLATES = ["a photo of a {}", "a {}", "a picture of a {}", "a product photo of a {}"]

Step = dict[str, Any]
FITTED: Step = {"reconstruct": True, "samples": 2048}
HALF: Mapping[str, str] = {"fashion": "taylor", "emoji": "magnitude"}
"""The criterion at half the size."""
RECIPES: dict[str, list[Step]] = {
    "half": [{"axis": "ffn", "ratio": {"vision": 0.77}}],
    "quarter": [
        {"axis": "width", "ratio": {"vision": 0.5}, "heads": "narrower", "criterion": "magnitude"},
        {"axis": "ffn", "ratio": {"vision": 0.52}, "criterion": "magnitude"},
    ],
    "eighth": [
        {"axis": "width", "ratio": {"vision": 0.625}, "heads": "narrower", "criterion": "magnitude"},
        {"axis": "ffn", "ratio": {"vision": 0.72}, "criterion": "magnitude"},
    ],
}
"""What is cut at each size; distilling follows, from the uncut model. Chosen like the losses: after deep cuts and training
magnitude leaves more than taylor, though less before the training, and narrower heads more than fewer ones."""


class Subject:
    """A model, its task and its data."""

    def __init__(self, name: str, given: argparse.Namespace) -> None:
        self.name = name
        if name == "fashion":
            self.folder = given.fashion_model
            self.task: Task = ZeroShotImageClassification(type="zero-shot-image-classification", templates=TEMPLATES)
            self.metric = "accuracy"
            self.train, self.test = (self._parquet(given.fashion_data, split) for split in ("train", "test"))
            if given.holdout is not None:
                kept = len(self.train) - given.holdout
                self.train, self.test = self.train.take(range(kept)), self.train.take(range(kept, len(self.train)))
            if given.samples is not None:
                self.train = self.train.take(range(given.samples))
        else:
            self.folder = given.emoji_model
            self.task = ImageTextRetrieval(type="image-text-retrieval")
            self.metric = METRIC
            seen = [vendor(given.emoji_data, v).rows.select_columns(["image", "text"]) for v in VENDORS if v != given.held_out]
            self.train = as_examples(datasets.concatenate_datasets([rows.cast(seen[0].features) for rows in seen]))
            self.test = vendor(given.emoji_data, given.held_out)

    @staticmethod
    def _parquet(folder: Path, split: str) -> Examples:
        columns = {"image": "image", "label": "label"}
        return load_source(Source.model_validate({"path": str(folder / f"{split}.parquet"), "columns": columns}), split, 0)

    def load(self) -> CompressedModel:
        """The model as it was before anything was cut."""
        return mm.load(str(self.folder))

    def context(self, seed: int) -> Context:
        """What passes may use."""
        return Context(task=self.task, train=self.train, baseline=self.load, seed=seed, device="cpu", consume=True)

    def scores(self, model: CompressedModel) -> np.ndarray:
        """The metric of each test example, (N,)."""
        found = self.task.evaluate(TorchPredict(model), model.processor, self.test, SILENT)
        return found.per_example[self.metric]


def vision_parameters(model: CompressedModel) -> int:
    """Parameters of the vision tower with its projection."""
    return count(tower_parameters(model.family, model.module)["vision"])


def cut(subject: Subject, size: str, seed: int) -> CompressedModel:
    """Our cuts for a size."""
    model = subject.load()
    for number, step in enumerate(RECIPES[size]):
        one = mm.passes.Prune(**{"criterion": HALF[subject.name], **step})
        model = one.apply(model, context=subject.context(100 * seed + number))
    return model


def ours(subject: Subject, size: str, seed: int) -> CompressedModel:
    """Cut, then distilled."""
    return distilled(subject, cut(subject, size, seed), size, seed)


def distilled(subject: Subject, model: CompressedModel, size: str, seed: int) -> CompressedModel:
    """The recovery of ours and of the student from scratch."""
    settings = {**TRAINING[subject.name], "losses": LOSSES[subject.name], "epochs": EPOCHS[size]}
    return mm.passes.Distill(**settings).apply(model, context=subject.context(100 * seed + 50))


def scratch(subject: Subject, size: str, seed: int) -> CompressedModel:
    """Our shape, its vision tower from random numbers."""
    shaped = cut(subject, size, seed)
    torch.manual_seed(1000 + seed)
    fresh = shaped.family.model_class()(shaped.module.config)
    for name, values in fresh.state_dict().items():
        if name.startswith(("vision_model.", "visual_projection.")):
            shaped.module.state_dict()[name].copy_(values)
    return distilled(subject, shaped, size, seed)


class VisionTower(nn.Module):
    """What Torch-Pruning is given: pixels to the projected embedding. The logit scale stays out of its graph."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.tower, self.projection = clip.vision_model, clip.visual_projection

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) to (B, D)."""
        found: torch.Tensor = self.projection(self.tower(pixel_values=pixels).pooler_output)
        return found


def group_norm_cut(model: CompressedModel, ratio: float) -> None:
    """Cuts the vision tower in place as Torch-Pruning's example for Hugging Face's ViT does: all channels at one ratio.

    Its own LayerNorm pruner leaves the channels out of order on deep cuts (see docs/architecture.md), so that ours is used.
    """
    tower = VisionTower(model.module)
    attention = [layer.self_attn for layer in model.module.vision_model.encoder.layers]
    heads = {part: a.num_heads for a in attention for part in (a.q_proj, a.k_proj, a.v_proj)}
    embeddings = model.module.vision_model.embeddings
    tp.pruner.GroupNormPruner(
        tower.requires_grad_(True),
        model.family.example_batch(model.module.config, 2)["pixel_values"],
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[tower.projection],
        num_heads=heads,
        unwrapped_parameters=[(embeddings.class_embedding, 0)],
        customized_pruners={nn.LayerNorm: _SortedLayerNorm()},
    ).step()
    for part in attention:
        part.embed_dim = part.q_proj.out_features
        part.head_dim = part.embed_dim // part.num_heads
        part.scale = part.head_dim**-0.5
    embeddings.embed_dim = embeddings.patch_embedding.out_channels


def torch_pruning(subject: Subject, size: str, seed: int) -> CompressedModel:
    """The smallest uniform ratio that reaches the size of ours, then fine-tuning on the task's loss."""
    most = vision_parameters(cut(subject, size, seed))
    low, high = 0.0, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        tried = subject.load()
        group_norm_cut(tried, middle)
        low, high = (low, middle) if vision_parameters(tried) <= most else (middle, high)
    model = subject.load()
    group_norm_cut(model, high)
    return finetuned(subject, model, size, seed)


def uncut(subject: Subject, size: str, seed: int) -> CompressedModel:
    """Fine-tuning alone."""
    return finetuned(subject, subject.load(), size, seed)


def finetuned(subject: Subject, model: CompressedModel, size: str, seed: int) -> CompressedModel:
    """The recovery of those who do not distil."""
    settings = {**TRAINING[subject.name], "epochs": EPOCHS[size]}
    return mm.passes.Finetune(**settings).apply(model, context=subject.context(100 * seed + 50))


def job(given: argparse.Namespace) -> dict[str, Any]:
    """One contender with one seed, or one criterion."""
    size, contender, seed = given.job
    torch.set_num_threads(given.threads)
    subject, start = Subject(given.only[0], given), time.perf_counter()
    whole = vision_parameters(subject.load())
    if contender == "baseline":
        model = subject.load()
    elif contender in CRITERIA:
        how: Step = {"criterion": "taylor", **FITTED} if contender == "fitted" else {"criterion": contender}
        half = mm.passes.Prune(axis="ffn", ratio={"vision": 0.5}, **how)
        model = half.apply(subject.load(), context=subject.context(int(seed)))
    else:
        made: Callable[[Subject, str, int], CompressedModel]
        made = {"ours": ours, "torch-pruning": torch_pruning, "scratch": scratch, CEILING: uncut}[contender]
        model = made(subject, size, int(seed))
    seconds = time.perf_counter() - start
    scores = subject.scores(model).astype(int).tolist()
    facts = {"vision_parameters": vision_parameters(model), "share": vision_parameters(model) / whole}
    return {"scores": scores, "seconds": seconds, "parameters": model.parameters(), **facts}


def jobs(given: argparse.Namespace) -> list[tuple[str, str, str, str]]:
    """Subject, size, contender, seed of all that is to be run; seeds outermost, so that a part of it says something."""
    found = [(subject, "-", "baseline", "0") for subject in given.only]
    for seed in map(str, given.seeds):
        for subject in given.only:
            found += [(subject, size, contender, seed) for size in given.sizes for contender in CONTENDERS]
            found += [(subject, "ffn-half", criterion, seed) for criterion in CRITERIA]
    found += [(subject, size, CEILING, str(given.seeds[0])) for subject in given.only for size in given.sizes]
    return found


def in_a_process(one: tuple[str, str, str, str], given: argparse.Namespace) -> dict[str, Any]:
    """Runs one job and reads what it found."""
    subject, *rest = one
    words = [sys.executable, __file__, "--only", subject, "--job", *rest, "--threads", str(given.threads)]
    for name in ("fashion_model", "fashion_data", "emoji_model", "emoji_data", "held_out", "samples", "holdout"):
        if getattr(given, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(given, name))]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(one)}: failed, see above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(found: dict[str, Any], subject: str, size: str, contender: str, seeds: list[str]) -> list[Any] | None:
    """One row of the table, over the seeds that are there."""
    own = [found[key] for seed in seeds if (key := f"{subject} {size} {contender} {seed}") in found]
    if not own:
        return None
    old = np.array(found[f"{subject} - baseline 0"]["scores"], dtype=np.float64)
    scores = np.array([one["scores"] for one in own], dtype=np.float64)  # (seeds, N)
    low, high = difference_interval(scores.mean(0), old)
    each = 100 * (scores.mean(1) - old.mean())
    said = f"{100 * (scores.mean() - old.mean()):+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
    verdict = "-"
    if size in MARGINS:
        verdict = "no worse" if 100 * low > -MARGINS[size] else "worse" if 100 * high < -MARGINS[size] else "not shown"
        verdict += f" at {MARGINS[size]:g}"
        if (short := 100 * (old.mean() - scores.mean()) - MARGINS[size]) > 0:
            verdict += f", short by {short:.2f}"
    seconds = np.mean([one["seconds"] for one in own])
    spread = f"{each.min():+.2f} to {each.max():+.2f}"
    value, share = f"{100 * scores.mean():.2f}", f"{own[0]['share']:.3f}"
    return [subject, size, contender, len(own), share, value, said, spread, verdict, f"{seconds:.0f}"]


def table(found: dict[str, Any], given: argparse.Namespace) -> str:
    """All that was found so far."""
    seeds, rows = [str(seed) for seed in given.seeds], []
    for subject in given.only:
        if (base := found.get(f"{subject} - baseline 0")) is None:
            continue
        rows.append(
            [
                subject,
                "-",
                "baseline",
                "",
                "1.000",
                f"{100 * np.mean(base['scores']):.2f}",
                "",
                "",
                f"n = {len(base['scores'])}",
                None,
            ]
        )
        places = [(s, c) for s in given.sizes for c in (*CONTENDERS, CEILING)] + [("ffn-half", c) for c in CRITERIA]
        rows += [one for size, contender in places if (one := row(found, subject, size, contender, seeds))]
    heads = ["subject", "size", "contender", "seeds", "vision", "%", "points to baseline [95%]", "seeds from, to", "verdict", "s"]
    return tabulate(rows, headers=heads, disable_numparse=True)


def comparisons(found: dict[str, Any], given: argparse.Namespace) -> str:
    """Ours less each other contender, of the same examples and seeds, and whether their intervals to the baseline are apart."""
    rows = []
    for subject, size, other in ((s, z, c) for s in given.only for z in given.sizes for c in CONTENDERS[1:]):
        keys = [[f"{subject} {size} {contender} {seed}" for contender in ("ours", other)] for seed in given.seeds]
        both = [pair for pair in keys if all(key in found for key in pair)]
        base = found.get(f"{subject} - baseline 0")
        if not both or base is None:
            continue
        ours, theirs = (np.mean([found[pair[i]]["scores"] for pair in both], axis=0) for i in range(2))
        low, high = difference_interval(ours, theirs)
        least, most = (
            difference_interval(ours, np.array(base["scores"]))[0],
            difference_interval(theirs, np.array(base["scores"]))[1],
        )
        short = 100 * (most - least)
        said = f"{100 * (ours.mean() - theirs.mean()):+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
        rows.append([subject, size, other, len(both), said, "yes" if short < 0 else f"no, by {short:.2f}"])
    heads = ["subject", "size", "ours less", "seeds", "points [95%]", "intervals to baseline above theirs"]
    return tabulate(rows, headers=heads, disable_numparse=True)


def main() -> None:
    """Runs what is missing and prints, or does one job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=["fashion", "emoji"], default=["fashion", "emoji"])
    parser.add_argument("--fashion-model", type=Path)
    parser.add_argument("--fashion-data", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument("--emoji-model", type=Path, default=Path("benchmarks/results/emoji-clip"))
    parser.add_argument("--emoji-data", type=Path, help="folder with a Parquet file for each vendor")
    parser.add_argument("--held-out", choices=VENDORS, default="twemoji")
    parser.add_argument("--sizes", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, help="only so many training examples of fashion, for a try")
    parser.add_argument("--holdout", type=int, help="leave so many training examples of fashion out, and score on them")
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recovery.json"))
    parser.add_argument("--job", nargs=3, metavar=("SIZE", "CONTENDER", "SEED"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    silence_libraries()
    if given.job:
        print("\n" + json.dumps(job(given)))
        return
    needed = {"fashion": ("fashion_model", "fashion_data"), "emoji": ("emoji_data", "emoji_model")}
    for name in (n for subject in given.only for n in needed[subject]):
        if getattr(given, name) is None or not getattr(given, name).is_dir():
            parser.error(f"--{name.replace('_', '-')}: needs a folder that is there; found {getattr(given, name)}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(given.out.read_text()) if given.out.exists() else {"found": {}, "environment": environment()}
    keeping = threading.Lock()

    def run(one: tuple[str, str, str, str]) -> None:
        key = " ".join(one)
        sys.stderr.write(f"{key}\n")
        found = in_a_process(one, given)
        with keeping:
            kept["found"][key] = found
            write_json(given.out, kept)

    missing = [one for one in jobs(given) if " ".join(one) not in kept["found"]]
    with ThreadPoolExecutor(given.jobs) as pool:
        try:
            for _ in pool.map(run, missing):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
    print(table(kept["found"], given), comparisons(kept["found"], given), sep="\n\n")


if __name__ == "__main__":
    main()
