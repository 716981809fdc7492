"""GPTQ: weights are rounded one input at a time, and those still to come make up for the error.

Frantar, Ashkboos, Hoefler, Alistarh 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv 2210.17323), algorithm 1. ONNX Runtime has one, too, which keeps all calibration data, knows 4 bits alone, and rounds what
it has found once more, to another grid.

Shapes: K inputs, N outputs of a layer.
"""

from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from mmcompress.quantization.blocks import Bits, Floats, Grid, nearest_grid, round_to

DAMPING = 0.01
"""Share of the mean diagonal that is added to it, as in the paper."""
LAZY = 128
"""Inputs whose corrections are gathered before the rest of the weight is changed, as in the paper: it saves memory traffic."""


def gptq(weight: Floats, moments: Floats, bits: Bits, block_size: int) -> tuple[NDArray[np.uint8], Grid]:
    """Digits whose output error on the calibration data is small, not those nearest to the weights.

    Inputs with large second moments come first, so that there is much left to make up for their errors ("act-order"); the grids
    are fixed before ("static groups"), so that the blocks stay where they are.

    Args:
        weight: (K, N).
        moments: X^T X of the layer's inputs, (K, K), at any scale.

    Returns:
        Digits, (K, N), and their grid.
    """
    order = np.argsort(-np.diag(moments), kind="stable")
    work, grid = weight.astype(np.float64)[order], nearest_grid(weight, bits, block_size)
    factor = inverse_factor(moments[np.ix_(order, order)])
    digits = np.zeros(weight.shape, dtype=np.uint8)
    for start in range(0, len(work), LAZY):
        end = min(start + LAZY, len(work))
        errors = np.empty((end - start, work.shape[1]))
        for k in range(start, end):
            scales, zeros = grid.row(order[k])
            digits[order[k]] = chosen = round_to(work[k], scales, zeros, bits)
            errors[k - start] = (work[k] - (chosen - zeros) * scales) / factor[k, k]
            work[k + 1 : end] -= np.outer(factor[k, k + 1 : end], errors[k - start])
        work[end:] -= factor[start:end, end:].T @ errors
    return digits, grid


def inverse_factor(moments: Floats) -> Floats:
    """The upper triangular Cholesky factor of the inverse of the damped moments, (K, K).

    Inputs that are always 0 are taken for independent of all others. The damping grows tenfold until there is a factor.
    """
    damped = moments.astype(np.float64)
    diagonal = np.diag(damped).copy()
    dead = diagonal <= 0
    diagonal[dead] = 1
    step = DAMPING * float(diagonal[~dead].mean() if (~dead).any() else 1)
    while True:
        np.fill_diagonal(damped, diagonal + step)
        try:
            # Reversed twice, the lower factor is an upper one, and its inverse that of the inverse: nothing is inverted twice.
            upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
        except np.linalg.LinAlgError:
            step *= 10
            continue
        return cast(Floats, solve_triangular(upper, np.eye(len(upper)), overwrite_b=True))
