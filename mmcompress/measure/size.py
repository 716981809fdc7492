"""Parameters, bytes on disk and floating point operations, for a model and for each tower."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig

from mmcompress.families.base import Family, count, tower_parameters, without_weights
from mmcompress.model import WEIGHTS_FILE, CompressedModel
from mmcompress.quantization.onnx_export import eager_attention
from mmcompress.runtimes.onnx_predict import component_files


def parameters_by_tower(model: CompressedModel) -> dict[str, int]:
    """Parameters of each tower, and of what belongs to none under ``shared``."""
    return {tower: count(found) for tower, found in tower_parameters(model.family, model.module).items()}


def torch_bytes(folder: Path) -> int:
    """Bytes of a model folder's weights."""
    return (folder / WEIGHTS_FILE).stat().st_size


def torch_bytes_by_tower(model: CompressedModel) -> dict[str, int]:
    """Bytes that each tower's parameters take in the weights file (its header is in no tower's share)."""
    found = tower_parameters(model.family, model.module)
    return {tower: sum(p.numel() * p.element_size() for p in parameters) for tower, parameters in found.items()}


def onnx_bytes(folder: Path) -> dict[str, int]:
    """Bytes of each component's file, data kept beside it included."""
    return {
        name: sum(p.stat().st_size for p in path.parent.glob(path.name + "*") if p.is_file())
        for name, path in component_files(folder).items()
    }


def flops_by_component(model: CompressedModel) -> dict[str, int]:
    """Floating point operations of one example, 2 for each multiply-add, counted by torch's own counter over matrix products,
    convolutions and attention. Element-wise work is not counted, as is the custom. For families that write text, those of
    `families.base.NEW_TOKENS` tokens of it.
    """
    found: dict[str, int] = {}
    # The counter knows eager matrix products on every device; fused CPU attention kernels it may not.
    with eager_attention(model.module):
        parts = model.family.components(model.module)
        for call in model.family.calls(model.module, 1):
            part = parts[call.component]
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                part.module(*[call.inputs[i] for i in part.inputs])
            found[part.name] = found.get(part.name, 0) + call.times * int(counter.get_total_flops())
    return found


def shape_cost(family: Family, config: PretrainedConfig) -> tuple[int, int]:
    """Parameters, and FLOPs of one example, of a model that exists only as shapes."""
    module = without_weights(family, config)
    total = 0
    parts = family.components(module)
    for call in family.calls(module, 1):
        part = parts[call.component]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            part.module(*[call.inputs[i].to("meta") for i in part.inputs])
        total += call.times * int(counter.get_total_flops())
    return sum(p.numel() for p in module.parameters()), total
