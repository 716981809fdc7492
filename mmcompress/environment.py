"""What this machine is and what is installed on it: for reports and for ``mmcompress doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import psutil

PACKAGES = (
    "mmcompress",
    "torch",
    "transformers",
    "torch-pruning",
    "datasets",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "pydantic",
    "numpy",
)
FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX512-VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512_bf16": "AVX512-BF16",
    "amx_int8": "AMX-INT8",
    "amx_bf16": "AMX-BF16",
}


def versions() -> dict[str, str]:
    """Installed versions of what results depend on; ``missing`` where a package is not there."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def cpu_features() -> list[str]:
    """The instruction sets that decide the speed of int8 and bf16, as Linux names them; empty where that is not known."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return []
    flags = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "")
    words = set(flags.partition(":")[2].split())
    return [shown for flag, shown in FEATURES.items() if flag in words]


def int8_saturates(features: list[str] | None = None) -> bool:
    """Whether this processor adds products of uint8 and int8 in pairs in 16 bits, where two large ones are cut off.

    x86 without VNNI does (vpmaddubsw, which ONNX Runtime's kernels use there); weights of 7 bits never reach the limit. False
    where the features are not known.
    """
    found = cpu_features() if features is None else features
    return bool(found) and not {"AVX512-VNNI", "AVX-VNNI", "AMX-INT8"} & set(found)


def cpu_name() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def affinity() -> list[int]:
    """The cores that this process, and those that it starts, may use; empty where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def environment() -> dict[str, Any]:
    """Versions, processor, cores, those that may be used, and memory."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_features": cpu_features(),
        "cores": os.cpu_count(),
        "affinity": affinity(),
        "memory_bytes": psutil.virtual_memory().total,
        "versions": versions(),
    }
