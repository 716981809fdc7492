"""Weights rounded by Intel Neural Compressor in the torch module, written into our ONNX files: an optional backend.

Needs the extra ``neural-compressor``. Its algorithms change modules in place and leave layers of its own, which no stock class
loads; so it is given a copy, and the digits of those layers are read out. Which of them work depends on the versions of torch,
transformers and Neural Compressor and on packages that may be missing (IPEX, HPU, AutoRound): `probe` tries one on a small model.

Shapes: K inputs, N outputs of a layer; J blocks.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mmcompress.files import write_json
from mmcompress.quantization.blocks import Bits, Grid, fitting
from mmcompress.training.stored import cache_folder

if TYPE_CHECKING:
    from neural_compressor.torch.quantization.config import TorchBaseConfig

STATIC = "static"
"""What a probe is asked for static int8; see `neural_static`."""
ALGORITHMS = ("rtn", "gptq", "awq", "autoround", "autotune")
EXTRA = "mmcompress[neural-compressor]"
PACKAGES = ("neural-compressor", "torch", "transformers", "torchao", "auto-round", "intel-extension-for-pytorch")
"""What a probe's answer holds for: these versions."""
PROBE_SECONDS = 300
WORKS = "works"
TOLERANCE = 1e-3
"""Of outputs: how far our digits may be, in norm, from the module that Neural Compressor leaves."""
FAILURES = (
    RuntimeError, ValueError, TypeError, AttributeError, LookupError, ImportError, AssertionError, NameError, OSError,
)  # fmt: skip
"""What goes wrong inside of Neural Compressor has no type of its own."""

Rounded = dict[str, tuple[NDArray[np.uint8], Grid]]


class BackendError(RuntimeError):
    """Neural Compressor is not installed, or could not do what it was asked for."""


def round_weights(
    module: nn.Module, batches: Sequence[tuple[Tensor, ...]], bits: Bits, block_size: int, algorithm: str, least: float = 0.995
) -> Rounded:
    """The digits (K, N) and grids of the Linear layers that Neural Compressor quantizes, by their paths in the module.

    Args:
        module: in evaluation mode; stays as it is. Called with the tensors of a batch in their order, and returns a tuple.
        batches: calibration data.
        block_size: as `weight_only.quantize_weights`.
        algorithm: one of `ALGORITHMS`.
        least: for ``autotune`` the mean cosine of outputs at which it takes what it has tried.

    Raises:
        BackendError: it is not installed, the algorithm fails, or what it gives is no rounding of the weights.
    """
    try:
        from neural_compressor.torch import quantization
    except ImportError as e:
        raise BackendError(f"neural-compressor cannot be imported ({e}): pip install '{EXTRA}'") from e
    linears = {name: part for name, part in module.named_modules() if type(part) is nn.Linear}
    logging.disable(logging.WARNING)  # it logs several lines a layer
    try:
        with TemporaryDirectory(prefix="mmcompress-") as scratch, torch.no_grad():
            given = copy.deepcopy(module)
            for name in linears:  # it overwrites weights in place, those of tied embedding tables, too
                part = given.get_submodule(name)
                part.weight = nn.Parameter(linears[name].weight.clone())

            def calibrate(prepared: nn.Module) -> None:
                for batch in batches:
                    prepared(*batch)

            def config(name: str, size: int | None = None) -> TorchBaseConfig:
                return _config(quantization, name, bits, block_size if size is None else size, scratch)

            if algorithm == "autotune":
                found = _autotune(quantization, given, module, batches, config, calibrate, least)
            else:
                settings = config(algorithm)
                for name, part in linears.items():
                    if (size := fitting(part.in_features, block_size, bits)) != block_size:
                        settings.set_local(name, config(algorithm, size))
                found = quantization.prepare(given, settings, example_inputs=batches[0])
                calibrate(found)
                found = quantization.convert(found)
            wanted = found(*batches[0])[0]
    except FAILURES as e:
        said = str(e).strip().splitlines() or [type(e).__name__]
        raise BackendError(f"neural-compressor's {algorithm} fails: {type(e).__name__}: {said[0][:300]}") from e
    finally:
        logging.disable(logging.NOTSET)
    rounded = _digits(found, linears, bits, algorithm)
    if (off := _distance(module, rounded, batches[0], wanted)) > TOLERANCE:
        raise BackendError(
            f"neural-compressor's {algorithm} gives weights that our files cannot hold: outputs differ by {off:.3f}"
        )
    return rounded


def _distance(module: nn.Module, rounded: Rounded, batch: tuple[Tensor, ...], wanted: Tensor) -> float:
    """How far the module with our digits is from outputs that Neural Compressor's own module gives, in norm."""
    ours = copy.deepcopy(module)
    for name, (digits, grid) in rounded.items():
        part = ours.get_submodule(name)
        part.weight = nn.Parameter(torch.from_numpy(np.ascontiguousarray(grid.values(digits).T)))
    with torch.no_grad():
        return float((ours(*batch)[0] - wanted).norm() / wanted.norm())


def _config(quantization: Any, name: str, bits: int, block_size: int, folder: str) -> TorchBaseConfig:
    # Without a folder GPTQ looks for the model on the hub; with one, it never opens it. RTN would.
    makers: dict[str, tuple[str, dict[str, Any]]] = {
        "rtn": ("RTNConfig", {}),
        "gptq": ("GPTQConfig", {"model_path": folder}),
        "awq": ("AWQConfig", {}),
        "autoround": ("AutoRoundConfig", {"output_dir": folder}),
    }
    kind, extra = makers[name]
    # At 8 bits with zero points of its own its layers overflow an int8 in between.
    found: TorchBaseConfig = getattr(quantization, kind)(bits=bits, group_size=block_size, use_sym=bits == 8, **extra)
    return found


def _autotune(
    quantization: Any,
    given: nn.Module,
    module: nn.Module,
    batches: Sequence[tuple[Tensor, ...]],
    config: Callable[[str], TorchBaseConfig],
    calibrate: Callable[[nn.Module], None],
    least: float,
) -> nn.Module:
    """Its own search: rounding to the nearest, then GPTQ, until the outputs are like enough; else the best of them."""
    from neural_compressor.common.base_tuning import TuningConfig

    wanted = [module(*batch)[0] for batch in batches]

    def likeness(tried: nn.Module) -> float:
        rows = [nn.functional.cosine_similarity(tried(*b)[0], w, dim=-1).flatten() for b, w in zip(batches, wanted, strict=True)]
        return float(torch.cat(rows).mean())

    tuning = TuningConfig(config_set=[config("rtn"), config("gptq")], tolerable_loss=1 - least, max_trials=2)
    found: nn.Module = quantization.autotune(given, tuning, likeness, run_fn=calibrate)
    return found


def _digits(found: Any, linears: Mapping[str, nn.Linear], bits: Bits, algorithm: str) -> Rounded:
    """Reads the layers out that Neural Compressor left."""
    rounded: Rounded = {}
    for name, part in found.named_modules():
        if name not in linears or type(part).__name__ != "INCWeightOnlyLinear":
            continue
        parts = part.unpack()
        weight, scales, zeros = (parts.get(key) for key in ("int_weight", "scales", "zp"))
        size = part.group_size if part.group_size > 0 else part.in_features
        order = parts.get("g_idx")
        if zeros is None or (order is not None and not torch.equal(order.cpu(), torch.arange(part.in_features) // size)):
            raise BackendError(f"neural-compressor's {algorithm} leaves {name} in a form that MatMulNBits cannot hold")
        grid = Grid(bits, size, _array(scales).T, _array(zeros).T)
        digits = (weight.cpu().numpy().astype(np.int64).T & (2**bits - 1)).astype(np.uint8)
        rounded[name] = digits, grid
    if not rounded:
        raise BackendError(f"neural-compressor's {algorithm} quantizes no layer")
    return rounded


def _array(values: Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = values.detach().float().cpu().numpy()
    return found


class Block(nn.Module):
    """Of a transformer without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, 64) to the same."""
        found: Tensor = x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))
        return found


class Toy(nn.Module):
    """Two blocks in a ModuleList, which is where the algorithms look for them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(32, 64)
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """(B, S, 32) to (B, S, 64)."""
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return (x,)


def probe(algorithm: str) -> str | None:
    """What is wrong with an algorithm on this machine: one sentence, or None where it works.

    It is tried on a small model in a process of its own, once for each set of versions; the answer is kept in the cache folder.
    """
    versions = {name: _version(name) for name in PACKAGES}
    if versions["neural-compressor"] is None:
        return f"neural-compressor is not installed: pip install '{EXTRA}'"
    own = Path(__file__).read_bytes() + Path(__file__).with_name("neural_static.py").read_bytes()
    key = hashlib.sha256(json.dumps([algorithm, versions]).encode() + own).hexdigest()[:16]
    kept = cache_folder().parent / "probes" / f"neural-compressor-{algorithm}-{key}.json"
    if kept.exists():
        found: str | None = json.loads(kept.read_text())["wrong"]
        return found
    words = [sys.executable, "-m", "mmcompress.quantization.neural_compressor", algorithm]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False, env=_environment())
        last = (done.stdout.strip().splitlines() or [""])[-1]
        wrong = None if last == WORKS else last or (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
    except subprocess.TimeoutExpired:
        wrong = f"neural-compressor's {algorithm} was not done with two layers of 64 after {PROBE_SECONDS} seconds"
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, {"wrong": wrong, "versions": versions})
    return wrong


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


def main(algorithm: str) -> None:
    """Tries an algorithm and says in the last line whether it works."""
    data = [(torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(i)),) for i in range(2)]
    try:
        if algorithm == STATIC:
            from mmcompress.quantization.neural_static import static_layers

            static_layers(Toy().eval(), data, [{0: "batch"}])
        else:
            round_weights(Toy().eval(), data, 4, 32, algorithm)
    except BackendError as e:
        sys.stdout.write(f"{e}\n")
    else:
        sys.stdout.write(f"{WORKS}\n")


if __name__ == "__main__":
    main(sys.argv[1])
