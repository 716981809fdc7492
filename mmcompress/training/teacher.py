"""A teacher that is asked once for each picture, recording and text where it gives embeddings, and for each batch elsewhere.

Shapes: N examples, B of them in a batch, U distinct texts, S text length, D the teacher's embedding width.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmcompress.context import Context
from mmcompress.data.audio import Audio
from mmcompress.errors import DataError, ModelError
from mmcompress.families.base import Batch, Outputs
from mmcompress.model import CompressedModel, load
from mmcompress.training.autocast import computing

BASELINE = "baseline"
CACHE_BYTES = 1_000_000_000
"""Embeddings of pictures or recordings are kept when those of all examples fit in this."""


class Teacher:
    """A frozen model whose embeddings are remembered, by example for pictures and recordings and by tokens for texts.

    That is right as long as a picture is the same in every epoch, without augmentation. A teacher that gives no embeddings is
    asked anew for every batch. It is no module, so that an optimiser that is given an objective's parameters never sees the
    teacher's.
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
        self.seconds, self.examples_asked, self.texts_asked = 0.0, 0, 0
        self._media = [name for names in model.family.media.values() for name in names]
        self._tower = next((tower for tower in self.sizes if tower != "text"), None)
        width = self.sizes.get(self._tower or "", 0)
        fits = width > 0 and examples * width * 4 <= CACHE_BYTES
        self._seen = torch.empty(examples, width) if fits else None
        self._known = torch.zeros(examples, dtype=torch.bool)
        self._texts: dict[tuple[int, ...], torch.Tensor] = {}

    def start(self, device: torch.device, precision: str) -> None:
        """Moves the teacher to where it will be asked; it computes in the student's precision."""
        self.device, self.precision = device, precision
        self.model.module.to(device)

    def __call__(self, batch: Batch) -> Outputs:
        """The teacher's outputs for a training batch, without gradient: embeddings (B, D) and (U, D), or logits."""
        began = time.perf_counter()
        with torch.no_grad():
            if self._tower is None:
                self.examples_asked += len(batch["index"])
                found = self._forward({k: v for k, v in batch.items() if k not in ("target", "index")})
            else:
                found = self.model.family.forward(self.model.module, {})
                found.embeds = {self._tower: self._look(self._tower, batch), "text": self._text(batch)}
        self.seconds += time.perf_counter() - began
        return found

    def facts(self) -> dict[str, Any]:
        """Seconds spent in the teacher, and how many examples and texts went through it."""
        return {
            "teacher_seconds": round(self.seconds, 3),
            "teacher_examples": self.examples_asked,
            "teacher_texts": self.texts_asked,
        }

    def _forward(self, batch: Batch) -> Outputs:
        with computing(self.device, self.precision):
            return self.model.family.forward(self.model.module, batch)

    def _ask(self, tower: str, batch: Batch) -> torch.Tensor:
        return self._forward(batch).embeds[tower].float()

    def _look(self, tower: str, batch: Batch) -> torch.Tensor:
        media, index = {name: batch[name] for name in self._media if name in batch}, batch["index"].cpu()
        if self._seen is None:
            self.examples_asked += len(index)
            return self._ask(tower, media)
        unknown = ~self._known[index]
        if unknown.any():
            self.examples_asked += int(unknown.sum())
            chosen = {name: values[unknown.to(values.device)] for name, values in media.items()}
            self._seen[index[unknown]] = self._ask(tower, chosen).cpu()
            self._known[index[unknown]] = True
        return self._seen[index].to(self.device)

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
        model = context.baseline()
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
    for kind in student.family.media:
        if kind not in teacher.family.media:
            raise ModelError(f"teacher {name}: reads no {kind}, which the student does")
        _check_same_media(teacher, student, name, kind)
    sizes = [m.module.config.get_text_config().vocab_size for m in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise ModelError(f"teacher {name}: has a vocabulary of {sizes[0]} tokens, the student of {sizes[1]}")
    probes = ["a photo of a cat.", "Zwei Hunde! 123 " * 100]
    tokens = [m.processor.tokens(probes)["input_ids"] for m in (teacher, student)]
    if not torch.equal(tokens[0], tokens[1]):
        raise ModelError(f"teacher {name}: its tokenizer gives other tokens than the student's")


def _check_same_media(teacher: CompressedModel, student: CompressedModel, name: str, kind: str) -> None:
    """Both models' processors must make the same of one picture or recording, and both models take it."""
    ramp = np.linspace(0, 255, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8)
    probe: Any = Image.fromarray(ramp) if kind == "image" else Audio(np.sin(np.arange(16_000) ** 1.1).astype(np.float32), 16_000)
    things = "pictures" if kind == "image" else "recordings"
    theirs, ours = (m.processor.media(kind, [probe])[0] for m in (teacher, student))
    for key, values in ours.items():
        if key not in theirs or theirs[key].shape != values.shape:
            found = _size(theirs[key]) if key in theirs else "none"
            raise ModelError(
                f"teacher {name}: reads {things} of {found} {_unit(key)}, the student of {_size(values)}; they must be the same"
            )
        if not torch.allclose(theirs[key].float(), values.float(), atol=1e-3):
            raise ModelError(f"teacher {name}: prepares {things} in another way than the student (size, scale or normalisation)")
    examples = [m.family.example_batch(m.module.config, 1) for m in (teacher, student)]
    for key in ours:
        shapes = [tuple(example[key].shape) for example in examples]
        if shapes[0] != shapes[1]:
            raise ModelError(f"teacher {name}: is made for {things} of shape {shapes[0]}, the student {shapes[1]}")


def _unit(key: str) -> str:
    return "pixels" if key == "pixel_values" else key


def embedding_sizes(model: CompressedModel) -> dict[str, int]:
    """For each tower the width D of its embeddings; empty for models that give none."""
    if "embeddings" not in model.family.abilities:
        return {}
    device = next(model.module.parameters()).device
    batch = {name: values.to(device) for name, values in model.family.example_batch(model.module.config, 1).items()}
    with torch.no_grad():
        found = model.family.forward(model.module, batch)
    return {tower: embeds.shape[-1] for tower, embeds in found.embeds.items()}


def _size(pixels: torch.Tensor) -> str:
    return f"{pixels.shape[-2]} x {pixels.shape[-1]}"
