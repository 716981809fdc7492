"""Exports that tests make again and again, made once: exporting a tiny model takes seconds, and most tests are about the rest.

The wrapped function is `export_component` itself; what it wrote is kept by all that it could depend on, for all processes of one
test session. Models with fake quantization, whose layers hold more than weights, are exported every time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn

Export = Callable[..., None]
PLAIN = (bool, int, float, str, tuple, type(None))


def folder() -> Path:
    """One for all processes of a session."""
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    found = Path(tempfile.gettempdir()) / f"mmcompress-tests-exports-{session}"
    found.mkdir(exist_ok=True)
    return found


def remembered(export: Export) -> Export:
    """The same function, which copies what it wrote before."""

    @wraps(export)
    def once(component: Any, example_inputs: Mapping[str, torch.Tensor], path: Path, **settings: Any) -> None:
        name = key(component, example_inputs, settings)
        if name is None:
            export(component, example_inputs, path, **settings)
            return
        kept = folder() / f"{name}-{path.name}"  # the graph holds the name of the file of its weights
        if kept.is_dir():
            for part in kept.iterdir():
                shutil.copyfile(part, path.with_name(part.name))
            return
        export(component, example_inputs, path, **settings)
        scratch = Path(tempfile.mkdtemp(dir=folder()))
        for part in (path, path.with_name(f"{path.name}_data")):
            if part.exists():
                shutil.copyfile(part, scratch / part.name)
        with suppress(OSError):  # another process has just made the same
            scratch.rename(kept)

    return once


def key(component: Any, example_inputs: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> str | None:
    """A hash of all that an export could depend on; None where that is more than can be hashed."""
    module: nn.Module = component.module
    parts = list(module.modules())
    if any(type(part).__module__.startswith("mmcompress.quantization") for part in parts):
        return None
    if not any(hasattr(part, "config") for part in parts):
        return None  # a module of a test's own
    said = hashlib.sha256(repr((component.name, component.inputs, component.outputs, component.dynamic_axes, settings)).encode())
    said.update(repr(module).encode())
    for part in parts:
        plain = {name: value for name, value in vars(part).items() if isinstance(value, PLAIN) and name != "training"}
        said.update(repr((type(part), sorted(plain.items(), key=lambda item: item[0]))).encode())
        config = getattr(part, "config", None)
        if config is not None:
            said.update(config.to_json_string(use_diff=False).encode())
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}
    for name, values in [*tensors.items(), *example_inputs.items()]:
        said.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        said.update(values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    places = {name: id(values) for name, values in tensors.items()}
    firsts: dict[int, str] = {}
    said.update(repr([firsts.setdefault(place, name) for name, place in places.items()]).encode())  # what is tied
    return said.hexdigest()
