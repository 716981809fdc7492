"""One step after the other: forward, backward, check, update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmcompress.errors import TrainingError
from mmcompress.families.base import Batch
from mmcompress.model import CompressedModel
from mmcompress.training import parallel
from mmcompress.training.average import Average
from mmcompress.training.forward import Forward
from mmcompress.training.memory import fill_tables
from mmcompress.training.objective import Objective
from mmcompress.training.pieces import Pieces
from mmcompress.training.schedule import parameter_groups, rate_share
from mmcompress.training.settings import TrainingSettings

MOST_LOG_SCALE = math.log(100)
"""CLIP's limit on the logit scale (Radford et al. 2021, section 2.5)."""


@dataclass(frozen=True)
class Plan:
    """What a training is, besides its settings.

    Attributes:
        what: the pass's name, for messages.
        steps: how many there are, if it does not stop early.
        seed: what its random numbers come from.
        span: which part of the learning rate's schedule it is.
    """

    what: str
    steps: int
    seed: int
    device: torch.device
    precision: str
    span: tuple[float, float] = (0.0, 1.0)

    def step_seed(self, step: int) -> int:
        """What this process's dropout draws from in a step: of the step alone, so that a resumed training draws the same."""
        return (self.seed * 1_000_003 + step) * 1009 + parallel.rank()


class Runner:
    """Model, optimiser and schedule; one step at a time.

    Attributes:
        losses: the total loss of each step so far, and in ``parts`` its parts.
        examples: how many were seen.
        average: of the weights, where the settings ask for one.
    """

    def __init__(self, model: CompressedModel, objective: Objective, settings: TrainingSettings, plan: Plan) -> None:
        self.model, self.objective, self.settings, self.plan = model, objective, settings, plan
        model.module.to(plan.device)
        forward = Forward(model.family, model.module, plan.device, plan.precision, objective.needs)
        self.pieces = Pieces(forward, objective, settings.micro_batch)
        groups = parameter_groups(model.module, list(objective.parameters()), settings.weight_decay)
        fused = plan.device.type in ("cpu", "cuda")
        # CLIP's betas and epsilon (Radford et al. 2021, table 19, for ViT).
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=fused)
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        trained = [p for p in model.module.parameters() if p.requires_grad]
        self.average = Average(trained, settings.ema) if settings.ema is not None else None
        scale = getattr(model.module, "logit_scale", None)
        self.log_scale = scale if isinstance(scale, nn.Parameter) else None
        # Some models (SigLIP) come with a higher scale than CLIP's limit: it may stay, but not rise.
        start = self.log_scale.detach().max().item() if self.log_scale is not None else 0.0
        self.most = max(MOST_LOG_SCALE, start)
        self.losses: list[float] = []
        self.parts: list[dict[str, float]] = []
        self.examples = 0

    def step(self, batch: Batch) -> float:
        """Forward, backward, update; returns the loss.

        Raises:
            TrainingError: a part of the loss or a gradient is not finite; the weights are those before the step.
        """
        step = len(self.losses)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * rate_share(step, self.plan.steps, self.settings.warmup, self.plan.span)
        parts = self.pieces(batch, self.plan.step_seed(step), backward=True)
        fill_tables(self.parameters)
        parallel.add_gradients(self.parameters)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        # One look at all numbers: each would wait for the device by itself.
        *values, size = torch.stack([*parts.values(), norm]).tolist()
        said = dict(zip(parts, values, strict=True))
        for name, value in said.items():
            self._check(value, f"the loss {name!r} is", step)
        self._check(size, "the norm of the gradients is", step)
        if self.settings.grad_clip:
            nn.utils.clip_grads_with_norm_(self.parameters, self.settings.grad_clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        parallel.share_seen(self.model.module)
        if self.log_scale is not None:
            self.log_scale.data.clamp_(max=self.most)
        if self.average is not None:
            self.average.update()
        self.examples += len(batch["index"])
        self.losses.append(sum(values))
        self.parts.append(said)
        return self.losses[-1]

    def _check(self, value: float, said: str, step: int) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"{self.plan.what}: step {step + 1} of {self.plan.steps}: {said} {value}; "
                "a lower learning_rate or precision: fp32 may help"
            )

    def facts(self) -> dict[str, Any]:
        """What was done, and the losses: of the first step, and the mean over the last tenth, in all and by part."""
        last = max(1, len(self.losses) // 10)
        tail = self.parts[-last:]
        return {
            "steps": len(self.losses),
            "examples": self.examples,
            "first_loss": round(self.losses[0], 6),
            "final_loss": round(sum(self.losses[-last:]) / last, 6),
            "final_losses": {name: round(sum(part[name] for part in tail) / last, 6) for name in self.parts[0]},
        }
