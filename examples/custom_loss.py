"""Distils the pruned bundled CLIP with a loss that this script brings along, and saves the student.

    python examples/custom_loss.py --out distilled
(A loss that recipes find by name goes into a package with an entry point: docs/how-to.md.)
"""

import argparse
from pathlib import Path

import torch

import mmcompress as mm
from mmcompress.context import Context
from mmcompress.data.examples import Examples
from mmcompress.data.shapes import CLASSES, Shapes
from mmcompress.families.base import Batch, Outputs
from mmcompress.passes.finetune import Finetune
from mmcompress.tasks.zero_shot_image_classification import ZeroShotImageClassification
from mmcompress.training.loop import train
from mmcompress.training.losses.base import Loss
from mmcompress.training.objective import Objective
from mmcompress.training.teacher import Teacher


class Cosine(Loss):
    """1 - cos between the student's and the teacher's embeddings, the mean over both towers."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> torch.Tensor:
        gaps = [1 - torch.cosine_similarity(own, teacher.embeds[tower]).mean() for tower, own in student.embeds.items()]
        return torch.stack(gaps).mean()


class OnlyCosine(Objective):
    """What the training loop minimises: the loss above against a teacher, and nothing else."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher, self.cosine = teacher, Cosine(teacher.sizes, teacher.sizes)

    def forward(self, outputs: Outputs, batch: Batch) -> dict[str, torch.Tensor]:
        return {"cosine": self.cosine(outputs, self.teacher(batch), batch)}


def main(out: Path) -> None:
    """Prunes, distils for a few steps and saves."""
    examples = Examples(Shapes("train", 512, seed=0), "shapes", {"image": "image", "label": "label"}, CLASSES)
    context = Context(task=ZeroShotImageClassification(type="zero-shot-image-classification"), train=examples)
    model = mm.load("bundled:shapes-clip")
    student = mm.passes.Prune(axis="ffn", ratio=0.5).apply(model)
    objective = OnlyCosine(Teacher(model.clone(), len(examples)))
    facts = train(student, context, Finetune(max_steps=8, batch_size=64, learning_rate=3e-4), objective, "example")
    student.save(out)
    print(f"loss: {facts['first_loss']:.4f} at the first step, {facts['final_loss']:.4f} at the last ones; saved: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where the student goes; a folder that does not exist yet")
    main(parser.parse_args().out)
