"""The recipe keys of ``ratio: auto``: how small the model is to become, and on what that is decided. Importable without torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal["parameters", "flops", "latency_ms", "disk_bytes"]
KINDS: tuple[Kind, ...] = ("parameters", "flops", "latency_ms", "disk_bytes")
FLOAT_BYTES = 4

Limit = Annotated[float, Field(gt=0, allow_inf_nan=False)]
RATIOS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
SHARE = "below 1 a share of the model as it comes into the pass, else"


class Target(BaseModel):
    """What `ratio: auto` is to reach: exactly one limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    parameters: Limit | None = Field(None, description=f"At most so many parameters: {SHARE} a number of them.")
    flops: Limit | None = Field(None, description=f"At most so many FLOPs for one example: {SHARE} a number of them.")
    latency_ms: Limit | None = Field(
        None,
        description=f"At most so long for one example in torch, here and now: {SHARE} milliseconds. Timings differ from run to "
        "run, and the ratios with them.",
    )
    disk_bytes: Limit | None = Field(None, description=f"At most so large as float32: {SHARE} bytes.")
    towers: list[str] | None = Field(
        None, min_length=1, description="Towers that may be cut; all that have the axis if left out."
    )
    ratios: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        list(RATIOS), min_length=1, description="Ratios at which each tower's loss is measured; the largest bounds the cut."
    )
    samples: int = Field(
        512,
        ge=16,
        le=100_000,
        description="Training examples that the loss is measured on, at most half of them; the criterion reads others. 16 to "
        "100000.",
    )

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of {', '.join(KINDS)}; found {', '.join(given) or 'none'}")
        return self

    @property
    def kind(self) -> Kind:
        """What is bounded."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def value(self) -> float:
        """The limit as it is written."""
        return float(getattr(self, self.kind))

    def limit(self, before: float) -> float:
        """The limit in the target's unit.

        Args:
            before: of the model as it comes into the pass.
        """
        return self.value * before if self.value < 1 else self.value

    def amount(self, parameters: float, flops: float) -> float:
        """What counts for the target, of a model of so many parameters and FLOPs; not for latency, which is timed."""
        return flops if self.kind == "flops" else parameters * (FLOAT_BYTES if self.kind == "disk_bytes" else 1)

    def words(self, amount: float) -> str:
        """An amount as a message says it."""
        return f"{amount:.3g} ms" if self.kind == "latency_ms" else f"{amount:,.0f}"
