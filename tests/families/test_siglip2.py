"""SigLIP 2 with pictures of any shape: positions resized within the graph, as stock transformers resizes them in Python."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from mmcompress.families.siglip2 import FAMILY, FlexEmbeddings, resize_weights
from mmcompress.model import CompressedModel
from tests.families import tiny_siglip2


@pytest.fixture
def model() -> CompressedModel:
    return tiny_siglip2.siglip2()


@pytest.mark.parametrize("source", [1, 4, 16])
@pytest.mark.parametrize("target", [1, 2, 3, 4, 5, 7, 16, 23, 64])
def test_weights_are_torchs_antialiased_interpolation(source: int, target: int) -> None:
    values = torch.randn(1, 1, 1, source)
    wanted = F.interpolate(values, size=(1, target), mode="bilinear", align_corners=False, antialias=True)
    weights = resize_weights(torch.arange(target).unsqueeze(0), torch.tensor([[target]]), source)
    torch.testing.assert_close(weights[0] @ values[0, 0, 0], wanted[0, 0, 0], atol=1e-5, rtol=1e-5)


def test_embeddings_are_the_stock_ones_for_every_shape(model: CompressedModel) -> None:
    stock = model.module.vision_model.embeddings
    ours = FlexEmbeddings(stock)
    assert set(ours.state_dict()) == set(stock.state_dict())
    assert all(torch.equal(values, stock.state_dict()[name]) for name, values in ours.state_dict().items())
    shapes = torch.tensor([(h, w) for h in range(1, 17) for w in range(2, 17) if h * w <= 16])
    pixels = torch.randn(len(shapes), 16, 48)
    torch.testing.assert_close(ours(pixels, shapes), stock(pixels, shapes), atol=2e-6, rtol=0)


def test_embeddings_of_a_single_column_are_those_of_a_single_row_turned(model: CompressedModel) -> None:
    """Not compared with stock: torch 2.13's antialiased interpolation to a width of 1 gives every row the first one's values."""
    stock = model.module.vision_model.embeddings
    pixels = torch.randn(1, 16, 48)
    column = FlexEmbeddings(stock)(pixels, torch.tensor([[5, 1]]))
    with torch.no_grad():
        table = stock.position_embedding.weight.view(4, 4, -1)
        stock.position_embedding.weight.copy_(table.transpose(0, 1).reshape(16, -1).clone())
    torch.testing.assert_close(column, stock(pixels, torch.tensor([[1, 5]])), atol=2e-6, rtol=0)


def test_components_give_stock_embeddings_for_pictures_of_different_shapes(model: CompressedModel) -> None:
    pictures = [Image.effect_noise(size, 80).convert("RGB") for size in ((40, 40), (80, 20), (30, 60), (9, 9))]
    batch = model.processor.stack(model.processor.media("image", pictures))
    assert len({tuple(shape.tolist()) for shape in batch["spatial_shapes"]}) > 2
    part = FAMILY.components(model.module)["vision_model"]
    with torch.no_grad():
        stock = model.module.vision_model(**batch).pooler_output
        (ours,) = part.module(*[batch[name] for name in part.inputs])
        alone = [part.module(*[batch[name][i : i + 1] for name in part.inputs])[0] for i in range(4)]
    torch.testing.assert_close(ours, stock, atol=2e-6, rtol=0)
    torch.testing.assert_close(torch.cat(alone), stock, atol=2e-6, rtol=0)
    assert not isinstance(model.module.vision_model.embeddings, FlexEmbeddings), "the model itself was changed"
