"""Latency and memory of one model, in a process of its own."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from mmcompress.families.base import Family
from mmcompress.measure.statistics import median_interval
from mmcompress.measure.turns import Contestant, Turns, write_calls
from mmcompress.measure.worker import LEAST_CALLS, ROUNDS, WARM_UP
from mmcompress.report.schema_speed import Latency

Z = 1.959964
MARGIN = 0.5
"""How far the share of slower calls may be from what a percentile says, as a share of it; MLPerf asks for a twentieth."""


def calls_needed(q: float) -> int:
    """How many calls a percentile needs to be shown.

    n = z^2 q (1 - q) / margin^2 (Reddi et al., MLPerf Inference Benchmark, 2020, section III.D), at 95% confidence, with half of
    1 - q for margin: 139 calls for the 90th percentile, 1,522 for the 99th.
    """
    return int(np.ceil(Z**2 * q * (1 - q) / (MARGIN * (1 - q)) ** 2))


def summarize(times_ms: list[float]) -> Latency:
    """Percentiles of single calls, where there are enough of them, and the interval of their median."""
    shown = {q: float(np.quantile(times_ms, q)) if len(times_ms) >= calls_needed(q) else None for q in (0.9, 0.99)}
    low, high = median_interval(np.asarray(times_ms))
    return Latency(
        p50=float(np.median(times_ms)),
        p90=shown[0.9],
        p99=shown[0.99],
        low=low,
        high=high,
        n=len(times_ms),
        mean=float(np.mean(times_ms)),
    )


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
        ``latency_ms`` (by batch size), ``components`` (by component, by batch size), ``peak_memory_bytes``, ``load_seconds`` (the
        model, with the libraries loaded), ``start_seconds`` (from the start of the process until the model is loaded),
        ``first_inference_ms`` (the first call of the smallest batch size), ``busy_cores`` (cores that other programs used).

    Raises:
        UnavailableError: the process failed; the message holds the end of what it said.
    """
    with TemporaryDirectory(prefix="mmcompress-") as scratch:
        calls = {str(size): write_calls(family.calls(module, size), Path(scratch) / str(size)) for size in batch_sizes}
        figures = dict.fromkeys(calls, seconds)
        for batch, own in calls.items():
            figures |= {f"{call['component']}/{batch}": seconds / 2 for call in own}
        with Turns([Contestant("", folder, runtime, calls, device)], threads) as turns:
            for figure in figures:
                turns.warm("", figure, WARM_UP)
            turns.begin()
            # All figures take turns, so that a busy second of the machine touches a fifth of each and no median.
            for _ in range(ROUNDS):
                for figure, time in figures.items():
                    turns.turn("", figure, time / ROUNDS, LEAST_CALLS // ROUNDS)
            busy, peak = turns.busy_cores(), turns.peak_memory_bytes("")
    found = {figure: summarize(turns.figures["", figure].times) for figure in figures}
    components: dict[str, dict[str, Latency]] = {}
    for figure, latency in found.items():
        component, _, batch = figure.rpartition("/")
        if component:
            components.setdefault(component, {})[batch] = latency
    return {
        "latency_ms": {batch: found[batch] for batch in calls},
        "components": components,
        "peak_memory_bytes": peak,
        "load_seconds": turns.started[""]["load_seconds"],
        "start_seconds": turns.started[""]["start_seconds"],
        "first_inference_ms": turns.started[""]["first_inference_ms"],
        "busy_cores": busy,
    }
