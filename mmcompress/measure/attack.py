"""FGSM and PGD on the pixels that a dual encoder sees, by its own gradients, in torch.

The step of FGSM (Goodfellow et al. 2015, arXiv 1412.6572) is along the sign of the loss's gradient, by the whole distance. PGD
(Madry et al. 2018, arXiv 1706.06083) begins at a random point within the distance and takes several smaller steps, each
projected back. Distances are in 255ths of a pixel's range, before the image processor's normalisation.

Shapes: B pictures of a batch, N pictures, M candidate texts, C x H x W a picture, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from mmcompress.data.examples import Examples
from mmcompress.data.prepare import prepared
from mmcompress.measure.paired_drops import Scored
from mmcompress.model import CompressedModel
from mmcompress.processor import Processor
from mmcompress.progress import Reporter
from mmcompress.runtimes.torch_predict import TorchPredict
from mmcompress.tasks._embed import unit_mean_texts
from mmcompress.tasks._retrieval import best_rank
from mmcompress.tasks.base import Task

Method = Literal["fgsm", "pgd"]
METHODS: tuple[Method, ...] = ("fgsm", "pgd")
AT_ONCE = 32
REACH = 2.5
"""PGD's steps together reach this many times the distance (Madry et al. take 2.5 in their code for MNIST and CIFAR)."""
WHITE = 255.0


@dataclass(frozen=True)
class Pixels:
    """What a pixel's range is after normalisation, by channel, (1, C, 1, 1).

    Attributes:
        black: what 0 becomes.
        white: what 255 becomes.
    """

    black: torch.Tensor
    white: torch.Tensor

    def distance(self, eps: float) -> torch.Tensor:
        """``eps`` 255ths of the range, (1, C, 1, 1)."""
        return (self.white - self.black) * (eps / WHITE)


def pixels_of(processor: Processor, channels: int) -> Pixels:
    """Read from the image processor: its rescaling, and the mean and standard deviation that it normalises with."""
    stock = processor.image_processor
    factor = float(stock.rescale_factor) if getattr(stock, "do_rescale", True) else 1.0
    normalises = bool(getattr(stock, "do_normalize", True))
    mean = torch.tensor(stock.image_mean if normalises else [0.0] * channels, dtype=torch.float32).view(1, -1, 1, 1)
    std = torch.tensor(stock.image_std if normalises else [1.0] * channels, dtype=torch.float32).view(1, -1, 1, 1)
    return Pixels(-mean / std, (WHITE * factor - mean) / std)


def why_not(model: CompressedModel, task: Task, examples: Examples) -> str:
    """Why a model cannot be attacked here; empty where it can."""
    family = model.family
    if examples.kind != "image":
        return "attacks are on pixels, and the task has no pictures"
    if "embeddings" not in family.abilities or type(task).candidates is Task.candidates:
        return f"attacks follow the gradient of similarities, which {task.type} does not compare"
    if tuple(family.media["image"]) != ("pixel_values",):
        return f"models of the family {family.name} are given more than pixels ({', '.join(family.media['image'])})"
    return ""


class Attack:
    """One model under attack.

    Attributes:
        right: shape (N, M), which candidates are right for each example.
    """

    def __init__(self, model: CompressedModel, task: Task, examples: Examples, device: str = "cpu") -> None:
        """Embeds the texts.

        Raises:
            ValueError: the task compares no embeddings; see ``why_not``.
        """
        found = task.candidates(examples)
        if found is None:
            raise ValueError(f"{task.type} compares no embeddings")
        texts, self.right = found
        predict = TorchPredict(model, device)
        self.model, self.examples, self.device = model, examples, predict.device
        anchors = unit_mean_texts(predict, model.processor, texts)
        self.anchors = torch.from_numpy(anchors).float().to(self.device)
        with torch.no_grad():
            self.scale = model.family.forward(model.module, {}).logit_scale.float().to(self.device)

    def scored(self, method: Method | None, eps: float, steps: int, seed: int, reporter: Reporter) -> Scored:
        """Whether each picture's nearest candidate is a right one, under attack or (without a method) as it is."""
        kept, values = [], []
        for indices, clean in self._batches(reporter, "clean" if method is None else f"{method} {eps:g}/255"):
            right = torch.from_numpy(self.right[indices]).to(self.device)
            seen = clean if method is None else self._attacked(clean, right, method, eps, steps, [seed, int(indices[0])])
            with torch.no_grad():
                similarity = self._similarity(seen).cpu().numpy()
            kept.append(indices)
            values.append((best_rank(similarity, self.right[indices]) == 0).astype(np.float64))
        return Scored(np.concatenate(values), np.concatenate(kept))

    def _batches(self, reporter: Reporter, what: str) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        blocks = reporter.track(prepared(self.examples, self.model.processor), what, prepared.total(self.examples))
        for indices, media in blocks:
            for start in range(0, len(indices), AT_ONCE):
                part = slice(start, start + AT_ONCE)
                yield indices[part], torch.from_numpy(media["pixel_values"][part]).float().to(self.device)

    def _similarity(self, pixels: torch.Tensor) -> torch.Tensor:
        embeds = self.model.family.forward(self.model.module, {"pixel_values": pixels}).embeds["vision"]
        return F.normalize(embeds.float(), dim=-1) @ self.anchors.T

    def loss(self, pixels: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Minus the logarithm of the probability of all right candidates together, summed over pictures: (B, C, H, W) -> ()."""
        logits = self.scale * self._similarity(pixels)
        return (logits.logsumexp(1) - logits.masked_fill(~right, -torch.inf).logsumexp(1)).sum()

    def _attacked(
        self, clean: torch.Tensor, right: torch.Tensor, method: Method, eps: float, steps: int, seed: list[int]
    ) -> torch.Tensor:
        """(B, C, H, W), no further than ``eps`` from the clean pictures, and within what pixels can be."""
        pixels = pixels_of(self.model.processor, clean.shape[1])
        black, white = pixels.black.to(self.device), pixels.white.to(self.device)
        distance = pixels.distance(eps).to(self.device)

        def inside(values: torch.Tensor) -> torch.Tensor:
            near = torch.maximum(torch.minimum(values, clean + distance), clean - distance)
            return torch.maximum(torch.minimum(near, white), black)

        if method == "fgsm":
            return inside(clean + distance * self._direction(clean, right))
        start = np.random.default_rng(seed).uniform(-1, 1, tuple(clean.shape)).astype(np.float32)
        found = inside(clean + distance * torch.from_numpy(start).to(self.device))
        for _ in range(steps):
            found = inside(found + distance * (REACH / steps) * self._direction(found, right))
        return found

    def _direction(self, pixels: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        asked = pixels.detach().requires_grad_(True)
        return torch.autograd.grad(self.loss(asked, right), asked)[0].sign()
