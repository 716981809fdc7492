"""Speed of int8, side by side: torch, ONNX Runtime's defaults, Olive, NNCF and ours, each contender in a process of its own.

    python benchmarks/int8.py [--only clip-vit-b-32] [--olive-python P] [--nncf-python P] [--rounds 8] [--out results.json]

The models have random weights: speed and size mean something, quality is the cosine to the float file alone. Contenders take
turns, round by round; the table has medians over the rounds with their range, and the speed relative to ONNX Runtime in
float32. Contenders whose environment is not given, or that fail, are left out with a word.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
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
from mmcompress.families.base import Family
from mmcompress.logs import silence_libraries
from mmcompress.passes._placement import Settings, mean_cosine, search
from mmcompress.quantization import onnx_graph
from mmcompress.quantization.arrangements import arrange
from mmcompress.quantization.onnx_export import export_component
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
CALIBRATION = 16
BASE = "onnxruntime fp32"


def subject(name: str) -> tuple[Family, PreTrainedModel]:
    """A model of a published size with random weights."""
    cls, config, sizes = SUBJECTS[name]
    torch.manual_seed(0)
    module = cls(config(**sizes)).eval()
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
        self.items = iter([{k: v[i : i + 1] for k, v in rows.items()} for i in range(CALIBRATION)])

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
    onnx_graph.prepare(source, prepared, patches=False)
    makers: dict[str, Any] = {
        "onnxruntime.quantization static": lambda p: quantize_static(str(prepared), p, Reader(rows)),
        "onnxruntime.quantization dynamic": lambda p: quantize_dynamic(str(prepared), p),
    }
    placed = None
    if decoder:
        makers["ours int8 weights, onnxruntime"] = lambda p: quantize_weights(source, Path(p), bits=8)
        makers["ours int4 weights, onnxruntime"] = lambda p: quantize_weights(source, Path(p), bits=4)
    else:
        inputs = dict(np.load(work / "inputs-1.npz"))
        placed = search(
            "int8-static", source, work / "ours-chosen.onnx", lambda: [rows], inputs, Settings((), (), False, 0.0, given.threads)
        )
        chosen = placed.choice.chosen or "static"
        print(f"  placement: {chosen}, {placed.seconds:.0f} s")
        for one in placed.choice.candidates:
            print(f"    {one.name}: {f'{one.ms:.2f} ms' if one.ms else '-'}, cosine {one.cosine}, {one.why}")
        makers[f"ours ({chosen}), onnxruntime"] = lambda p: arrange(chosen, source, Path(p), lambda: [rows])  # type: ignore[arg-type]
        makers["ours (static), onnxruntime"] = lambda p: arrange("static", source, Path(p), lambda: [rows])
    for name, make in makers.items():
        path = work / f"{name.replace(' ', '-').replace('/', '-')}.onnx"
        try:
            make(str(path))
            found.append(Contender(name, "onnxruntime", str(path)))
        except (ValueError, RuntimeError, TypeError) as e:
            found.append(Contender(name, "onnxruntime", "", missing=f"cannot be made: {str(e).splitlines()[0][:80]}"))
    if importlib.util.find_spec("openvino") is not None:
        found.append(Contender("openvino fp32", "openvino", str(source)))
        if not decoder:
            static = work / "ours-(static),-onnxruntime.onnx"
            found.append(Contender("ours (static), openvino", "openvino", str(static)))
    else:
        found.append(Contender("openvino fp32", "openvino", "", missing="openvino is not installed here"))
    for tool, python, runtime in (
        ("olive-static", given.olive_python, "onnxruntime"),
        ("olive-dynamic", given.olive_python, "onnxruntime"),
        ("nncf", given.nncf_python, "openvino"),
    ):
        found.append(other(tool, python, runtime, work))
    return found


def other(tool: str, python: str | None, runtime: str, work: Path) -> Contender:
    """A file by another tool, made and run in its own environment."""
    name = {"nncf": "NNCF transformer preset, openvino"}.get(tool, f"{tool.replace('-', ' default ')}, onnxruntime")
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
    """Medians of each contender's rounds; those that cannot be opened are marked."""
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
        for _ in range(given.rounds):
            for name, process in processes.items():
                process.stdin.write(f"{given.seconds}\n")  # type: ignore[union-attr]
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


def table(model: str, component: str, entries: list[Contender], work: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Races all contenders at each batch size."""
    rows = dict(np.load(work / "calibration.npz"))
    by_batch = {b: race(entries, work / f"inputs-{b}.npz", given) for b in given.batches}
    found = []
    for one in entries:
        row: dict[str, Any] = {"model": model, "component": component, "contender": one.name}
        if one.missing:
            found.append({**row, "note": one.missing})
            continue
        if one.path.endswith(".onnx"):
            row |= {
                "megabytes": onnx_graph.file_bytes(Path(one.path)) / 1e6,
                "cosine": cosine(one.path, work / "float.onnx", rows),
            }
        for batch, times in by_batch.items():
            values, base = times[one.name], times[BASE]
            row |= {
                f"batch {batch} ms": statistics.median(values),
                f"batch {batch} range": f"{min(values):.2f} to {max(values):.2f}",
                f"batch {batch} speed": statistics.median(b / v for b, v in zip(base, values, strict=True)),
            }
        found.append(row)
    return found


def prepare(family: Family, module: PreTrainedModel, name: str, work: Path, batches: list[int]) -> None:
    """The float file and the inputs of one component: of a decoder those of one step with its cache."""
    part = family.components(module)[name]
    export_component(part, family.example_inputs(module.config, part, 2), work / "float.onnx")
    for batch in batches:
        call = [c for c in family.calls(module, batch) if c.component == name][-1]
        np.savez(work / f"inputs-{batch}.npz", **{k: v.numpy() for k, v in call.inputs.items()})
    call = [c for c in family.calls(module, CALIBRATION) if c.component == name][-1]
    np.savez(work / "calibration.npz", **{k: v.numpy() for k, v in call.inputs.items()})


def made(
    family: Family, module: PreTrainedModel, name: str, model: str, decoder: bool, work: Path, given: argparse.Namespace
) -> list[Contender]:
    """All contenders' files in a folder; those of an earlier call where they are kept."""
    noted = work / "contenders.json"
    if noted.exists():
        return [Contender(**one) for one in json.loads(noted.read_text())]
    work.mkdir(parents=True, exist_ok=True)
    prepare(family, module, name, work, given.batches)
    entries = contenders(name, model, decoder, work, given)
    noted.write_text(json.dumps([asdict(one) for one in entries]))
    return entries


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
    parser.add_argument("--keep", type=Path, help="folder for all files; a second call with it only measures")
    parser.add_argument("--make-only", action="store_true", help="with --keep: make the files, measure nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "int8.json")
    given = parser.parse_args()
    silence_libraries()
    rows: list[dict[str, Any]] = []
    for model in dict.fromkeys(name.split("/")[0] for name in given.only):
        family, module = subject(model)
        for name, part in family.components(module).items():
            if model not in given.only and f"{model}/{name}" not in given.only:
                continue
            print(f"{model}/{name}")
            with tempfile.TemporaryDirectory() as scratch:
                work = given.keep / model / name if given.keep else Path(scratch)
                entries = made(family, module, name, model, part.decoder, work, given)
                if not given.make_only:
                    rows += table(model, name, entries, work, given)
            print(tabulate([r for r in rows if r["component"] == name and r["model"] == model], headers="keys", floatfmt=".3f"))
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(
                json.dumps({"threads": given.threads, "rows": rows, "environment": environment()}, indent=1) + "\n"
            )


if __name__ == "__main__":
    main()
