"""Reports with made-up numbers, for tests of the views. Nothing here was measured."""

from __future__ import annotations

from typing import Any

from mmcompress.report.schema import (
    Change,
    ClassScore,
    ComponentRow,
    Gain,
    GateResult,
    Latency,
    Parity,
    Quality,
    Report,
    Row,
    Totals,
    Warning_,
)

HOSTILE = "<script>alert('x')</script>|a\"b&c"


def latency(p50: float, n: int = 200) -> Latency:
    return Latency(p50=p50, p90=p50 * 1.08, p99=p50 * 1.31, low=p50 * 0.985, high=p50 * 1.02, n=n)


def quality(value: float, n: int = 2000) -> Quality:
    half = 1.96 * (value * (1 - value) / n) ** 0.5
    return Quality(value=value, low=value - half, high=value + half, n=n)


def change(difference: float, lost: int, won: int, half: float = 0.007, n: int = 2000) -> Change:
    low, high = difference - half, difference + half
    verdict = "identical" if half == 0 else "worse" if high < 0 else "better" if low > 0 else "no clear difference"
    return Change(difference=difference, low=low, high=high, n=n, lost=lost, won=won, verdict=verdict)  # type: ignore[arg-type]


def towers(scale: float, ms: float, disk: float) -> dict[str, ComponentRow]:
    def tower(share: float) -> ComponentRow:
        return ComponentRow(
            parameters=int(151_277_313 * share * scale),
            disk_bytes=int(605_156_676 * share * disk),
            flops=int(14.8e9 * share * scale),
            latency_ms={"1": latency(ms * share), "8": latency(ms * 6.4 * share)},
        )

    return {"vision": tower(0.58), "text": tower(0.42)}


def classes(
    drops: dict[str, float], names: tuple[str, ...] = ("cat", "dog", "red fox", "tram", "kite", "mug", "fern")
) -> dict[str, ClassScore]:
    return {name: ClassScore(precision=0.86, recall=0.90 - drops.get(name, -0.01), n=40 + 7 * i) for i, name in enumerate(names)}


def row(step: str, runtime: str, accuracy: float, ms: float, scale: float, disk: float, **more: Any) -> Row:
    return Row(
        step=step,
        runtime=runtime,  # type: ignore[arg-type]
        parameters=int(151_277_313 * scale),
        disk_bytes=int(605_156_676 * disk),
        peak_memory_bytes=int(1_450_000_000 * (0.35 + 0.65 * disk)),
        flops=int(14.8e9 * scale),
        latency_ms={"1": latency(ms), "8": latency(ms * 6.4)},
        quality={"accuracy": quality(accuracy), "top5": quality(min(0.99, accuracy + 0.11))},
        components=towers(scale, ms, disk),
        **more,
    )


def recipe() -> dict[str, Any]:
    return {
        "name": "clip-cpu-int8",
        "model": "openai/clip-vit-base-patch32",
        "task": {"type": "zero-shot-image-classification", "templates": ["a photo of a {}."]},
        "data": {
            "train": {"path": "data/train.parquet", "columns": {"image": "image", "label": "label"}},
            "calibration": {"from": "train", "samples": 256},
            "eval": {"path": "data/test.parquet"},
        },
        "passes": [
            {"pass": "prune", "axis": "ffn", "ratio": {"vision": 0.5, "text": 0.3}, "criterion": "taylor"},
            {"pass": "distill", "epochs": 3, "losses": {"feature": 1.0, "affinity": 0.5}},
            {"pass": "quantize", "scheme": "int8-static"},
        ],
        "gates": [{"metric": "accuracy", "max_drop": 1.0}],
        "report": {"batch_sizes": [1, 8], "threads": 2},
        "seed": 0,
    }


def environment() -> dict[str, Any]:
    return {
        "python": "3.11.9",
        "platform": "Linux x86_64",
        "cpu": "AMD EPYC 9R14, 2 cores, avx512_vnni",
        "threads": 2,
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "onnxruntime": "1.31.0"},
    }


METRICS = {
    "accuracy": "Share of pictures whose label got the highest score.",
    "top5": "Share of pictures whose label is among the five highest scores.",
}


def _rows() -> list[Row]:
    parity = {
        "vision_model": Parity(max_abs_difference=3.1e-6, min_cosine=0.9999998, n=32),
        "text_model": Parity(max_abs_difference=2.4e-6, min_cosine=0.9999999, n=32),
    }
    rough = {
        "vision_model": Parity(max_abs_difference=0.21, min_cosine=0.9871, n=32),
        "text_model": Parity(max_abs_difference=0.16, min_cosine=0.9912, n=32),
    }
    settings = recipe()["passes"]
    return [
        row("baseline", "torch", 0.869, 41.3, 1, 1, classes=classes({}), notes=["The model as it was downloaded."]),
        row(
            "baseline",
            "onnxruntime",
            0.869,
            29.0,
            1,
            1,
            loads_with="onnx",
            parity=parity,
            change={"accuracy": change(0, 0, 0, 0.0)},
        ),
        row(
            "1-prune",
            "torch",
            0.612,
            31.9,
            0.74,
            0.74,
            change={"accuracy": change(-0.257, 540, 26)},
            seconds=18.2,
            settings=settings[0],
            result={"units_cut": 18432, "layers": 24},
            facts={"examples": 256},
            notes=["Right after the cut the model is not usable; the next step trains it."],
            folder="steps/01-prune",
        ),
        row(
            "2-distill",
            "torch",
            0.866,
            31.8,
            0.74,
            0.74,
            change={"accuracy": change(-0.003, 31, 25)},
            seconds=1264.0,
            settings=settings[1],
            result={"loss": 0.0417},
            facts={"examples": 90_000, "steps": 1407, "examples_per_second": 71.2},
            folder="steps/02-distill",
        ),
        row(
            "3-quantize",
            "onnxruntime",
            0.8615,
            10.4,
            0.74,
            0.19,
            precision="int8",
            loads_with="onnx",
            parity=rough,
            change={"accuracy": change(-0.0075, 48, 33), "top5": change(-0.002, 14, 10)},
            seconds=41.7,
            settings=settings[2],
            classes=classes({"tram": 0.11, "mug": 0.06, "cat": 0.03, "kite": 0.02, "dog": 0.0}),
            facts={"calibration_examples": 256},
            notes=["Slowest 1% of calls take 31% longer than the median."],
            folder="steps/03-quantize",
        ),
        row(
            "3-quantize",
            "openvino",
            0.862,
            8.4,
            0.74,
            0.19,
            precision="int8",
            loads_with="onnx",
            change={"accuracy": change(-0.0068, 46, 32), "top5": change(-0.002, 14, 10)},
            folder="steps/03-quantize",
        ),
    ]


def full() -> Report:
    """A finished run: pruned, distilled, quantized; a gate met, one not shown."""
    return Report(
        name="clip-cpu-int8",
        model_class="CLIPModel",
        recipe=recipe(),
        environment=environment(),
        metrics=METRICS,
        rows=_rows(),
        gates=[
            GateResult(
                metric="accuracy",
                step="3-quantize",
                runtime="onnxruntime",
                max_drop=2.0,
                verdict="met",
                words="accuracy may drop by 2.0 points; it drops by 0.8 (at most 1.4)",
            ),
            GateResult(
                metric="accuracy",
                step="3-quantize",
                runtime="onnxruntime",
                max_drop=1.0,
                verdict="not shown",
                words="accuracy may drop by 1.0 points; it drops by 0.8, but the interval reaches 1.4: too few examples to say",
            ),
        ],
        warnings=[Warning_(step="3-quantize", text="calibrated on 256 examples of 2 classes fewer than the evaluation has")],
        totals=Totals(
            headline="clip-vit-base-patch32 is 81% smaller on disk and 4.9x faster (batch 1, OpenVINO, 2 threads) "
            "for 0.7 points of accuracy (86.9% to 86.2% on 2,000 pictures).",
            finished=True,
            final_step="3-quantize",
            final_runtime="openvino",
            metric="accuracy",
            parameters_ratio=0.74,
            disk_ratio=0.19,
            flops_ratio=0.74,
            speedup={
                "1": Gain(runtime=1.424, compression=2.788, compression_torch=1.299, total=4.917),
                "8": Gain(runtime=1.424, compression=2.788, compression_torch=1.299, total=4.917),
            },
            seconds=1323.9,
        ),
    )


def half_finished() -> Report:
    """Stopped after the first step: two rows, next to no values."""
    rows = [
        Row(step="baseline", runtime="torch", parameters=3_600_257, disk_bytes=14_401_028),
        Row(step="1-prune", runtime="torch", parameters=2_410_000, disk_bytes=9_640_000),
    ]
    totals = Totals(headline="The run is not finished: 1 of 3 steps done.", finished=False, metric="accuracy", synthetic=True)
    return Report(name="half", recipe=recipe(), environment={}, rows=rows, totals=totals)


def empty() -> Report:
    """Not even the baseline is there."""
    return Report(name="none", recipe={}, environment={}, totals=Totals(headline="Nothing measured yet.", finished=False))


def bad() -> Report:
    """A finished run in which everything went wrong."""
    report = full()
    rows = [r for r in report.rows if r.step == "baseline" or r.step == "1-prune"]
    rows[2] = rows[2].model_copy(update={"rolled_back": True})
    rows.append(
        row(
            "2-quantize",
            "onnxruntime",
            0.831,
            52.0,
            1,
            1.03,
            precision="int8",
            loads_with="onnx",
            change={"accuracy": change(-0.038, 96, 20)},
            seconds=40.0,
        )
    )
    gates = [
        GateResult(
            metric="accuracy",
            step="1-prune",
            runtime="torch",
            max_drop=1.0,
            verdict="missed",
            on_miss="rollback",
            words="accuracy may drop by 1.0 points; it drops by 25.7 (at least 25.0)",
        ),
        GateResult(
            metric="accuracy",
            step="2-quantize",
            runtime="onnxruntime",
            max_drop=1.0,
            verdict="missed",
            words="accuracy may drop by 1.0 points; it drops by 3.8 (at least 3.1)",
        ),
    ]
    totals = Totals(
        headline="Nothing was gained: 1.26x slower, not smaller, and 3.8 points of accuracy lost.",
        finished=True,
        final_step="2-quantize",
        final_runtime="onnxruntime",
        metric="accuracy",
        parameters_ratio=1.0,
        disk_ratio=1.03,
        speedup={
            "1": Gain(runtime=1.424, compression=0.558, compression_torch=None, total=0.794),
            "8": Gain(runtime=None, compression=None, compression_torch=None, total=0.794),
        },
        seconds=58.2,
        synthetic=True,
    )
    return report.model_copy(update={"name": "went-wrong", "rows": rows, "gates": gates, "totals": totals})


def torch_only() -> Report:
    """No ONNX rows at all, one metric, one batch size."""
    report = full()
    rows = [r.model_copy(update={"latency_ms": {"1": r.latency_ms["1"]}}) for r in report.rows if r.runtime == "torch"]
    rows = [r.model_copy(update={"components": {}, "peak_memory_bytes": None, "flops": None}) for r in rows]
    totals = Totals(
        headline="26% smaller.",
        finished=True,
        final_step="2-distill",
        final_runtime="torch",
        metric="accuracy",
        parameters_ratio=0.74,
        disk_ratio=0.74,
        speedup={"1": Gain(runtime=None, compression=None, compression_torch=1.299, total=1.299)},
    )
    return report.model_copy(update={"name": "torch-only", "rows": rows, "gates": [], "warnings": [], "totals": totals})


def hostile() -> Report:
    """Names and texts that would break out of HTML or Markdown if they could."""
    report = full()
    final = report.rows[4]
    names = (HOSTILE, "dog", "a|b")
    rows = [
        report.rows[0].model_copy(update={"classes": classes({}, names)}),
        *report.rows[1:4],
        final.model_copy(
            update={
                "step": f"3-{HOSTILE}",
                "classes": classes({HOSTILE: 0.2, "a|b": 0.1}, names),
                "notes": [HOSTILE],
                "components": {HOSTILE: final.components["vision"]},
                "parity": {HOSTILE: final.parity["text_model"]},
                "facts": {HOSTILE: HOSTILE},
                "settings": {"x": "```\n# not a heading"},
                "precision": HOSTILE,
            }
        ),
    ]
    totals = report.totals.model_copy(update={"headline": f"Headline {HOSTILE}", "final_step": f"3-{HOSTILE}"})
    return report.model_copy(
        update={
            "name": HOSTILE,
            "rows": rows,
            "totals": totals,
            "metrics": {**METRICS, HOSTILE: HOSTILE},
            "recipe": {**recipe(), "name": HOSTILE, "model": HOSTILE, "note": "```\n</pre><script>"},
            "environment": {HOSTILE: HOSTILE},
            "warnings": [Warning_(step=HOSTILE, text=HOSTILE)],
        }
    )


def long() -> Report:
    """Many steps in two runtimes, close together: a hard case for the picture's labels."""
    report = full()
    rows = [r for r in report.rows if r.step == "baseline"]
    for i in range(1, 7):
        for runtime, ms in (("torch", 40 - 2.1 * i), ("onnxruntime", 28 - 1.7 * i)):
            rows.append(
                row(
                    f"{i}-prune",
                    runtime,
                    0.869 - 0.0022 * i,
                    ms,
                    1 - 0.06 * i,
                    1 - 0.06 * i,
                    change={"accuracy": change(-0.0022 * i, 20 + i, 12)},
                    seconds=12.0 * i,
                )
            )
    gain = Gain(runtime=1.424, compression=1.629, compression_torch=1.507, total=2.32)
    totals = Totals(
        headline="36% smaller, 2.3x faster.",
        finished=True,
        final_step="6-prune",
        final_runtime="onnxruntime",
        metric="accuracy",
        parameters_ratio=0.64,
        disk_ratio=0.64,
        speedup={"1": gain, "8": gain},
    )
    return report.model_copy(update={"name": "long", "rows": rows, "gates": [], "warnings": [], "totals": totals})


def _speech_row(step: str, runtime: str, wer: float, ms: float, scale: float, **more: Any) -> Row:
    found = {
        "wer": Quality(value=wer, low=wer * 0.9, high=wer * 1.1, n=500),
        "exact_match": quality(max(0.0, 0.9 - wer), 500),
        "cider": Quality(value=1.2 - wer, low=1.15 - wer, high=1.25 - wer, n=500),
    }
    return row(step, runtime, 0.5, ms, scale, scale, **more).model_copy(update={"quality": found})


def error_change(difference: float, lost: int, won: int, half: float = 0.004) -> Change:
    """Of a metric that counts mistakes: a rise is worse."""
    found = change(difference, lost, won, half, 500)
    swapped = {"better": "worse", "worse": "better"}
    return found.model_copy(update={"verdict": swapped.get(found.verdict, found.verdict)})


def speech() -> Report:
    """A headline metric whose lower values are better: useless after the cut, worse after quantization."""
    rows = [
        _speech_row("baseline", "torch", 0.05, 40.0, 1.0),
        _speech_row("1-prune", "torch", 1.23, 30.0, 0.7, change={"wer": error_change(1.18, 480, 0, 0.05)}),
        _speech_row("2-distill", "torch", 0.041, 30.0, 0.7, change={"wer": error_change(-0.009, 12, 30)}),
        _speech_row("3-quantize", "onnxruntime", 0.062, 12.0, 0.3, change={"wer": error_change(0.012, 41, 9)}, loads_with="onnx"),
    ]
    task = {"type": "automatic-speech-recognition"}
    gate = GateResult(
        metric="wer", step="3-quantize", runtime="onnxruntime", max_value=7.0, verdict="met", words="wer is 6.20; at most 7"
    )
    return Report(
        name="whisper-small",
        model_class="WhisperForConditionalGeneration",
        recipe={**recipe(), "name": "whisper-small", "model": "openai/whisper-tiny", "task": task},
        environment=environment(),
        metrics={"wer": "word error rate", "exact_match": "share of transcripts that are right", "cider": "CIDEr-D"},
        lower_is_better=["wer"],
        units={"wer": "percent", "exact_match": "percent", "cider": "points"},
        rows=rows,
        gates=[gate],
        totals=Totals(
            headline="whisper-small: wer 5.0 to 6.2 (lower is better).",
            finished=True,
            final_step="3-quantize",
            final_runtime="onnxruntime",
            metric="wer",
            parameters_ratio=0.3,
            disk_ratio=0.3,
            speedup={"1": Gain(runtime=1.4, compression=2.4, compression_torch=1.3, total=3.33)},
        ),
    )


ALL = {f.__name__: f for f in (full, half_finished, empty, bad, torch_only, hostile, long, speech)}
