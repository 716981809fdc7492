"""Components run by torch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from mmcompress.model import CompressedModel
from mmcompress.training.device import pick_device


class TorchPredict:
    """A model in memory as ``Predict``; see ``runtimes.base``."""

    runtime = "torch"

    def __init__(self, model: CompressedModel, device: str = "cpu") -> None:
        self.device = pick_device(device)
        self.parts = model.family.components(model.module.to(self.device).eval())
        self.components = tuple(self.parts)

    def __call__(self, component: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        part = self.parts[component]
        tensors = [torch.from_numpy(np.ascontiguousarray(inputs[name])).to(self.device) for name in part.inputs]
        with torch.inference_mode():
            outputs = part.module(*tensors)
        return {name: value.float().cpu().numpy() for name, value in zip(part.outputs, outputs, strict=True)}

    def cache(self, component: str) -> Mapping[str, tuple[int, int]]:
        return self.parts[component].cache
