"""Latency and memory of one model, each measurement in a process of its own.

A process of its own keeps the thread pools, allocators and caches of one model away from the next one's (two ONNX Runtime
sessions in one process disturb each other), and its peak resident memory is that model's alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.torch import save_file
from transformers import PreTrainedModel

from mmcompress.errors import UnavailableError
from mmcompress.families.base import Call, Family
from mmcompress.measure.statistics import median_interval
from mmcompress.politeness import environment_for_timing
from mmcompress.report.schema import Latency

WORKER = "mmcompress.measure.worker"


def summarize(times_ms: list[float]) -> Latency:
    """Percentiles of single calls and the interval of their median."""
    p50, p90, p99 = (float(v) for v in np.quantile(times_ms, [0.5, 0.9, 0.99]))
    low, high = median_interval(np.asarray(times_ms))
    return Latency(p50=p50, p90=p90, p99=p99, low=low, high=high, n=len(times_ms))


def measure(
    folder: Path,
    runtime: str,
    *,
    batch_sizes: list[int],
    threads: int,
    seconds: float,
    family: Family,
    module: PreTrainedModel,
    device: str = "cpu",
) -> dict[str, Any]:
    """Times a saved model in a fresh process.

    Args:
        folder: a model folder (torch) or one with ONNX components.
        runtime: ``torch`` or ``onnxruntime``.
        family: says what is called how often for one batch, with which inputs.
        module: the model that is in the folder, or one of its shapes without weights.
        seconds: time spent on each figure; at least 20 calls are made.

    Returns:
        ``latency_ms`` (by batch size), ``components`` (by component, by batch size), ``peak_memory_bytes``, ``load_seconds``,
        ``busy_cores`` (cores that other programs used meanwhile).

    Raises:
        UnavailableError: the process failed; the message holds the end of what it said.
    """
    job = {
        "folder": str(folder),
        "runtime": runtime,
        "batch_sizes": batch_sizes,
        "threads": threads,
        "seconds": seconds,
        "device": device,
    }
    with TemporaryDirectory(prefix="mmcompress-") as scratch:
        # The inputs are made here: only a family knows them, and the process must not load torch to time ONNX Runtime.
        job["calls"] = {str(size): _write_calls(family.calls(module, size), Path(scratch) / str(size)) for size in batch_sizes}
        raw = _in_a_process(job, threads)
    return {
        "latency_ms": {b: summarize(t) for b, t in raw["together"].items()},
        "components": {c: {b: summarize(t) for b, t in by.items()} for c, by in raw["components"].items()},
        "peak_memory_bytes": raw["peak_memory_bytes"],
        "load_seconds": raw["load_seconds"],
        "busy_cores": raw["busy_cores"],
    }


def _write_calls(calls: list[Call], folder: Path) -> list[dict[str, Any]]:
    """The calls of one batch as data: component, times, and the file that holds the inputs."""
    folder.mkdir()
    found = []
    for i, call in enumerate(calls):
        path = folder / f"{i}.safetensors"
        save_file({name: values.contiguous().clone() for name, values in call.inputs.items()}, path)
        found.append({"component": call.component, "times": call.times, "inputs": str(path)})
    return found


def _in_a_process(job: dict[str, Any], threads: int) -> dict[str, Any]:
    # The number of threads is set in the environment too: some pools read it only when they are loaded.
    env = {
        **environment_for_timing(),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, "-m", WORKER], input=json.dumps(job), capture_output=True, text=True, env=env, check=False
    )
    if done.returncode != 0:
        last = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:] or [f"exit code {done.returncode}"]
        raise UnavailableError(f"measuring {job['folder']} in {job['runtime']} failed: {last[0]}")
    raw: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return raw
