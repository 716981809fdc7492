"""Models timed side by side, each in a process of its own: for ``mmcompress bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tabulate import tabulate

from mmcompress.config import family_of, load_config, resolve
from mmcompress.errors import ModelError
from mmcompress.evaluate import is_onnx_folder
from mmcompress.families.base import without_weights
from mmcompress.measure.latency import measure
from mmcompress.model import load

NOTE = "all components once, decoders for 16 tokens; each model in a process of its own; speed is relative to the first line"


def bench_models(sources: list[str], batch_sizes: list[int], threads: int, seconds: float) -> dict[str, Any]:
    """Latency, throughput and peak memory of each model, one after the other, each in a process of its own.

    Args:
        sources: model folders (torch), bundled names, or folders with ONNX components.
        seconds: for each figure.
    """
    found = []
    for source in sources:
        where = resolve(source)
        if not isinstance(where, Path):
            raise ModelError(f"bench {source}: needs a local folder; load the model once and save it")
        runtimes = ["onnxruntime"] if is_onnx_folder(where) else ["torch"]
        if runtimes == ["torch"] and (where / "onnx").is_dir():
            runtimes.append("onnxruntime")
        config = load_config(where)
        family = family_of(config, str(where))
        module = load(where).module if runtimes[0] == "torch" else without_weights(family, config)
        for runtime in runtimes:
            timed = measure(
                where, runtime, batch_sizes=batch_sizes, threads=threads, seconds=seconds, family=family, module=module
            )
            latency = {b: t.model_dump() for b, t in timed["latency_ms"].items()}
            found.append(
                {
                    "model": source,
                    "runtime": runtime,
                    "latency_ms": latency,
                    "throughput_per_second": {b: int(b) * 1e3 / t["p50"] for b, t in latency.items()},
                    "components": {c: {b: t.model_dump() for b, t in by.items()} for c, by in timed["components"].items()},
                    "peak_memory_bytes": timed["peak_memory_bytes"],
                    "load_seconds": timed["load_seconds"],
                }
            )
    return {"threads": threads, "models": found}


def render_bench(found: dict[str, Any]) -> str:
    """The same as text; ratios are to the first model."""
    rows = []
    first = found["models"][0]
    for one in found["models"]:
        for batch, t in one["latency_ms"].items():
            ratio = first["latency_ms"][batch]["p50"] / t["p50"]
            rows.append(
                [
                    one["model"],
                    one["runtime"],
                    batch,
                    f"{t['p50']:.2f}",
                    f"{t['low']:.2f} to {t['high']:.2f}",
                    f"{t['p90']:.2f}",
                    f"{t['p99']:.2f}",
                    f"{one['throughput_per_second'][batch]:.0f}",
                    f"{ratio:.2f}x",
                    f"{one['peak_memory_bytes'] / 1e6:.0f}",
                ]
            )
    headers = ["model", "runtime", "batch", "p50 ms", "95% of median", "p90 ms", "p99 ms", "examples/s", "speed", "peak MB"]
    text = tabulate(rows, headers=headers, disable_numparse=True)
    return f"{text}\n\n{NOTE}; {found['threads']} threads"
