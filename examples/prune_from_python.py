"""Halves the feed-forward layers of the bundled CLIP from Python, and loads the result with transformers alone.

python examples/prune_from_python.py --out pruned
"""

import argparse
from pathlib import Path

import torch
from transformers import CLIPModel

import mmcompress as mm
from mmcompress.data.examples import Examples
from mmcompress.data.shapes import CLASSES, Shapes


def main(out: Path) -> None:
    """Prunes, saves and reloads."""
    # Any `datasets.Dataset` with `image` and `label` (or `text`) columns does as well.
    train = Examples(Shapes("train", 128, seed=0), "shapes", {"image": "image", "label": "label"}, CLASSES)

    model = mm.load("bundled:shapes-clip")
    prune = mm.passes.Prune(axis="ffn", ratio={"vision": 0.5, "text": 0.5}, criterion="taylor", samples=128)
    pruned = prune.apply(model, data=train)
    pruned.save(out)
    print(f"parameters: {model.parameters():,} before, {pruned.parameters():,} after")

    stock = CLIPModel.from_pretrained(out).eval()
    pixels = torch.randn(1, 3, stock.config.vision_config.image_size, stock.config.vision_config.image_size)
    with torch.no_grad():
        ours = pruned.module.get_image_features(pixel_values=pixels).pooler_output
        theirs = stock.get_image_features(pixel_values=pixels).pooler_output
    # Not bit by bit: on some processors the last bit varies with where in memory the weights lie.
    print(f"transformers gives the same embedding: {torch.allclose(ours, theirs, rtol=0, atol=1e-5)}")
    print(f"saved: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where the pruned model goes; a folder that does not exist yet")
    main(parser.parse_args().out)
