"""The recipe keys that the training passes share. Importable without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from mmcompress import registry
from mmcompress.errors import one_of
from mmcompress.training.augment_settings import Augment

if TYPE_CHECKING:
    from mmcompress.tasks.base import Task

TASK_LOSS = "task"
"""The key under which ``losses`` weighs the task's own loss."""

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Weights = Mapping[str, float | Mapping[str, float]]
"""For each loss its weight, or one for each tower."""


def counts(weight: float | Mapping[str, float]) -> bool:
    """Whether a loss with this weight is there at all."""
    return any(weight.values()) if isinstance(weight, Mapping) else weight > 0


class EarlyStop(BaseModel):
    """When training ends before its last step: the loss on a hold-out of the training examples stopped falling."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    patience: int = Field(3, ge=1, le=1000, description="How many looks in a row may show no lower loss (1 to 1000).")
    every: float = Field(0.25, gt=0, le=1000, description="Epochs between two looks, above 0; at least one step.")
    holdout: float = Field(
        0.05, gt=0, le=0.5, description="Share of the training examples that is held out, above 0 to 0.5; never of data.eval."
    )


class TrainingSettings(BaseModel):
    """How long, how fast and on what a model is trained. Mixed into the passes, which bring the pydantic config."""

    epochs: float = Field(
        1.0, gt=0, le=10_000, description="Passes over the training examples, above 0; a fraction is a part of one."
    )
    max_steps: int | None = Field(None, ge=1, description="Stop after this many steps, if epochs do not end before.")
    batch_size: int = Field(128, ge=1, le=65_536, description="Examples in a step. Contrastive losses want many.")
    learning_rate: float = Field(1e-4, gt=0, le=1, description="Peak learning rate of AdamW, above 0; falls to 0 along a cosine.")
    weight_decay: float = Field(
        0.05, ge=0, le=1, description="Decoupled weight decay of AdamW; biases, norms and embeddings have none."
    )
    warmup: float = Field(0.05, ge=0, le=0.5, description="Share of the steps over which the learning rate rises, 0 to 0.5.")
    grad_clip: float = Field(1.0, ge=0, description="Largest norm of all gradients together; 0 does not clip.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Of the forward pass; auto takes bf16 where the CPU or GPU multiplies it natively."
    )
    workers: int = Field(
        0,
        ge=0,
        le=64,
        description="Processes that decode media ahead of the training. Media are decoded once where they fit in 1 GB.",
    )
    device: Literal["auto", "cuda", "mps", "cpu"] = Field(
        "auto", description="Where to train; auto takes what the run uses, or the first that is there of cuda, mps, cpu."
    )
    freeze: list[str] = Field(default_factory=list, description="Towers that stay as they are, such as [text].")
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="Examples in a forward pass: less memory, the same gradients. Tasks over embeddings then run each example "
        "forward twice (GradCache), others accumulate. Left out: the whole batch at once.",
    )
    checkpointing: bool = Field(
        False, description="Gradient checkpointing: layers are computed again in the backward pass instead of kept; less memory."
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay a step of an exponential moving average of the weights, such as 0.999, above 0, below 1; the average "
        "is the result. Left out: the last weights are.",
    )
    early_stop: EarlyStop | None = Field(
        None,
        description="Ends the training when the loss on held-out training examples stops falling, and takes the weights of the "
        "best look; such as {patience: 3, every: 0.25, holdout: 0.05}. Left out: all steps are done.",
    )
    augment: Augment | None = Field(
        None,
        description="Changed variants of each example, such as {variants: 8, crop: 0.4, brightness: 0.2}. Left out: examples are "
        "taken as they are.",
    )
    checkpoint_minutes: float = Field(
        5.0,
        ge=0,
        allow_inf_nan=False,
        description="Minutes between two saves of a run's training, from which the same command goes on; 0 saves none.",
    )

    def freeze_mistakes(self, towers: Sequence[str]) -> list[str]:
        """What is wrong with ``freeze`` for a model of these towers, a sentence each."""
        wrong = ["freeze: " + one_of("tower", name, towers) for name in self.freeze if name not in towers]
        if set(towers) <= set(self.freeze):
            wrong.append("freeze: names every tower, so that nothing is left to train")
        return wrong


class PseudoLabels(BaseModel):
    """Which of the teacher's transcripts take the place of the data's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_wer: float = Field(
        10.0,
        ge=0,
        allow_inf_nan=False,
        description="Recordings that the teacher reads with a higher word error rate against the data's transcript, in percent, "
        "are left out.",
    )


class DistillationSettings(TrainingSettings):
    """What a student learns from its teacher."""

    losses: dict[str, Weight | dict[str, Weight]] | None = Field(
        None,
        description="Weight of each loss, 0 or more, or for losses that are sums over towers one for each tower, such as "
        "{feature: {vision: 4, text: 1}}; `mmcompress list losses` shows all. The key `task` weighs the task's own "
        "loss and is 1 where it is left out. Without it the task's usual ones: for tasks over embeddings `task` 1, `affinity` 1, "
        "`feature` 4; for tasks over answers `task` 1, `logit` 0.8.",
    )
    teacher: str = Field(
        "baseline",
        min_length=1,
        description="Whom to learn from: baseline (the model the run began with), a hub id or a model folder.",
    )
    teacher_cache_gb: float = Field(
        10.0,
        ge=0,
        allow_inf_nan=False,
        description="Most gigabytes that teachers' embeddings may take on disk, of all runs together; those not used for longest "
        "are deleted first. 0 stores none. They lie in ~/.cache/mmcompress, or where MMCOMPRESS_CACHE says.",
    )

    @field_validator("losses")
    @classmethod
    def _known(cls, losses: dict[str, float | dict[str, float]] | None) -> dict[str, float | dict[str, float]] | None:
        if losses is None:
            return None
        known = [TASK_LOSS, *registry.names("losses")]
        for name in losses:
            if name not in known:
                raise ValueError(one_of("loss", name, known))
        if isinstance(losses.get(TASK_LOSS), dict):
            raise ValueError("task: the task's own loss is one for all towers; give it one weight")
        if not any(counts(weight) for name, weight in losses.items() if name != TASK_LOSS):
            raise ValueError("no distillation loss has a weight above 0; the pass `finetune` trains on the task's loss alone")
        return {TASK_LOSS: 1.0, **losses}

    def weights(self, task: Task) -> Weights:
        """Each loss's weight for a task."""
        return self.losses if self.losses is not None else task.distillation

    def loss_mistakes(self, towers: Sequence[str]) -> list[str]:
        """What is wrong with weights by tower for a model of these towers, a sentence each; loads the losses, and so torch."""
        from mmcompress.training.losses.base import TowerLoss

        wrong = []
        for name, weight in (self.losses or {}).items():
            if not isinstance(weight, Mapping):
                continue
            if not issubclass(registry.find("losses", name).LOSS, TowerLoss):
                wrong.append(f"losses: {name} is no sum over towers, each pair counts for both; give it one weight")
            wrong += [f"losses: {name}: " + one_of("tower", tower, towers) for tower in weight if tower not in towers]
        return wrong
