"""What ``report.json`` says about the data and the model's origin: duplicates between splits, licences, sources."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Split = Literal["train", "calibration", "eval"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Overlap(_Model):
    """What two splits have in common."""

    first: Split
    second: Split
    examples: int = Field(
        description="Rows of `second` that are in `first` too: the same pixels, samples or text; with questions, also the same "
        "question."
    )
    n: int = Field(description="Rows of `second`.")
    reencoded: int = Field(0, description="How many of these examples are stored as other bytes than in `first`.")
    same_media: int = Field(
        0, description="Further rows of `second` whose picture or recording is in `first` with another question."
    )
    first_rows: list[int] = Field(default_factory=list, description="The rows in `first` of the first few, by number from 0.")
    second_rows: list[int] = Field(default_factory=list, description="Their rows in `second`.")
    drawn: bool = Field(False, description="The recipe draws one of the two splits from the other, so that they share by design.")

    @property
    def is_leak(self) -> bool:
        """True where evaluation examples were seen in training or calibration."""
        return self.second == "eval" and self.examples > 0


class Leaks(_Model):
    """Exact duplicates between the splits, looked for before anything was trained."""

    looked: bool = Field(description="False for data that this project makes, which has no overlap by construction.")
    allowed: bool = Field(False, description="The recipe's data.allow_leaks: a run with leaks goes on.")
    what: Literal["picture", "recording", "text"] = "picture"
    pairs: list[Overlap] = Field(default_factory=list)
    repeated: int = Field(0, description="Evaluation rows that stand in the evaluation data before: clusters, no leak.")
    decoded: int = Field(0, description="Pictures or recordings that had to be decoded to be sure.")
    seconds: float = Field(0.0, description="What the search took.")

    @property
    def found(self) -> list[Overlap]:
        """The pairs that make quality overstated."""
        return [pair for pair in self.pairs if pair.is_leak]


UNKNOWN = "unknown"


class Origin(_Model):
    """Where a model or a data set comes from and under what licence; what nobody said is ``unknown``."""

    role: Literal["model", "student", "teacher", "train", "calibration", "eval", "ood"]
    name: str = Field(description="As the recipe names it.")
    hub_id: str | None = Field(None, description="Its id on the Hugging Face hub, where it is known to have one.")
    license: str = Field(UNKNOWN, description="An identifier as the hub has them, or the licence's name.")
    license_link: str | None = None
    license_from: Literal["recipe", "card", "data set", "mmcompress", "unknown"] = Field(
        "unknown", description="Who says so: the recipe, the README.md of the model or data set, the data set's own information."
    )
    source: str = Field(UNKNOWN, description="A URL or a name.")
    examples: int | None = Field(None, description="Of data: how many are used.")
