"""How long the int8 pass takes over a CLIP ViT-B/32 with random weights, both towers, 128 pairs; with and without the search.

    python benchmarks/int8_seconds.py [--placement measure] [--pairs 128] [--limit 180] [--olive-python P] [--out FILE]

The whole pass is timed: export, calibration, all candidates, the contest, writing. Exits with 1 above the limit.

With --olive-python, the python of an environment with olive-ai, Olive's static pass with its defaults is timed too, in a process
of its own for each tower, on our float files and the very inputs that ours calibrates on; its seconds begin when Olive is
imported, and the time of the export is added. Memory is the largest of any process, ours with the model itself.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow
from tabulate import tabulate
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import mmcompress as mm
from mmcompress.config import family_of
from mmcompress.context import Context
from mmcompress.data.examples import Examples, as_examples
from mmcompress.environment import environment
from mmcompress.logs import silence_libraries
from mmcompress.measure.worker import peak_memory_bytes
from mmcompress.model import CompressedModel
from mmcompress.processor import Processor
from mmcompress.quantization.onnx_export import export_component
from mmcompress.tasks.zero_shot_image_classification import ZeroShotImageClassification

HERE = Path(__file__).parent
COLOURS = ["red", "green", "blue", "yellow", "purple", "white"]
VOCABULARY, BEGIN, END = 49408, 49406, 49407
"""CLIP's: the text tower pools at the token with this id."""

PEAK = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(done.returncode)
"""
"""Runs a command and prints its peak memory; in a process of its own, as Linux counts what the parent of a process held too."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words with CLIP's ids for the ends of a text."""
    ids = {word: i for i, word in enumerate(["<unk>", "a", "photo", "of", *COLOURS])}
    ids |= {"<bos>": BEGIN, "<eos>": END}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BEGIN), ("<eos>", END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<eos>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", model_max_length=77
    )


def pairs(count: int) -> Examples:
    """Blurred noise with labels; a template makes their texts."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        buffer = io.BytesIO()
        little = Pillow.fromarray(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8))
        little.resize((224, 224), Pillow.Resampling.BICUBIC).save(buffer, format="PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": i % len(COLOURS)})
    return as_examples(Dataset.from_list(rows, features=Features({"image": Image(), "label": ClassLabel(names=COLOURS)})))


def model() -> CompressedModel:
    """Of the published size."""
    torch.manual_seed(0)
    module = CLIPModel(CLIPConfig()).eval()
    family = family_of(module.config, "clip-vit-b-32")
    return CompressedModel(
        module, Processor(tokenizer(), CLIPImageProcessorPil(), family=family, config=module.config), family, "clip-vit-b-32"
    )


def olive(python: str, whole: CompressedModel, context: Context, step: mm.passes.Quantize) -> dict[str, float]:
    """Seconds and peak memory of Olive's static pass over both towers."""
    export = spent = peak = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for name, part in whole.family.components(whole.module).items():
            work = Path(scratch) / name
            work.mkdir()
            start = time.monotonic()
            export_component(part, whole.family.example_inputs(whole.module.config, part, 2), work / "float.onnx")
            export += time.monotonic() - start
            batches = list(step._calibration(whole, context, name))
            np.savez(work / "calibration.npz", **{key: np.concatenate([one[key] for one in batches]) for key in part.inputs})
            words = [python, str(HERE / "int8_others.py"), "olive-static"]
            words += [str(work / one) for one in ("float.onnx", "calibration.npz", "olive.onnx")]
            start = time.monotonic()
            done = subprocess.run([sys.executable, "-c", PEAK, *words], stdout=subprocess.PIPE, text=True, check=False, cwd=work)
            spent += time.monotonic() - start
            if done.returncode or not (work / "olive.onnx").exists():
                raise SystemExit(f"Olive failed on {name}")
            peak = max(peak, float(done.stdout))
    return {"seconds": spent, "export_seconds": export, "peak_memory_bytes": peak}


def main() -> None:
    """Times and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--placement", choices=["measure", "fixed"], default="measure")
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--limit", type=float, default=180.0, help="seconds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--olive-python", help="python of an environment with olive-ai")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "int8-seconds.json")
    given = parser.parse_args()
    silence_libraries()
    whole, examples = model(), pairs(given.pairs)
    task = ZeroShotImageClassification(type="zero-shot-image-classification", templates=["a photo of a {}"])
    step = mm.passes.Quantize(placement=given.placement, samples=given.pairs, threads=given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(task=task, train=examples, workdir=Path(scratch))
        start = time.monotonic()
        step.apply(whole, context=context)
        seconds = time.monotonic() - start
    placed = context.facts.get("placement", {})
    for name, found in placed.items():
        print(f"{name}: {found['chosen']}, {found['speedup']['ratio']:.2f} times as fast as float32")
        print(tabulate([one.values() for one in found["candidates"]], found["candidates"][0].keys(), floatfmt=".4f"))
        print("  " + ", ".join(f"{what} {spent:.1f} s" for what, spent in found["seconds"].items()))
    print(f"{seconds:.1f} s in all ({given.placement}), peak memory {peak_memory_bytes() / 1e9:.2f} GB")
    result: dict[str, Any] = {
        "placement": given.placement,
        "pairs": given.pairs,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    if given.olive_python is not None:
        result["olive"] = found = olive(given.olive_python, whole, context, step)
        both = found["seconds"] + found["export_seconds"]
        print(
            f"Olive's static pass: {both:.1f} s, {found['export_seconds']:.1f} of it our export; "
            f"peak memory {found['peak_memory_bytes'] / 1e9:.2f} GB"
        )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({**result, "found": placed, "environment": environment()}, indent=1) + "\n")
    raise SystemExit(int(seconds > given.limit))


if __name__ == "__main__":
    main()
