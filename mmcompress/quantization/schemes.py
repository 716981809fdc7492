"""The names of the quantization schemes, and what follows from each. Importable without onnx and torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Scheme = Literal["int8-static", "int8-dynamic", "int8-weight-only", "int4-weight-only", "float16", "bfloat16", "float32"]

Calibration = Literal["min-max", "percentile", "entropy", "mse"]
"""How the range of an activation comes from its values on calibration data."""

ArrangementName = Literal[
    "static",
    "static-fused",
    "static-outputs",
    "static-attention",
    "static-scores",
    "static-scores-per-tensor",
    "static-conv-float",
    "static-per-tensor",
    "static-per-tensor-fused",
    "static-signed",
    "dynamic",
    "dynamic-fused",
    "dynamic-per-tensor",
    "dynamic-per-tensor-fused",
]
"""The ways to place int8; `quantization.arrangements` says what each is."""
FIXED: Mapping[str, ArrangementName] = {"int8-static": "static", "int8-dynamic": "dynamic"}
"""What the schemes mean without measuring."""

SUFFIXES: Mapping[str, str] = {
    "int8-static": "_quantized",
    "int8-dynamic": "_quantized",
    "int8-weight-only": "_int8",
    "int4-weight-only": "_q4",
    "float16": "_fp16",
    "bfloat16": "_bf16",
    "float32": "",
}
"""What follows a component's name in that of its file: transformers.js' suffixes (bfloat16 has none there)."""
WEIGHT_BYTES: Mapping[str, float] = {
    "int8-static": 1,
    "int8-dynamic": 1,
    "int8-weight-only": 1,
    "int4-weight-only": 0.5,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
}
"""Bytes of one weight, scales aside."""


def scheme_of(wanted: Scheme | Mapping[str, Scheme], component: str, tower: str, decoder: bool) -> tuple[Scheme, str]:
    """What one component gets, and the suffix of its file.

    A decoder is called once a token, with a single row: reading its weights is all its time, and the ranges of its
    activations change from call to call. So one int8 scheme for a whole model gives decoders int8 weights alone; their files
    have the suffix of the scheme that was asked for, so that clients find one kind of file.

    Args:
        wanted: One scheme, or one for each tower or component; what is not named stays float32.
    """
    if not isinstance(wanted, str):
        chosen = wanted.get(component, wanted.get(tower, "float32"))
        return chosen, SUFFIXES[chosen]
    if decoder and wanted in ("int8-static", "int8-dynamic"):
        return "int8-weight-only", SUFFIXES[wanted]
    return wanted, SUFFIXES[wanted]
