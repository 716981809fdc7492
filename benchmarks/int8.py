"""Speed of int8, side by side: torch, ONNX Runtime's defaults, Olive, NNCF and ours, each contender in a process of its own.

    python benchmarks/int8.py [--only clip-vit-b-32/vision_model] [--olive-python P] [--nncf-python P] [--keep FOLDER] [--print]

The models have random weights: speed and size mean something, quality is the cosine to the float file alone. Contenders take
turns, round by round, without letting the cores idle in between; the table has medians over the rounds with the fastest and the
slowest round, and the speed relative to ONNX Runtime in float32, from the rounds in pairs. Below it stands what ours reaches
of what it is to reach, and by how much it falls short.

With --keep the files stay and --out is added to: each model, component and batch size is measured once, so that the whole can be
run in pieces. Contenders whose environment is not given, or that fail, are left out with a word. OpenVINO runs in the
environment of --nncf-python where it is given.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static
from tabulate import tabulate
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from mmcompress.config import family_of
from mmcompress.environment import environment
from mmcompress.families.base import Family, without_weights
from mmcompress.logs import silence_libraries
from mmcompress.measure.ratios import ratio
from mmcompress.passes._placement import mean_cosine
from mmcompress.quantization import onnx_graph
from mmcompress.quantization.arrangements import arrange
from mmcompress.quantization.onnx_export import export_component
from mmcompress.quantization.ranges import collect_ranges
from mmcompress.quantization.schemes import ArrangementName
from mmcompress.quantization.weight_only import quantize_weights

HERE = Path(__file__).parent
SUBJECTS = {
    "clip-vit-b-32": (CLIPModel, CLIPConfig, {}),
    "siglip-base": (SiglipModel, SiglipConfig, {}),
    "whisper-base": (
        WhisperForConditionalGeneration,
        WhisperConfig,
        {
            "d_model": 512,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "encoder_attention_heads": 8,
            "decoder_attention_heads": 8,
            "encoder_ffn_dim": 2048,
            "decoder_ffn_dim": 2048,
        },
    ),
    "blip-base": (BlipForConditionalGeneration, BlipConfig, {}),
}
CALIBRATION = {"whisper-base": 4}
"""Rows of calibration data; 16 of the others. With 16 recordings the defaults of ONNX Runtime hold more than 20 GB."""
BASE = "onnxruntime fp32"
PLACEMENTS: tuple[ArrangementName, ...] = (
    "static",
    "static-fused",
    "static-per-tensor",
    "static-per-tensor-fused",
    "dynamic-fused",
    "dynamic-per-tensor-fused",
)
"""Of those that `placement: measure` tries, the ones that win; the plain static ones are what OpenVINO runs, too."""
SCORES: tuple[ArrangementName, ...] = ("static-scores", "static-scores-per-tensor")
"""What is tried in OpenVINO alone."""
DECODING: tuple[ArrangementName, ...] = ("dynamic", "dynamic-per-tensor")
"""What decoders can be given in place of integer weights alone, in a recipe that names the scheme for each component."""
PORTABLE = (
    "ours (static), onnxruntime",
    "ours (static-per-tensor), onnxruntime",
    *(f"ours ({name}), onnxruntime" for name in SCORES),
    "ours int8 weights, onnxruntime",
)
LEAD_SECONDS = 0.045
"""How long a contender runs untimed before its turn: for that long the threads of the one before may spin."""
AIMS = {("clip-vit-b-32", "vision_model", "1", "onnxruntime"): 3.0, ("clip-vit-b-32", "vision_model", "1", "openvino"): 3.9}
"""What ours is to reach, as times the speed of ONNX Runtime in float32, by model, component, batch size and runtime."""
Rows = list[dict[str, Any]]


def subject(name: str) -> tuple[Family, PreTrainedModel]:
    """A model of a published size with random weights."""
    cls, config, sizes = SUBJECTS[name]
    torch.manual_seed(0)
    module = cls(config(**sizes, architectures=[cls.__name__])).eval()
    return family_of(module.config, name), module


@dataclass
class Contender:
    """A file in a runtime, or why there is none."""

    name: str
    runtime: str
    path: str
    python: str = sys.executable
    missing: str = ""


class Reader(CalibrationDataReader):
    """Rows one by one, as the defaults of onnxruntime.quantization take them."""

    def __init__(self, rows: dict[str, np.ndarray]) -> None:
        self.items = iter([{k: v[i : i + 1] for k, v in rows.items()} for i in range(len(next(iter(rows.values()))))])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.items, None)


def contenders(component: str, model: str, decoder: bool, work: Path, given: argparse.Namespace) -> list[Contender]:
    """Makes every contender's file; ``work`` holds float.onnx, calibration.npz and inputs-1.npz."""
    source, rows = work / "float.onnx", dict(np.load(work / "calibration.npz"))
    found = [
        Contender("torch fp32", "torch", f"{model}/{component}"),
        Contender("torch bf16", "torch-bf16", f"{model}/{component}"),
        Contender(BASE, "onnxruntime", str(source)),
    ]
    prepared = work / "prepared.onnx"
    onnx_graph.prepare(source, prepared, patches=False, rows=False)
    makers: dict[str, Callable[[str], Any]] = {
        "onnxruntime.quantization static": lambda p: quantize_static(str(prepared), p, Reader(rows)),
        "onnxruntime.quantization dynamic": lambda p: quantize_dynamic(str(prepared), p),
    }
    if decoder:
        makers["ours int8 weights, onnxruntime"] = lambda p: quantize_weights(source, Path(p), bits=8)
        makers["ours int4 weights, onnxruntime"] = lambda p: quantize_weights(source, Path(p), bits=4)
    ranges = [] if decoder else collect_ranges(source, [rows])
    for name in DECODING if decoder else (*PLACEMENTS, *SCORES):
        makers[f"ours ({name}), onnxruntime"] = lambda p, name=name: arrange(name, source, Path(p), lambda: ranges)  # type: ignore[misc]
    for label, make in makers.items():
        path = work / f"{label.replace(' ', '-').replace('/', '-')}.onnx"
        try:
            make(str(path))
            found.append(Contender(label, "onnxruntime", str(path)))
        except (ValueError, RuntimeError, TypeError) as e:
            found.append(Contender(label, "onnxruntime", "", missing=f"cannot be made: {str(e).splitlines()[0][:80]}"))
    python = given.nncf_python or sys.executable
    if given.nncf_python is not None or importlib.util.find_spec("openvino") is not None:
        found.append(Contender("openvino fp32", "openvino", str(source), python))
        ours = [one for one in found if one.name in PORTABLE]
        found.extend(
            Contender(one.name.replace("onnxruntime", "openvino"), "openvino", one.path, python, one.missing) for one in ours
        )
    else:
        found.append(Contender("openvino fp32", "openvino", "", missing="openvino is not installed here"))
    found = [one for one in found if one.name not in [f"ours ({name}), onnxruntime" for name in SCORES]]
    for tool, at, runtime in (
        ("olive-static", given.olive_python, "onnxruntime"),
        ("olive-dynamic", given.olive_python, "onnxruntime"),
        ("nncf", given.nncf_python, "openvino"),
    ):
        found.append(other(tool, at, runtime, work))
    return found


def other(tool: str, python: str | None, runtime: str, work: Path) -> Contender:
    """A file by another tool, made and run in its own environment."""
    name = {"nncf": "NNCF transformer preset, openvino"}.get(tool, f"{tool.replace('-', ' default ').capitalize()}, onnxruntime")
    if python is None:
        return Contender(name, runtime, "", missing=f"--{tool.split('-')[0]}-python is not given")
    target = work / f"{tool}{'.xml' if runtime == 'openvino' else '.onnx'}"
    command = [python, str(HERE / "int8_others.py"), tool, str(work / "float.onnx"), str(work / "calibration.npz"), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=work)
    if done.returncode != 0 or not target.exists():
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no file"]
        return Contender(name, runtime, "", missing=f"failed: {last[0][:100]}")
    # Olive's file runs in our ONNX Runtime, so that only the file differs; NNCF's in its own OpenVINO.
    return Contender(name, runtime, str(target), python if runtime == "openvino" else sys.executable)


def race(entries: list[Contender], inputs: Path, given: argparse.Namespace) -> dict[str, list[float]]:
    """Medians of each contender's rounds; those that cannot be opened or run are marked."""
    processes: dict[str, subprocess.Popen[str]] = {}
    times: dict[str, list[float]] = {}
    try:
        for one in [e for e in entries if not e.missing]:
            command = [one.python, str(HERE / "int8_worker.py"), one.runtime, one.path, str(inputs), str(given.threads)]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=HERE
            )
            if not process.stdout.readline():  # type: ignore[union-attr]
                one.missing = f"cannot be opened by {one.runtime}"
                process.wait()
                continue
            processes[one.name] = process
        for number in range(given.rounds):
            order = list(processes.items())
            for name, process in order if number % 2 == 0 else reversed(order):
                process.stdin.write(f"{given.seconds} {LEAD_SECONDS}\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
                line = process.stdout.readline()  # type: ignore[union-attr]
                times.setdefault(name, []).append(statistics.median(json.loads(line)))
    finally:
        for process in processes.values():
            process.stdin.close()  # type: ignore[union-attr]
            process.wait()
    return times


def cosine(path: str, source: Path, rows: dict[str, np.ndarray]) -> float:
    """Mean over the calibration rows, of the first output; in ONNX Runtime."""
    found = []
    for one in (path, str(source)):
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(one, options, providers=["CPUExecutionProvider"])
        output = session.run(None, {i.name: rows[i.name] for i in session.get_inputs()})[0]
        found.append(output.reshape(-1, output.shape[-1]))
    return mean_cosine(found[0], found[1])


def measured(
    model: str, component: str, batch: int, entries: list[Contender], work: Path, given: argparse.Namespace, before: Rows
) -> Rows:
    """Races all contenders at one batch size; a row for each. ``before`` are rows of other batch sizes."""
    rows = dict(np.load(work / "calibration.npz"))
    same = [row for row in before if (row["model"], row["component"]) == (model, component)]
    cosines = {row["contender"]: row["cosine"] for row in same if "cosine" in row}
    times = race(entries, work / f"inputs-{batch}.npz", given)
    found = []
    for one in entries:
        row: dict[str, Any] = {"model": model, "component": component, "batch": str(batch), "contender": one.name}
        row["runtime"] = one.runtime
        if one.missing:
            found.append({**row, "note": one.missing})
            continue
        if one.path.endswith(".onnx"):
            row["megabytes"] = onnx_graph.file_bytes(Path(one.path)) / 1e6
            row["cosine"] = cosines.get(one.name) or cosine(one.path, work / "float.onnx", rows)
        values, base = times[one.name], times[BASE]
        against = ratio([[b] for b in base], [[v] for v in values])
        row |= {"ms": statistics.median(values), "fastest": min(values), "slowest": max(values), "rounds": len(values)}
        found.append(row | {"speed": against.ratio, "speed low": against.low, "speed high": against.high})
    return found


def printed(rows: Rows) -> None:
    """One table for each component, all batch sizes side by side, and what ours reaches."""
    for model, component in dict.fromkeys((row["model"], row["component"]) for row in rows):
        own = [row for row in rows if (row["model"], row["component"]) == (model, component)]
        lines: dict[str, dict[str, str]] = {}
        for row in own:
            line = lines.setdefault(row["contender"], {"contender": row["contender"]})
            batch = row["batch"]
            if "note" in row:
                line[f"batch {batch}, ms"] = row["note"]
                continue
            line[f"batch {batch}, ms"] = f"{row['ms']:.2f} ({row['fastest']:.2f} to {row['slowest']:.2f})"
            line[f"batch {batch}, speed"] = f"{row['speed']:.2f} ({row['speed low']:.2f} to {row['speed high']:.2f})"
            if "megabytes" in row:
                line |= {"MB": f"{row['megabytes']:.1f}", "cosine": f"{row['cosine']:.4f}"}
        print(f"\n{model}/{component}; speed is relative to {BASE}")
        print(tabulate(list(lines.values()), headers="keys"))
        for batch in dict.fromkeys(row["batch"] for row in own):
            for runtime in ("onnxruntime", "openvino"):
                for text in reached([r for r in own if r["batch"] == batch and r["runtime"] == runtime and "speed" in r]):
                    print(f"batch {batch}, {runtime}: {text}")


def reached(rows: Rows) -> list[str]:
    """What the fastest of ours is beside the fastest of the others and beside its aim; of one runtime and batch size."""
    ours = max((r for r in rows if r["contender"].startswith("ours")), key=lambda r: r["speed"], default=None)
    others = [r for r in rows if not r["contender"].startswith("ours") and not r["contender"].endswith("fp32")]
    rival = max(others, key=lambda r: r["speed"], default=None)
    if ours is None:
        return []
    found = []
    if rival is not None:
        by = 100 * (ours["speed"] / rival["speed"] - 1)
        found.append(f"{ours['contender']} is {abs(by):.1f}% {'faster' if by >= 0 else 'slower'} than {rival['contender']}")
    aim = AIMS.get((ours["model"], ours["component"], ours["batch"], ours["runtime"]))
    if aim is not None:
        short = aim - ours["speed"]
        words = "reached" if short <= 0 else f"short by {short:.2f}"
        found.append(f"{ours['contender']} is {ours['speed']:.2f} times as fast as {BASE}; the aim of {aim} is {words}")
    return found


def save_inputs(family: Family, module: PreTrainedModel, name: str, path: Path, batch: int) -> None:
    """The inputs of one component: of a decoder those of one step with its cache."""
    call = [c for c in family.calls(module, batch) if c.component == name][-1]
    np.savez(path, **{k: v.numpy() for k, v in call.inputs.items()})


def components(model: str) -> list[str]:
    """A model's components, without its weights."""
    cls, config, sizes = SUBJECTS[model]
    shape = config(**sizes, architectures=[cls.__name__])
    family = family_of(shape, model)
    return list(family.components(without_weights(family, shape)))


def made(model: str, name: str, work: Path, given: argparse.Namespace) -> list[Contender]:
    """All contenders' files in a folder, and the inputs of each batch size; those of an earlier call where they are kept."""
    noted = work / "contenders.json"
    needed = {work / f"inputs-{batch}.npz": batch for batch in given.batches}
    missing = {path: batch for path, batch in needed.items() if not path.exists()}
    if missing or not noted.exists():
        work.mkdir(parents=True, exist_ok=True)
        family, module = subject(model)
        for path, batch in missing.items():
            save_inputs(family, module, name, path, batch)
        if not noted.exists():
            part = family.components(module)[name]
            export_component(part, family.example_inputs(module.config, part, 2), work / "float.onnx")
            save_inputs(family, module, name, work / "calibration.npz", CALIBRATION.get(model, 16))
            noted.write_text(json.dumps([asdict(one) for one in contenders(name, model, part.decoder, work, given)]))
    return [Contender(**one) for one in json.loads(noted.read_text())]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(SUBJECTS), help="models, or model/component")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.25, help="of one turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--olive-python", help="python of an environment with olive-ai")
    parser.add_argument("--nncf-python", help="python of an environment with nncf and openvino")
    parser.add_argument("--keep", type=Path, help="folder for all files; a second call with it makes none anew")
    parser.add_argument("--make-only", action="store_true", help="with --keep: make the files, measure nothing")
    parser.add_argument("--without", nargs="*", default=[], help="contenders that are left out")
    parser.add_argument("--print", action="store_true", help="print what --out holds, measure nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "int8.json")
    given = parser.parse_args()
    silence_libraries()
    rows: Rows = json.loads(given.out.read_text())["rows"] if given.out.exists() and (given.keep or given.print) else []
    if given.print:
        printed(rows)
        return
    for model in dict.fromkeys(name.split("/")[0] for name in given.only):
        wanted = [name for name in components(model) if model in given.only or f"{model}/{name}" in given.only]
        for name in wanted:
            with tempfile.TemporaryDirectory() as scratch:
                work = given.keep / model / name if given.keep else Path(scratch)
                entries = made(model, name, work, given)
                for batch in [] if given.make_only else given.batches:
                    if any((r["model"], r["component"], r["batch"]) == (model, name, str(batch)) for r in rows):
                        continue
                    racing = [replace(one) for one in entries if one.name not in given.without]
                    rows += measured(model, name, batch, racing, work, given, rows)
                    given.out.parent.mkdir(parents=True, exist_ok=True)
                    found = {"threads": given.threads, "rows": rows, "environment": environment()}
                    given.out.write_text(json.dumps(found, indent=1) + "\n")
    printed([row for row in rows if row["model"] in {name.split("/")[0] for name in given.only}])


if __name__ == "__main__":
    main()
