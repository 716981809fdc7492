"""What this machine can do, what is missing, and what will not work together: for ``mmcompress doctor``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from mmcompress.environment import environment, int8_saturates
from mmcompress.runtimes.openvino_predict import HINT as OPENVINO_HINT
from mmcompress.runtimes.openvino_predict import is_installed as openvino_installed
from mmcompress.training.stored import usage


def diagnose() -> dict[str, Any]:
    """The environment, ``problems`` (something will fail) and ``hints`` (something could be better)."""
    found = environment()
    problems: list[str] = []
    for text in importlib.metadata.requires("mmcompress") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is not installed; {requirement} is needed")
            continue
        if not requirement.specifier.contains(Version(version), prereleases=True):
            problems.append(f"{requirement.name} {version} is installed; {requirement} is needed")
    folder, size = usage()
    found |= {"teacher_cache": {"folder": str(folder), "bytes": size}}
    return {**found, "devices": _devices(), "problems": problems, "hints": _hints(found["cpu_features"])}


def _devices() -> list[str]:
    found = ["cpu"]
    if torch.cuda.is_available():
        found.append(f"cuda ({torch.cuda.get_device_name(0)})")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def _hints(features: list[str]) -> list[str]:
    hints = []
    if int8_saturates(features):
        hints.append(
            "this CPU has no VNNI: int8 saves disk and memory here, but is not faster than float32, and needs weights of 7 bits "
            "(reduce_range)"
        )
    if features and not {"AVX512-BF16", "AMX-BF16"} & set(features):
        hints.append("this CPU has no bf16 products: training passes use float32")
    if importlib.util.find_spec("torchvision") is None:
        hints.append("torchvision is not installed: transformers uses its PIL image processors")
    if not openvino_installed():
        hints.append(f"{OPENVINO_HINT}: reports can then have its latency beside ONNX Runtime's (report.runtimes)")
    if importlib.util.find_spec("webdataset") is None:
        hints.append("webdataset is not installed: datasets reads .tar files by its own builder")
    if (os.cpu_count() or 1) < 2:
        hints.append("one core only: latency is measured with more threads than cores unless report.threads is 1")
    return hints


def render_diagnosis(found: dict[str, Any]) -> str:
    """The same as text."""
    lines = [
        f"python {found['python']} on {found['platform']}",
        f"{found['cpu']}, {found['cores']} cores, {found['memory_bytes'] / 2**30:.0f} GiB",
        f"features: {', '.join(found['cpu_features']) or 'not known on this system'}",
        f"devices: {', '.join(found['devices'])}",
        f"teachers' embeddings: {found['teacher_cache']['bytes'] / 1e6:,.1f} MB in {found['teacher_cache']['folder']}",
        "",
        *(f"{name} {version}" for name, version in found["versions"].items()),
        "",
    ]
    lines += [f"hint: {text}" for text in found["hints"]]
    lines += [f"problem: {text}" for text in found["problems"]] or ["no problems found"]
    return "\n".join(lines)
