"""Models timed side by side, each in a process of its own, taking turns: for ``mmcompress bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tabulate import tabulate

from mmcompress.config import family_of, load_config, resolve
from mmcompress.environment import cpu_features, cpu_name
from mmcompress.errors import ModelError
from mmcompress.evaluate import is_onnx_folder
from mmcompress.families.base import without_weights
from mmcompress.measure.side_by_side import Entry, Result, Settings, side_by_side
from mmcompress.model import load
from mmcompress.report.schema import BUSY_CORES
from mmcompress.report.schema_speed import speed_verdict_of

NOTE = (
    "all components once, decoders for 16 tokens; each model in a process of its own, only one computes at a time; speed is the "
    "first line's time over this one's with its 95% interval over the rounds; noise is the first model against itself"
)


def bench_models(sources: list[str], batch_sizes: list[int], threads: int, seconds: float) -> dict[str, Any]:
    """Latency, throughput and peak memory of each model, and how many times as fast as the first one it is.

    Args:
        sources: model folders (torch), bundled names, or folders with ONNX components.
        seconds: for each figure.
    """
    entries: list[Entry] = []
    named: list[tuple[str, str]] = []
    for source in sources:
        for entry in _entries(source, batch_sizes, len(entries)):
            entries.append(entry)
            named.append((source, entry.runtime))
    first = entries[0].name
    timed = side_by_side(entries, [(first, e.name) for e in entries[1:]], Settings(batch_sizes, threads, seconds))
    models = [_model(timed, entry, *name, first) for entry, name in zip(entries, named, strict=True)]
    return {
        "threads": threads,
        "cpu": cpu_name(),
        "cpu_features": cpu_features(),
        "affinity": timed.affinity,
        "busy_cores": timed.busy_cores,
        "idle_cores": timed.idle_cores,
        "rounds": timed.rounds,
        "energy": timed.energy,
        "noise": {batch: found.model_dump() for batch, found in timed.noise.items()},
        "models": models,
    }


def _entries(source: str, batch_sizes: list[int], begun: int) -> list[Entry]:
    """The model in torch and, where it has them, its ONNX components."""
    where = resolve(source)
    if not isinstance(where, Path):
        raise ModelError(f"bench {source}: needs a local folder; load the model once and save it")
    runtimes = ["onnxruntime"] if is_onnx_folder(where) else ["torch"]
    if runtimes == ["torch"] and (where / "onnx").is_dir():
        runtimes.append("onnxruntime")
    config = load_config(where)
    family = family_of(config, str(where))
    module = load(where).module if runtimes[0] == "torch" else without_weights(family, config)
    calls = {size: family.calls(module, size) for size in {1, *batch_sizes}}
    return [Entry(f"{begun + i}", where, runtime, calls) for i, runtime in enumerate(runtimes)]


def _model(timed: Result, entry: Entry, source: str, runtime: str, first: str) -> dict[str, Any]:
    latency = timed.latency[entry.name]
    ratios = timed.ratios.get((first, entry.name), {})
    started = timed.started[entry.name]
    return {
        "model": source,
        "runtime": runtime,
        "latency_ms": {b: t.model_dump() for b, t in latency.items()},
        "throughput_per_second": {b: int(b) * 1e3 / (t.mean or t.p50) for b, t in latency.items()},
        "ratio": {b: r.model_dump() | {"verdict": speed_verdict_of(r, timed.noise.get(b))} for b, r in ratios.items()},
        "joules": timed.joules[entry.name],
        "peak_memory_bytes": timed.peak_memory_bytes[entry.name],
        "load_seconds": started["load_seconds"],
        "start_seconds": started["start_seconds"],
        "first_inference_ms": started["first_inference_ms"],
    }


def render_bench(found: dict[str, Any]) -> str:
    """The same as text."""
    rows = []
    for one in found["models"]:
        for batch, t in one["latency_ms"].items():
            ratio = one["ratio"].get(batch)
            speed = f"{ratio['ratio']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else "1.00x"
            rows.append(
                [
                    one["model"],
                    one["runtime"],
                    batch,
                    f"{t['p50']:.2f}",
                    _or_dash(t["p90"]),
                    _or_dash(t["p99"]),
                    f"{one['throughput_per_second'][batch]:.0f}",
                    speed + (" ~" if ratio and ratio["verdict"] == "no clear difference" else ""),
                    f"{one['peak_memory_bytes'] / 1e6:.0f}",
                ]
            )
    headers = ["model", "runtime", "batch", "p50 ms", "p90 ms", "p99 ms", "examples/s", "speed", "peak MB"]
    noise = ", ".join(f"{n['ratio']:.3f} [{n['low']:.3f}, {n['high']:.3f}] at batch {b}" for b, n in found["noise"].items())
    lines = [tabulate(rows, headers=headers, disable_numparse=True), ""]
    lines.append(f"noise: {noise}; ~ is no clear difference beside it; - is not enough calls for that percentile")
    cores = ", ".join(map(str, found["affinity"])) or "not known"
    features = ", ".join(found["cpu_features"]) or "features not known"
    lines.append(f"{found['threads']} threads on cores {cores} of {found['cpu']} ({features})")
    if found["busy_cores"] > BUSY_CORES:
        lines.append(f"BUSY: other programs used {found['busy_cores']:.1f} cores meanwhile; do not quote these numbers")
    return "\n".join([*lines, NOTE])


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
