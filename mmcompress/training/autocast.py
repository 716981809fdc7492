"""The forward pass in bf16, without the one kernel that makes it slower than fp32 on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Float32Attention(TorchFunctionMode):
    """Computes scaled dot-product attention in float32 whatever the dtype around it.

    torch's CPU kernel for attention's backward pass takes 4 to 9 times as long in bf16 as in fp32 (torch 2.13, AVX512-BF16
    and AMX, sequences of 17 to 50), which is half of a small CLIP's training step; the casts cost next to nothing.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Casts query, key and value, and the result back; lets all other functions through."""
        named = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **named)
        inputs = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | named
        dtype = inputs["query"].dtype
        for name in ("query", "key", "value", "attn_mask"):
            value = inputs.get(name)
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                inputs[name] = value.float()
        with torch.autocast("cpu", enabled=False):
            return func(**inputs, **dict(zip(("dropout_p", "is_causal"), args[4:], strict=False))).to(dtype)


@contextmanager
def computing(device: torch.device, precision: str) -> Iterator[None]:
    """Runs the block's forward passes in ``fp32`` or ``bf16`` (autocast: weights stay float32)."""
    if precision == "fp32":
        yield
    elif device.type == "cpu":
        with torch.autocast("cpu", torch.bfloat16), Float32Attention():
            yield
    else:
        with torch.autocast(device.type, torch.bfloat16):
            yield
