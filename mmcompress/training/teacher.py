"""A teacher that is asked once for each picture, recording and text where it gives embeddings, and for each batch elsewhere.

Answers are float32 on disk as in memory: half of the bytes would save little (2 kB an example at D = 512) and make a student that
was trained beside a teacher another one than that which finds the answers there.

Shapes: N examples, B of them in a batch, U distinct texts, S text length, D the teacher's embedding width.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn

import mmcompress
from mmcompress.context import Context
from mmcompress.data.audio import Audio
from mmcompress.errors import DataError, ModelError
from mmcompress.families.base import BESIDE_INPUTS, Batch, Outputs
from mmcompress.model import CompressedModel, load
from mmcompress.quantization.onnx_export import eager_attention
from mmcompress.training.autocast import computing
from mmcompress.training.inside import look
from mmcompress.training.memory import users
from mmcompress.training.stored import Store, row_key

BASELINE = "baseline"
CACHE_BYTES = 1_000_000_000
"""Embeddings of pictures or recordings are kept in memory when those of all examples fit in this."""
FLUSH_ROWS, FLUSH_SECONDS = 4096, 20.0
"""A store is written when so many rows are new, or some are and so long has passed: what a killed process loses."""

NOT_TOLD = frozenset({"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"})
"""Keys of a config that no answer depends on: weights are hashed in the dtype that they have in memory."""


class Teacher:
    """A frozen model whose embeddings are remembered: in memory by example and variant, and on disk by what it was given.

    Its rows on disk are found by a hash of the very numbers that go into the model (prepared pixels, features or token ids), in a
    store that is named by a hash of the model's weights, config and precision. So a picture is known again in another file, pass
    or run, and nothing that changes an answer (augmentation, preprocessing, other weights) can be answered by an old one. A
    teacher that gives no embeddings is asked anew for every batch. It is no module, so that an optimiser that is given an
    objective's parameters never sees the teacher's.
    """

    def __init__(self, model: CompressedModel, examples: int, variants: int = 1, store_bytes: int = 0) -> None:
        """Takes over a model, and how many examples there are.

        Args:
            model: is put into eval mode and moved between devices: give it a model of its own.
            examples: N, the indices that batches hold are below it.
            variants: how many different inputs an example may come as; ``variant`` in batches is below it.
            store_bytes: what all stores on disk together may take; 0 stores nothing.
        """
        self.model = model
        model.module.eval().requires_grad_(False)
        self.device, self.precision = torch.device("cpu"), "fp32"
        self.sizes = embedding_sizes(model)
        self.variants, self.store_bytes = variants, store_bytes
        self.seconds, self.batches_asked = 0.0, 0
        self._media = [name for names in model.family.media.values() for name in names]
        self._tower = next((tower for tower in self.sizes if tower != "text"), None)
        width = self.sizes.get(self._tower or "", 0)
        fits = width > 0 and examples * variants * width * 4 <= CACHE_BYTES
        self._seen = torch.empty(examples * variants, width) if fits else None
        self._known = torch.zeros(examples * variants, dtype=torch.bool)
        self._texts: dict[bytes, torch.Tensor] = {}
        self._tallies = {tower: _Tally() for tower in self.sizes}

    def start(self, device: torch.device, precision: str) -> None:
        """Moves the teacher to where it will be asked; it computes in the student's precision. Opens its stores."""
        self.device, self.precision = device, precision
        if self.store_bytes and self._tower is not None:
            known = identity(self.model, f"{precision} on {device.type}")
            for tower, tally in self._tallies.items():
                tally.store = Store(f"{known}-{tower}", self.sizes[tower], self.store_bytes)
        if precision == "bf16":
            store_halves(self.model.module)
        self.model.module.to(device)

    def stop(self) -> None:
        """Writes to disk what is not there yet."""
        for tally in self._tallies.values():
            tally.flush()

    def __call__(self, batch: Batch) -> Outputs:
        """The teacher's outputs for a training batch, without gradient: embeddings (B, D) and (U, D), or logits."""
        began = time.perf_counter()
        with torch.no_grad():
            if self._tower is None:
                self.batches_asked += len(batch["index"])
                found = self._forward({k: v for k, v in batch.items() if k not in BESIDE_INPUTS})
            else:
                found = self.model.family.forward(self.model.module, {})
                found.embeds = {self._tower: self._look(self._tower, batch), "text": self._text(batch)}
        self.seconds += time.perf_counter() - began
        return found

    @property
    def examples_asked(self) -> int:
        """How many pictures or recordings went through the teacher, those of teachers without embeddings in every batch."""
        return self.batches_asked + (self._tallies[self._tower].asked if self._tower is not None else 0)

    def facts(self) -> dict[str, Any]:
        """Seconds spent in the teacher, how many examples and texts went through it, and what the cache answered in its place.

        ``teacher_seconds_saved`` is an estimate: what a row took where the teacher was asked (in this training, or else in the
        one that stored it), times the rows that were not asked for.
        """
        tallies = self._tallies.values()
        text = self._tallies.get("text", _Tally())
        return {
            "teacher_seconds": round(self.seconds, 3),
            "teacher_examples": self.examples_asked,
            "teacher_texts": text.asked,
            "teacher_cache_hits": sum(tally.hits for tally in tallies) - text.hits,
            "teacher_disk_hits": sum(tally.from_disk for tally in tallies) - text.from_disk,
            "teacher_seconds_saved": round(sum(tally.saved() for tally in tallies), 3),
        }

    def look_inside(self, batch: Batch, needs: frozenset[str]) -> Outputs:
        """The outputs with hidden states or attention maps, asked anew for every batch: they are too large to be remembered."""
        began = time.perf_counter()
        eager = eager_attention(self.model.module) if "attentions" in needs else nullcontext()
        with torch.no_grad(), eager, computing(self.device, self.precision):
            found = look(self.model.family, self.model.module, {k: v for k, v in batch.items() if k not in BESIDE_INPUTS}, needs)
        self.batches_asked += len(batch["index"])
        self.seconds += time.perf_counter() - began
        return found

    def _forward(self, batch: Batch) -> Outputs:
        with computing(self.device, self.precision):
            return self.model.family.forward(self.model.module, batch)

    def _ask(self, tower: str, batch: Batch, keys: list[bytes]) -> torch.Tensor:
        """Rows of one tower, (N, D) on the CPU, from the store where it knows them, else from the model.

        Args:
            keys: N, of the store's rows; empty where there is no store.
        """
        tally, size = self._tallies[tower], len(next(iter(batch.values())))
        found = torch.empty(size, self.sizes[tower])
        known = torch.zeros(size, dtype=torch.bool)
        if tally.store is not None:
            there, rows = tally.store.get(keys)
            known = torch.from_numpy(there)
            found[known] = torch.from_numpy(rows)
            tally.from_disk += int(known.sum())
        unknown = ~known
        if unknown.any():
            began = time.perf_counter()
            chosen = {name: values[unknown.to(values.device)] for name, values in batch.items()}
            found[unknown] = self._forward(chosen).embeds[tower].float().cpu()
            tally.asked += int(unknown.sum())
            tally.seconds += time.perf_counter() - began
            tally.keep([key for key, new in zip(keys, unknown.tolist(), strict=False) if new], found[unknown].numpy())
        return found

    def _look(self, tower: str, batch: Batch) -> torch.Tensor:
        media, index = {name: batch[name] for name in self._media if name in batch}, batch["index"].cpu()
        slots = index * self.variants + batch["variant"].cpu() if "variant" in batch else index
        tally = self._tallies[tower]
        tally.looked += len(slots)
        if self._seen is None:
            return self._ask(tower, media, self._keys(media, tally)).to(self.device)
        unknown = ~self._known[slots]
        if unknown.any():
            chosen = {name: values[unknown.to(values.device)] for name, values in media.items()}
            self._seen[slots[unknown]] = self._ask(tower, chosen, self._keys(chosen, tally))
            self._known[slots[unknown]] = True
        return self._seen[slots].to(self.device)

    def _text(self, batch: Batch) -> torch.Tensor:
        ids, mask, tally = batch["input_ids"], batch["attention_mask"], self._tallies["text"]
        kept = [row[here.bool()] for row, here in zip(ids.cpu(), mask.cpu(), strict=True)]
        keys = [row.numpy().tobytes() for row in kept]
        tally.looked += len(keys)
        unknown = [i for i, key in enumerate(keys) if key not in self._texts]
        if unknown:
            hashes = [row_key(keys[i]) for i in unknown]
            found = self._ask("text", {"input_ids": ids[unknown], "attention_mask": mask[unknown]}, hashes).to(self.device)
            self._texts |= {keys[i]: row for i, row in zip(unknown, found, strict=True)}
        return torch.stack([self._texts[key] for key in keys])

    def _keys(self, media: Batch, tally: _Tally) -> list[bytes]:
        """For each example a hash of all that the model is given of it; empty where nothing is stored."""
        if tally.store is None:
            return []
        arrays = {name: values.cpu().contiguous().numpy() for name, values in sorted(media.items())}
        heads = {name: f"{name} {values.dtype} {values.shape[1:]}".encode() for name, values in arrays.items()}
        size = len(next(iter(arrays.values())))
        return [row_key(*(part for name in arrays for part in (heads[name], arrays[name][i].tobytes()))) for i in range(size)]


@dataclass
class _Tally:
    """Of one tower what is stored and what was counted.

    Attributes:
        looked: rows that batches needed.
        asked: rows that went through the model.
        from_disk: rows that were found in the store.
        seconds: spent in the model.
    """

    store: Store | None = None
    looked: int = 0
    asked: int = 0
    from_disk: int = 0
    seconds: float = 0.0
    flushed: float = field(default_factory=time.monotonic)

    @property
    def hits(self) -> int:
        """Rows that batches needed and the model was not asked for."""
        return self.looked - self.asked

    def saved(self) -> float:
        """The seconds that the hits would have taken."""
        stored = self.store.seconds_per_row if self.store is not None else None
        rate = self.seconds / self.asked if self.asked else stored or 0.0
        return rate * self.hits

    def keep(self, keys: list[bytes], rows: np.ndarray) -> None:
        """Puts new rows into the store, and writes it from time to time."""
        if self.store is None:
            return
        self.store.put(keys, rows)
        if self.store.pending >= FLUSH_ROWS or time.monotonic() - self.flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes the store."""
        if self.store is not None:
            if self.asked:
                self.store.seconds_per_row = self.seconds / self.asked
            self.store.flush()
            self.flushed = time.monotonic()


def store_halves(module: nn.Module) -> None:
    """Keeps the weights of linear layers in bfloat16, in place.

    Autocast rounds them to it at every call, so that a model that is only asked under it answers the same to the last bit, in
    less memory. A weight that another layer uses as well (a tied embedding) stays as it is, and so do convolutions, whose dtype
    some models give to what is added behind them.
    """
    for weight, parts in users(module).items():
        rounds = weight.dtype == torch.float32 and all(type(part) is nn.Linear for part in parts)
        # The others are copied: what a file is mapped to stays in memory as long as one weight lies in it.
        weight.data = weight.data.to(torch.bfloat16) if rounds else weight.data.clone()


def identity(model: CompressedModel, how: str) -> str:
    """A hash of everything that an embedding depends on beside its input: weights, config, code and how it is computed."""
    found = hashlib.sha256()
    versions = [mmcompress.__version__, torch.__version__, transformers.__version__]
    config = _told(model.module.config.to_dict())
    found.update(json.dumps([how, *versions, model.family.name, config], sort_keys=True, default=str).encode())
    for name, values in sorted(model.module.state_dict().items()):
        found.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        found.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


def _told(config: Any) -> Any:
    """A config without what says where and by what it was written."""
    if not isinstance(config, dict):
        return config
    return {key: _told(value) for key, value in config.items() if key not in NOT_TOLD}


def find_teacher(
    name: str, student: CompressedModel, context: Context, examples: int, variants: int = 1, store_bytes: int = 0
) -> Teacher:
    """The teacher that a recipe names, checked against the student.

    Args:
        name: ``baseline``, a hub id or a folder.
        variants: see `Teacher`.
        store_bytes: see `Teacher`.

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
    return Teacher(model, examples, variants, store_bytes)


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
