"""Classifies a picture with a run's ONNX components: onnxruntime and transformers' processors, no mmcompress, no torch model.

python examples/onnx_inference.py --run runs/quickstart --out answer.json [--picture cat.png --classes "a cat" "a dog"]
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer


def embed(folder: Path, component: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Unit embeddings, shape (N, D), of one component; its quantized file where there is one."""
    file = next(p for p in (folder / f"{component}_quantized.onnx", folder / f"{component}.onnx") if p.exists())
    session = onnxruntime.InferenceSession(file)
    found = session.run(None, {i.name: inputs[i.name] for i in session.get_inputs()})[0]
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


def classify(folder: Path, picture: Image.Image, prompts: list[str]) -> np.ndarray:
    """The cosine similarity of the picture to each prompt, shape (len(prompts),)."""
    pixels = AutoImageProcessor.from_pretrained(folder)(images=[picture], return_tensors="np")
    tokens = AutoTokenizer.from_pretrained(folder)(prompts, padding=True, truncation=True, return_tensors="np")
    return (embed(folder, "vision_model", pixels) @ embed(folder, "text_model", tokens).T)[0]


def main(arguments: argparse.Namespace) -> None:
    """Without a picture it takes one of the bundled synthetic ones, and their classes."""
    if arguments.picture is None:
        from mmcompress.data.shapes import CLASSES, Shapes  # only for a picture to try

        row = Shapes("test", 1, seed=0)[0]
        picture, classes = row["image"], list(CLASSES)
        print(f"the picture shows: a {CLASSES[row['label']]}")
    else:
        picture, classes = Image.open(arguments.picture).convert("RGB"), arguments.classes
    scores = classify(arguments.run / "onnx", picture, [f"a photo of a {name}." for name in classes])
    best = [(classes[i], round(float(scores[i]), 4)) for i in np.argsort(-scores)[:3]]
    print("\n".join(f"{score:.3f}  {name}" for name, score in best))
    arguments.out.write_text(json.dumps(dict(best), indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="a run's folder, with onnx/ in it")
    parser.add_argument("--out", type=Path, required=True, help="where the three nearest classes go, as JSON")
    parser.add_argument("--picture", type=Path, help="a picture file")
    parser.add_argument("--classes", nargs="+", default=["cat", "dog"], help="class names")
    main(parser.parse_args())
