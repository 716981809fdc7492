"""A teacher that is asked once for each picture and text.

Shapes: N examples, B pictures in a batch, U distinct texts, S text length, D the teacher's embedding width.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmcompress.context import Context
from mmcompress.errors import DataError, ModelError
from mmcompress.families.base import Batch, Outputs
from mmcompress.model import CompressedModel, load
from mmcompress.training.autocast import computing

BASELINE = "baseline"
CACHE_BYTES = 1_000_000_000
"""Embeddings of pictures are kept when those of all examples fit in this."""


class Teacher:
    """A frozen model whose embeddings are remembered, by example for pictures and by tokens for texts.

    That is right as long as a picture is the same in every epoch, without augmentation. It is no module, so that an
    optimiser that is given an objective's parameters never sees the teacher's.
    """

    def __init__(self, model: CompressedModel, examples: int) -> None:
        """Takes over a model, and how many examples there are.

        Args:
            model: is put into eval mode and moved between devices: give it a model of its own.
            examples: N, the indices that batches hold are below it.
        """
        self.model = model
        model.module.eval().requires_grad_(False)
        self.device, self.precision = torch.device("cpu"), "fp32"
        self.sizes = embedding_sizes(model)
        self.seconds, self.pictures_asked, self.texts_asked = 0.0, 0, 0
        fits = examples * self.sizes["vision"] * 4 <= CACHE_BYTES
        self._pictures = torch.empty(examples, self.sizes["vision"]) if fits else None
        self._known = torch.zeros(examples, dtype=torch.bool)
        self._texts: dict[tuple[int, ...], torch.Tensor] = {}

    def start(self, device: torch.device, precision: str) -> None:
        """Moves the teacher to where it will be asked; it computes in the student's precision."""
        self.device, self.precision = device, precision
        self.model.module.to(device)

    def __call__(self, batch: Batch) -> Outputs:
        """The teacher's embeddings (B, D) and (U, D) of a training batch, and its logit scale, without gradient."""
        began = time.perf_counter()
        with torch.no_grad():
            embeds = {"vision": self._vision(batch), "text": self._text(batch)}
            scale = self.model.family.forward(self.model.module, {}).logit_scale
        self.seconds += time.perf_counter() - began
        return Outputs(embeds, scale)

    def facts(self) -> dict[str, Any]:
        """Seconds spent in the teacher, and how many pictures and texts went through it."""
        return {
            "teacher_seconds": round(self.seconds, 3),
            "teacher_pictures": self.pictures_asked,
            "teacher_texts": self.texts_asked,
        }

    def _ask(self, tower: str, batch: Batch) -> torch.Tensor:
        with computing(self.device, self.precision):
            return self.model.family.forward(self.model.module, batch).embeds[tower].float()

    def _vision(self, batch: Batch) -> torch.Tensor:
        pixels, index = batch["pixel_values"], batch["index"].cpu()
        if self._pictures is None:
            self.pictures_asked += len(index)
            return self._ask("vision", {"pixel_values": pixels})
        unknown = ~self._known[index]
        if unknown.any():
            self.pictures_asked += int(unknown.sum())
            self._pictures[index[unknown]] = self._ask("vision", {"pixel_values": pixels[unknown.to(self.device)]}).cpu()
            self._known[index[unknown]] = True
        return self._pictures[index].to(self.device)

    def _text(self, batch: Batch) -> torch.Tensor:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        keys = [tuple(row[kept.bool()].tolist()) for row, kept in zip(ids.cpu(), mask.cpu(), strict=True)]
        unknown = [i for i, key in enumerate(keys) if key not in self._texts]
        if unknown:
            self.texts_asked += len(unknown)
            found = self._ask("text", {"input_ids": ids[unknown], "attention_mask": mask[unknown]})
            self._texts |= {keys[i]: row for i, row in zip(unknown, found, strict=True)}
        return torch.stack([self._texts[key] for key in keys])


def find_teacher(name: str, student: CompressedModel, context: Context, examples: int) -> Teacher:
    """The teacher that a recipe names, checked against the student.

    Args:
        name: ``baseline``, a hub id or a folder.

    Raises:
        DataError: ``baseline`` without a run that has one.
        ModelError: the teacher cannot be loaded, or reads other pictures or texts than the student.
    """
    if name == BASELINE:
        if context.baseline is None:
            raise DataError(
                "teacher: baseline is the model that a run begins with, and there is no run here; "
                "pass teacher=<a model folder or hub id>"
            )
        model = context.baseline().clone()
    else:
        model = load(name)
    check_fits(model, student, name)
    return Teacher(model, examples)


def check_fits(teacher: CompressedModel, student: CompressedModel, name: str) -> None:
    """Checks that one batch is right for both models, by what their processors make of a probe.

    Raises:
        ModelError: it is not; the message says what differs.
    """
    missing = [tower for tower in student.family.towers if tower not in teacher.family.towers]
    if missing:
        raise ModelError(f"teacher {name}: has no {missing[0]} tower, which the student has")
    ramp = np.linspace(0, 255, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8)
    theirs, ours = (m.processor.pixels([Image.fromarray(ramp)]) for m in (teacher, student))
    if theirs.shape != ours.shape:
        raise ModelError(
            f"teacher {name}: reads pictures of {_size(theirs)} pixels, the student of {_size(ours)}; they must be the same"
        )
    if not torch.allclose(theirs, ours, atol=1e-3):
        raise ModelError(f"teacher {name}: resizes or normalises pictures in another way than the student")
    shapes = [m.family.example_batch(m.module.config, 1)["pixel_values"].shape for m in (teacher, student)]
    if shapes[0] != shapes[1]:
        raise ModelError(f"teacher {name}: is made for pictures of shape {tuple(shapes[0])}, the student {tuple(shapes[1])}")
    sizes = [m.module.config.get_text_config().vocab_size for m in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise ModelError(f"teacher {name}: has a vocabulary of {sizes[0]} tokens, the student of {sizes[1]}")
    probes = ["a photo of a cat.", "Zwei Hunde! 123 " * 100]
    tokens = [m.processor.tokens(probes)["input_ids"] for m in (teacher, student)]
    if not torch.equal(tokens[0], tokens[1]):
        raise ModelError(f"teacher {name}: its tokenizer gives other tokens than the student's")


def embedding_sizes(model: CompressedModel) -> dict[str, int]:
    """For each tower the width D of its embeddings."""
    device = next(model.module.parameters()).device
    batch = {name: values.to(device) for name, values in model.family.example_batch(model.module.config, 1).items()}
    with torch.no_grad():
        found = model.family.forward(model.module, batch)
    return {tower: embeds.shape[-1] for tower, embeds in found.embeds.items()}


def _size(pixels: torch.Tensor) -> str:
    return f"{pixels.shape[-2]} x {pixels.shape[-1]}"
