"""What a pass is: fields that are the recipe's keys, and ``apply``. Importable without torch.

A pass gets a model and returns another one; the one it was given stays as it was. Modules that need torch are imported
inside ``apply``, because a recipe with a wrong sixth pass must be refused in a second, not after loading torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from mmcompress.context import Context
from mmcompress.training.settings import TrainingSettings

if TYPE_CHECKING:
    from mmcompress.families.base import Family
    from mmcompress.model import CompressedModel

Ratio = float | dict[str, float]


class Pass(BaseModel, ABC):
    """One step of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    changes: ClassVar[Literal["weights", "files"]]
    """``weights``: the torch model changes. ``files``: ONNX files are made from it, and it stays as it is."""
    makes_files: ClassVar[bool] = False
    """True when the pass leaves ONNX files; a later pass that changes the weights would make them stale."""
    uses: ClassVar[tuple[str, ...]] = ()
    """The splits of the data that the pass reads: ``train``, ``calibration``."""

    name: str = Field(alias="pass", description="The pass's name; `mmcompress list passes` shows all.")

    @abstractmethod
    def run(self, model: CompressedModel, context: Context) -> tuple[CompressedModel, dict[str, Any]]:
        """Applies the pass to a copy of the model.

        Returns:
            The new model, and facts for the history: plain JSON data that is the same in every repetition.
        """

    def apply(
        self,
        model: CompressedModel,
        data: Any = None,
        *,
        context: Context | None = None,
    ) -> CompressedModel:
        """Applies the pass and writes it into the model's history.

        Args:
            model: stays as it is, unless the context says that it may be consumed.
            data: training examples where no context is given: anything `mmcompress.data.as_examples` takes, such as a
                `datasets.Dataset` with ``image`` and ``label`` or ``text`` columns.
            context: what a run gives its passes; made from ``data`` when left out.
        """
        if context is None:
            context = make_context(data, model.family.abilities)
        history, files = list(model.history), model.onnx
        new, result = self.run(model, context)
        settings = self.model_dump(mode="json", by_alias=True, exclude={"name"})
        new.history = [*history, {"pass": self.name, "settings": settings, "result": result}]
        if self.changes == "weights" and new.onnx == files:
            new.onnx = None  # files of the old weights
        return new

    def trains(self) -> bool:
        """Whether the pass trains, by itself or in between: then all processes of a data-parallel run apply it together."""
        return any(isinstance(part, TrainingSettings) for part in (self, *dict(self).values()))

    def weight_bytes(self) -> float | None:
        """Bytes of one weight in the files that the pass leaves, scales aside; None where it leaves that as it is."""
        return None

    def check_against(self, family: Family, sizes: Mapping[str, Mapping[str, int]]) -> list[str]:
        """What is wrong with the settings for a model of this family and these sizes, a sentence each; no weights are needed."""
        return []

    def replacement(self) -> str | None:
        """The name of the model that takes the place of the one that the pass is given; mostly there is none."""
        return None

    def plan_for(self, family: Family, sizes: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
        """The towers' sizes after the pass, where they depend on the family; `check_against` found nothing wrong."""
        return self.plan(sizes)

    def plan(self, sizes: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
        """The towers' sizes after the pass."""
        return {tower: dict(axes) for tower, axes in sizes.items()}

    def settled(self, family: Family, config: Any) -> tuple[Pass, str]:
        """The pass as a plan without weights may take it, and a sentence on what was assumed where a run would measure.

        Args:
            config: of the model as it comes into the pass.
        """
        return self, ""


def make_context(data: Any, abilities: frozenset[str]) -> Context:
    """A context for a pass that is called from Python with nothing but data, on a model of these abilities."""
    if data is None:
        return Context()
    from mmcompress.data.examples import as_examples  # loads `datasets`, which recipe checks do without
    from mmcompress.tasks._guess import guess_task

    examples = as_examples(data)
    return Context(task=guess_task(examples, abilities), train=examples)
