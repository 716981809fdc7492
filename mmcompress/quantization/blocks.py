"""Weights as integers in blocks: rounding them to a grid, and writing them as ONNX Runtime's MatMulNBits reads them.

A weight is (digit - zero point) * scale, with one scale and one zero point for each block and output. At 8 bits our own are all
128, which MatMulNBits takes where it is given none.

Shapes: K inputs, N outputs of a layer; J = ceil(K / block size) blocks, which run along K.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Floats = NDArray[np.floating[Any]]
Bits = Literal[4, 8]

SMALLEST = 32
"""Inputs in a block, at least: more scales than that are no small part of 4 bits."""
SHRINKS = tuple(1 - i / 20 for i in range(11))
"""The shares of a block's range that are tried, 1 to 0.5."""
AT_ONCE = 2**18
"""Numbers of a weight that are rounded together."""
DEFAULT_SIZES: Mapping[int, int] = {4: 64, 8: 256}
"""Block size by bits: with blocks of 32 a CLIP at 4 bits is a tenth larger, and 8 bits are exact enough for fewer still."""
INT8_ACTIVATIONS = 4
"""MatMulNBits' accuracy_level that lets its kernels round activations to int8, block by block and at run time, which is several
times as fast as float products on x86 with VNNI. Blocks are small, so that it costs next to no accuracy."""


@dataclass(frozen=True)
class Grid:
    """The numbers that digits stand for.

    Attributes:
        scales: (J, N).
        zeros: zero points, whole numbers, (J, N).
    """

    bits: Bits
    block_size: int
    scales: Floats
    zeros: Floats

    def row(self, k: int) -> tuple[Floats, Floats]:
        """Scale and zero point of input k, (N,) each."""
        return self.scales[k // self.block_size], self.zeros[k // self.block_size]

    def digits(self, weight: Floats) -> NDArray[np.uint8]:
        """The nearest digits, (K, N)."""
        found = np.empty(weight.shape, dtype=np.uint8)
        for some in _outputs_at_a_time(weight):
            scales, zeros = self._spread(len(weight), some)
            found[:, some] = round_to(weight[:, some], scales, zeros, self.bits)
        return found

    def values(self, digits: NDArray[np.uint8]) -> Floats:
        """What digits (K, N) stand for."""
        scales, zeros = self._spread(len(digits))
        return (digits - zeros) * scales

    def _spread(self, rows: int, outputs: slice = slice(None)) -> tuple[Floats, Floats]:
        scales, zeros = (np.repeat(part[:, outputs], self.block_size, axis=0)[:rows] for part in (self.scales, self.zeros))
        return scales, zeros


def fitting(inputs: int, block_size: int, bits: int) -> int:
    """The block size that a layer of K inputs gets: the one asked for, or a smaller one that takes less space.

    Blocks are filled up: with 192 inputs, two blocks of 128 are a third larger than three of 64.
    """

    def size(block: int) -> float:
        blocks = -(-inputs // block)
        return blocks * (block * bits / 8 + 4 + (bits == 4) / 2)

    tried = [block_size >> i for i in range(4) if block_size >> i >= SMALLEST]
    return min(tried, key=size)  # of equals the first, which is the largest


def round_to(weight: Floats, scales: Floats, zeros: Floats, bits: Bits) -> NDArray[np.uint8]:
    """The digits nearest to weights, whatever shape they broadcast to."""
    return np.clip(np.rint(weight / scales) + zeros, 0, 2**bits - 1).astype(np.uint8)


def range_of(block: Floats, bits: Bits, shrink: float | Floats = 1.0) -> tuple[Floats, Floats]:
    """Scale and zero point of blocks: 0 and the largest and the smallest weight are on the grid.

    Args:
        block: (..., R, N), the R rows of a block.
        shrink: the share of the range that the grid spans, above 0 to 1; weights outside are clipped.

    Returns:
        (..., N) each.
    """
    if bits == 8:
        largest = np.abs(block).max(axis=-2) * shrink
        scales = np.where(largest > 0, largest / 127, 1)
        return scales, np.full_like(scales, 128)
    low, high = np.minimum(block.min(axis=-2), 0) * shrink, np.maximum(block.max(axis=-2), 0) * shrink
    scales = np.where(high > low, (high - low) / 15, 1)
    return scales, np.rint(-low / scales)


def in_blocks(weight: Floats, block_size: int) -> Floats:
    """(K, N) as (J, block size, N); zeros fill up the last block, which is where a grid has 0 anyway."""
    fill = -len(weight) % block_size
    return np.pad(weight, ((0, fill), (0, 0))).reshape(-1, block_size, weight.shape[1])


def nearest_grid(weight: Floats, bits: Bits, block_size: int) -> Grid:
    """The grid that spans each block's range."""
    scales, zeros = range_of(in_blocks(weight, block_size), bits)
    return Grid(bits, block_size, scales, zeros)


def cut_grid(
    weight: Floats, bits: Bits, block_size: int, cost: Callable[[Floats], Floats] = lambda error: np.square(error).sum(1)
) -> Grid:
    """The grid whose ranges are cut, block by block and output by output, to where the error costs least.

    Args:
        weight: (K, N).
        cost: of the errors of blocks (J, block size, N), (J, N); the sum of their squares where it is left out.
    """
    parts = [_cut(in_blocks(weight[:, some], block_size), bits, cost) for some in _outputs_at_a_time(weight)]
    scales, zeros = (np.concatenate(each, axis=1) for each in zip(*parts, strict=True))
    return Grid(bits, block_size, scales, zeros)


def _cut(blocks: Floats, bits: Bits, cost: Callable[[Floats], Floats]) -> tuple[Floats, Floats]:
    """Scales and zero points (J, N) of blocks (J, block size, N)."""
    scales, zeros = range_of(blocks, bits)
    least = np.full(scales.shape, np.inf)
    for shrink in SHRINKS:
        tried = range_of(blocks, bits, shrink)
        digits = round_to(blocks, tried[0][:, None], tried[1][:, None], bits)
        found = cost((digits - tried[1][:, None]) * tried[0][:, None] - blocks)
        better = found < least
        least = np.where(better, found, least)
        scales, zeros = np.where(better, tried[0], scales), np.where(better, tried[1], zeros)
    return scales, zeros


def _outputs_at_a_time(weight: Floats) -> list[slice]:
    """Outputs of a weight (K, N) in parts of about `AT_ONCE` numbers: what is made of them takes several times their place."""
    step = max(1, AT_ONCE // len(weight))
    return [slice(start, start + step) for start in range(0, weight.shape[1], step)]


def rtn(weight: Floats, bits: Bits, block_size: int) -> tuple[NDArray[np.uint8], Grid]:
    """The nearest digits (K, N), and their grid: at 4 bits one whose ranges are cut to where the weights' squared error is least.

    A few large weights make a grid of 16 numbers coarse for all others of their block; 8 bits have nothing to win by that.
    """
    grid = nearest_grid(weight, bits, block_size) if bits == 8 else cut_grid(weight, bits, block_size)
    return grid.digits(weight), grid


def packed(digits: NDArray[np.uint8], grid: Grid) -> dict[str, NDArray[Any]]:
    """Digits (K, N) and their grid as MatMulNBits' inputs, by what follows the weight's name.

    The digits are (N, J, block size * bits / 8), ``scales`` (N, J), and ``zero_points`` (N, J) at 8 bits, where they are not all
    128, and (N, ceil(J / 2)) at 4; of two digits in a byte the first has the lower half.
    """
    fill = -len(digits) % grid.block_size
    tail = np.repeat(grid.zeros[-1:].astype(np.uint8), fill, axis=0)  # stands for 0
    blocks = np.concatenate([digits, tail]).T.reshape(digits.shape[1], len(grid.scales), grid.block_size)
    found: dict[str, NDArray[Any]] = {"scales": np.ascontiguousarray(grid.scales.T, dtype=np.float32)}
    zeros = grid.zeros.T.astype(np.uint8)
    if grid.bits == 8:
        symmetric = bool((zeros == 128).all())
        return {
            "Q8": np.ascontiguousarray(blocks),
            **found,
            **({} if symmetric else {"zero_points": np.ascontiguousarray(zeros)}),
        }
    zeros = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))
    return {"Q4": _halves(blocks), **found, "zero_points": _halves(zeros)}


def _halves(digits: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(digits[..., 0::2] | (digits[..., 1::2] << 4))


def replace_weights(model: onnx.ModelProto, found: Mapping[str, tuple[NDArray[np.uint8], Grid]], meant: set[str]) -> None:
    """Puts MatMulNBits in the place of MatMul nodes, in place.

    Args:
        found: digits (K, N) and grid for each weight's name.
        meant: the names of the nodes; the weight of each is in ``found``.
    """
    inputs: dict[str, list[str]] = {}
    for name, (digits, grid) in found.items():
        arrays = {f"{name}_{end}": values for end, values in packed(digits, grid).items()}
        model.graph.initializer.extend(numpy_helper.from_array(values, key) for key, values in arrays.items())
        inputs[name] = list(arrays)
    for position, node in enumerate(model.graph.node):
        if node.name not in meant:
            continue
        digits, grid = found[node.input[1]]
        new = helper.make_node(
            "MatMulNBits",
            [node.input[0], *inputs[node.input[1]]],
            list(node.output),
            f"{node.name}_Q{grid.bits}",
            domain="com.microsoft",
            K=digits.shape[0],
            N=digits.shape[1],
            bits=grid.bits,
            block_size=grid.block_size,
            accuracy_level=INT8_ACTIVATIONS,
        )
        model.graph.node[position].CopyFrom(new)
    if meant and not any(opset.domain == "com.microsoft" for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
