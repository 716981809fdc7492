"""A tiny CLIP and its two components, exported once for all tests of the room."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from mmcompress.quantization.onnx_export import export_component

END_TOKEN = 999


@dataclass
class Component:
    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic_axes: dict[str, dict[int, str]]
    examples: dict[str, torch.Tensor]


class Vision(nn.Module):
    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.model.get_image_features(pixel_values=pixel_values).pooler_output,)


class Text(nn.Module):
    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output,)


def make_clip() -> CLIPModel:
    torch.manual_seed(0)
    layers = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        vision_config={**layers, "image_size": 32, "patch_size": 8},
        text_config={**layers, "vocab_size": 1000, "max_position_embeddings": 24, "eos_token_id": END_TOKEN},
        projection_dim=32,
    )
    model = CLIPModel(config).eval()
    for parameter in model.parameters():  # biases and class tokens start at 0, where errors would not show
        if parameter.ndim == 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def text_inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Token ids with their end token at `length` - 3, the rest masked out."""
    ids = torch.randint(3, 900, (batch, length), generator=torch.Generator().manual_seed(batch))
    ids[:, length - 3 :] = END_TOKEN
    mask = torch.ones_like(ids)
    mask[:, length - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def image_inputs(batch: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))}


def make_components(model: CLIPModel) -> dict[str, Component]:
    text_axes = {0: "batch_size", 1: "sequence_length"}
    return {
        "vision": Component(
            "vision",
            Vision(model),
            ("pixel_values",),
            ("image_embeds",),
            {"pixel_values": {0: "batch_size"}, "image_embeds": {0: "batch_size"}},
            image_inputs(2),
        ),
        "text": Component(
            "text",
            Text(model),
            ("input_ids", "attention_mask"),
            ("text_embeds",),
            {"input_ids": text_axes, "attention_mask": text_axes, "text_embeds": {0: "batch_size"}},
            text_inputs(2, 8),
        ),
    }


@pytest.fixture(scope="session")
def components() -> dict[str, Component]:
    """Shared: tests leave it as it is. Those that change a module take `fresh`."""
    return make_components(make_clip())


@pytest.fixture
def fresh() -> dict[str, Component]:
    return make_components(make_clip())


@pytest.fixture(scope="session")
def exported(components: dict[str, Component], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    for name, component in components.items():
        export_component(component, component.examples, folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in components}
