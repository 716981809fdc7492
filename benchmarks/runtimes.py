"""CLIP by runtime and quantization scheme, side by side: each contender in a process of its own, in interleaved rounds.

    python benchmarks/runtimes.py [--model shapes|vit-b-32] [--rounds 3] [--out results.json]

``shapes`` is the bundled model; ``vit-b-32`` is built from its config with random weights (speed and size mean something, quality
does not). Prints a table of medians over the rounds with their spread, and ratios to torch; writes the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from tabulate import tabulate
from transformers import CLIPConfig, CLIPModel

import mmcompress as mm
from mmcompress.config import BUNDLED
from mmcompress.context import Context
from mmcompress.data.sources import load_source
from mmcompress.environment import environment
from mmcompress.families.clip import FAMILY
from mmcompress.logs import silence_libraries
from mmcompress.measure.latency import measure
from mmcompress.model import CompressedModel
from mmcompress.passes.prune import Prune
from mmcompress.passes.quantize import Quantize
from mmcompress.processor import load_processor
from mmcompress.recipe import Source
from mmcompress.tasks.zero_shot_image_classification import ZeroShotImageClassification

TASK = ZeroShotImageClassification(type="zero-shot-image-classification")


def subject(name: str) -> CompressedModel:
    """The bundled model, or ViT-B/32 with random weights (the bundled processor resizes to its picture size)."""
    bundled = mm.load("bundled:shapes-clip")
    if name == "shapes":
        return bundled
    torch.manual_seed(0)
    module = CLIPModel(CLIPConfig()).eval()
    processor = load_processor(BUNDLED / "shapes-clip")
    size = module.config.vision_config.image_size
    processor.image_processor.size = {"shortest_edge": size}
    processor.image_processor.crop_size = {"height": size, "width": size}
    return CompressedModel(module, processor, FAMILY, name)


def contenders(model: CompressedModel, work: Path) -> dict[str, tuple[Path, str]]:
    """Name to folder and runtime."""
    data = load_source(Source.model_validate({"path": "bundled:shapes", "samples": 64}), "train", 0)
    found = {"torch fp32": (model.save(work / "torch"), "torch")}
    half = Prune(axis="ffn", ratio=0.5).apply(model)
    found["torch fp32, half ffn"] = (half.save(work / "half"), "torch")
    for label, one in (("", model), (", half ffn", half)):
        passes = {"fp32": mm.passes.Export(), "int8-dynamic": Quantize(scheme="int8-dynamic"), "int8-static": Quantize()}
        for name, step in passes.items():
            context = Context(task=TASK, train=data, workdir=work / f"{name}{label}")
            made = step.apply(one, context=context).onnx
            one.module.config.save_pretrained(made)
            found[f"onnxruntime {name}{label}"] = (made, "onnxruntime")
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["shapes", "vit-b-32"], default="shapes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/runtimes.json"))
    given = parser.parse_args()
    silence_libraries()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        found = contenders(subject(given.model), Path(scratch))
        times: dict[str, dict[str, list[float]]] = {name: {"1": [], "8": []} for name in found}
        for _ in range(given.rounds):
            for name, (folder, runtime) in found.items():
                timed = measure(folder, runtime, batch_sizes=[1, 8], threads=given.threads, seconds=given.seconds)
                for batch, latency in timed["latency_ms"].items():
                    times[name][batch].append(latency.p50)
        for name, (folder, runtime) in found.items():
            pattern = "*.safetensors" if runtime == "torch" else "*.onnx"
            row = {"contender": name, "megabytes": sum(p.stat().st_size for p in folder.glob(pattern)) / 1e6}
            for batch, values in times[name].items():
                ratios = [a / b for a, b in zip(times["torch fp32"][batch], values, strict=True)]
                row[f"batch {batch} ms"] = statistics.median(values)
                row[f"batch {batch} ms, range"] = f"{min(values):.2f} to {max(values):.2f}"
                row[f"batch {batch} speed"] = statistics.median(ratios)
            rows.append(row)
    print(f"{given.model}, {given.threads} threads, {given.rounds} rounds, both towers once")
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"model": given.model, "rows": rows, "environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
