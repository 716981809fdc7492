"""Exports that tests make again and again, made once: exporting a tiny model takes seconds, and most tests are about the rest.

The wrapped function is `export_component` itself; what it wrote is kept by all that it could depend on, for all processes of one
test session. A component that differs from one before in the numbers of its weights alone gets that one's graph with its own
weights, if the answers are then the module's. Models with fake quantization, whose layers hold more than weights, are exported
every time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import torch
from onnx import numpy_helper
from torch import nn

Export = Callable[..., None]
PLAIN = (bool, int, float, str, tuple, type(None))
DATA = "_data"
WEIGHTS = "weights.json"


def folder() -> Path:
    """One for all processes of a session."""
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    found = Path(tempfile.gettempdir()) / f"mmcompress-tests-exports-{session}"
    found.mkdir(exist_ok=True)
    return found


def remembered(export: Export, save: Callable[[onnx_ir.Model, Path, bool], None]) -> Export:
    """The same function, which copies what it wrote before; ``save`` is what it writes with."""

    @wraps(export)
    def once(component: Any, example_inputs: Mapping[str, torch.Tensor], path: Path, **settings: Any) -> None:
        name = key(component, example_inputs, settings)
        if name is None:
            export(component, example_inputs, path, **settings)
            return
        kept = folder() / f"{name}-{path.name}"  # the graph holds the name of the file of its weights
        if kept.is_dir():
            for part in kept.glob(f"{path.name}*"):
                shutil.copyfile(part, path.with_name(part.name))
            return
        structure = folder() / f"{key(component, example_inputs, settings, weights=False)}-{path.name}"
        own = weights_of(component.module)
        if structure.is_dir() and not path.exists():
            filled = with_weights(structure / path.name, own)
            save(onnx_ir.from_proto(filled), path, settings.get("beside", False))
            if answers_alike(component, example_inputs, path):
                keep(path, kept)
                return
            for part in written(path):
                part.unlink()
        export(component, example_inputs, path, **settings)
        keep(path, kept)
        shutil.rmtree(structure, ignore_errors=True)
        keep(path, structure, places(path, own))

    return once


def written(path: Path) -> list[Path]:
    """What an export left."""
    return [part for part in (path, path.with_name(f"{path.name}{DATA}")) if part.exists()]


def keep(path: Path, kept: Path, weights: Mapping[str, tuple[str, bool]] | None = None) -> None:
    """Copies what an export left, perhaps with a note of which weights lie where."""
    scratch = Path(tempfile.mkdtemp(dir=folder()))
    for part in written(path):
        shutil.copyfile(part, scratch / part.name)
    if weights is not None:
        (scratch / WEIGHTS).write_text(json.dumps(weights))
    with suppress(OSError):  # another process has just made the same
        scratch.rename(kept)


def key(
    component: Any, example_inputs: Mapping[str, torch.Tensor], settings: Mapping[str, Any], weights: bool = True
) -> str | None:
    """A hash of all that an export could depend on, or of all but the weights; None where that is more than can be hashed."""
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
    own = weights_of(module)
    tensors = {**own, **dict(module.named_buffers(remove_duplicate=False))}
    for name, values in [*tensors.items(), *example_inputs.items()]:
        said.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        if weights or name not in own:
            said.update(values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    shared = {name: id(values) for name, values in tensors.items()}
    firsts: dict[int, str] = {}
    said.update(repr([firsts.setdefault(place, name) for name, place in shared.items()]).encode())  # what is tied
    return said.hexdigest()


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Its parameters by name; tied ones have several."""
    return dict(module.named_parameters(remove_duplicate=False))


def places(path: Path, own: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, bool]]:
    """For constants of a file the parameters that they are, and whether transposed. The others are taken for the structure's."""
    arrays = {name: values.detach().cpu().numpy() for name, values in own.items()}
    found = {}
    for tensor in onnx.load(path).graph.initializer:
        values = numpy_helper.to_array(tensor)
        names = [tensor.name] if tensor.name in arrays else [name for name, one in arrays.items() if one.size == values.size > 1]
        for name in names:
            if np.array_equal(arrays[name].ravel(), values.ravel()):
                found[tensor.name] = (name, False)
                break
            if values.ndim == 2 and np.array_equal(arrays[name].T, values):
                found[tensor.name] = (name, True)
                break
    return found


def with_weights(path: Path, own: Mapping[str, torch.Tensor]) -> onnx.ModelProto:
    """A kept graph with other weights."""
    model, known = onnx.load(path), json.loads((path.parent / WEIGHTS).read_text())
    for tensor in model.graph.initializer:
        if tensor.name in known:
            name, turned = known[tensor.name]
            values = own[name].detach().cpu().numpy()
            values = np.ascontiguousarray(values.T if turned else values).reshape(tensor.dims)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return model


def answers_alike(component: Any, example_inputs: Mapping[str, torch.Tensor], path: Path) -> bool:
    """Whether a file answers as its module does, on the example: of weights in a wrong place it would not."""
    module: nn.Module = component.module
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    with torch.no_grad():
        wanted = module(*(example_inputs[name] for name in component.inputs))
    for part, mode in modes:
        part.training = mode
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {one.name: example_inputs[one.name].numpy() for one in session.get_inputs()}
    found = session.run(list(component.outputs), given)
    pairs = [(one, other.numpy()) for one, other in zip(found, wanted, strict=True)]
    return all(
        one.shape == other.shape and np.allclose(one, other, rtol=0, atol=2e-5 * max(1.0, np.abs(other).max()))
        for one, other in pairs
    )
