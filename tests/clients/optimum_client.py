"""Opens one exported folder with Optimum's ONNX Runtime classes, and prints what they give as JSON.

    PYTHON_WITH_OPTIMUM tests/clients/optimum_client.py < job.json

Runs in an environment of its own: Optimum's ONNX Runtime classes want transformers 4, mmcompress wants 5, so nothing of
mmcompress is imported here. A job holds `folder`, `does` (a key of `ACTIONS`), `cls` (the ORTModel class) and what that one
reads;
arrays come and go as `{"dims": [...], "type": "float32", "data": [...]}`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import optimum.onnxruntime
import torch


def tensors(job: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The job's inputs."""
    return {
        name: torch.from_numpy(np.asarray(one["data"], dtype=one["type"]).reshape(one["dims"]))
        for name, one in job["inputs"].items()
    }


def plain(value: torch.Tensor) -> dict[str, Any]:
    """A tensor as JSON."""
    return {"dims": list(value.shape), "type": str(value.dtype).removeprefix("torch."), "data": value.flatten().tolist()}


def opened(job: Mapping[str, Any]) -> Any:
    """The model; ``files`` names files where the folder holds several that fit."""
    cls = getattr(optimum.onnxruntime, job["cls"])
    return cls.from_pretrained(job["folder"], local_files_only=True, **job.get("files", {}))


def forward(job: Mapping[str, Any]) -> Any:
    """One call of the model: its outputs by name."""
    found = opened(job)(**tensors(job))
    return {name: plain(value) for name, value in found.items() if isinstance(value, torch.Tensor)}


def generate(job: Mapping[str, Any]) -> Any:
    """Greedy tokens."""
    model = opened(job)
    return {"tokens": plain(model.generate(**tensors(job), **job["settings"])), "cache": bool(model.use_cache)}


def tokenize(job: Mapping[str, Any]) -> Any:
    """What the folder's own tokenizer makes of texts under transformers 4."""
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(job["folder"], local_files_only=True)(job["texts"], padding=True, return_tensors="pt")
    return {name: plain(value) for name, value in found.items()}


ACTIONS = {"forward": forward, "generate": generate, "tokenize": tokenize}

if __name__ == "__main__":
    given = json.loads(sys.stdin.read())
    answer = ACTIONS[given["does"]](given)
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
