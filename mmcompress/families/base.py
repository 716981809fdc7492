"""What a model family tells the rest of mmcompress.

Shapes: B examples, D embedding width, S sequence length, H hidden width of a tower, T tokens of an answer, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

if TYPE_CHECKING:
    from mmcompress.processor import Processor
    from mmcompress.runtimes.base import Predict

Batch = Mapping[str, torch.Tensor]
Arrays = Mapping[str, np.ndarray]

BESIDE_INPUTS = frozenset({"target", "index", "variant"})
"""What training batches hold beside what a model is given."""

NEW_TOKENS = 16
"""Tokens of the answer whose making is timed and counted for families that write text."""


@dataclass(frozen=True)
class Component:
    """A part of the model that runs by itself: one ONNX file, one entry of a latency table.

    Attributes:
        name: the name that ONNX clients expect, without suffix: ``vision_model``.
        tower: the tower it belongs to: ``vision``.
        module: takes ``inputs`` by position and returns a tuple in the order of ``outputs``.
        dynamic_axes: for each input and output, its dynamic axes by number, with their names.
        decoder: whether it is called once a token, with a cache. Quantizers give it ranges at run time.
        cache: for each input that holds keys or values of past tokens its heads and their size, so that an empty one, of shape
            (B, heads, 0, size), can be made.
    """

    name: str
    tower: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic_axes: Mapping[str, Mapping[int, str]]
    decoder: bool = False
    cache: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Combined:
    """How the two components of a dual encoder make up the one file that clients open as ``model``.

    Attributes:
        media: the component that sees or hears.
        text: the component that reads.
        kind: what is compared with texts, ``image`` or ``audio``: the outputs are called after it.
        scale: the factor on cosine similarities of each of the media with the texts (already exponentiated).
        text_scale: the factor on those of each text with the media; the same but for CLAP.
        bias: what is added to scaled similarities, or None.
    """

    media: str
    text: str
    kind: str
    scale: float
    text_scale: float
    bias: float | None = None


@dataclass(frozen=True)
class Call:
    """One run of a component, or several alike, on the way to one batch of answers.

    Attributes:
        component: its name.
        inputs: random ones of the right shape.
        times: how often it is run with such inputs.
    """

    component: str
    inputs: Mapping[str, torch.Tensor]
    times: int = 1


@dataclass(frozen=True)
class Coupled:
    """A weight that is cut along with a group's units, where a family spells out what hangs together.

    Attributes:
        module: a Linear, or another module with a ``weight`` (and perhaps a ``bias``).
        dim: 0 where the units are its outputs (rows), 1 where they are its inputs (columns).
        block: its channels for each unit.
    """

    module: nn.Module
    dim: int
    block: int


@dataclass(frozen=True)
class UnitGroup:
    """A set of units of one kind in one place that can be cut one by one (or in blocks), such as one layer's FFN neurons.

    Attributes:
        tower: the tower it lies in.
        axis: ``ffn``, ``heads`` or ``width``.
        name: the dotted name of the root module, for messages and custom histories.
        root: the module whose output channels are the units; Torch-Pruning finds what is coupled to it.
        size: how many output channels the root has.
        block: channels that stand or fall together (a head's size), 1 for single neurons.
        also: further modules whose output channels are cut at the same indices (query first, then key).
        head_size: where the module remembers the size of a head, for ``heads``: an object and its attribute.
        explicit: all weights that are cut, ``root``'s among them, where Torch-Pruning's graph cannot follow (grouped queries).
            Left empty, the graph finds them.
        strided: whether a unit's channels lie ``size / block`` apart (one of every head) and not side by side.
    """

    tower: str
    axis: str
    name: str
    root: nn.Module
    size: int
    block: int = 1
    also: tuple[nn.Module, ...] = ()
    head_size: tuple[nn.Module, str] | None = None
    explicit: tuple[Coupled, ...] = ()
    strided: bool = False

    @property
    def units(self) -> int:
        """U: how many units there are."""
        return self.size // self.block

    def channels(self, unit: int) -> range:
        """The root's output channels that are one unit."""
        return range(unit, self.size, self.units) if self.strided else range(unit * self.block, (unit + 1) * self.block)

    def unit_of(self, channels: torch.Tensor) -> torch.Tensor:
        """The units that channels belong to, of the same shape."""
        return channels % self.units if self.strided else channels // self.block


@dataclass
class Outputs:
    """What a training step or a distillation loss sees of one forward pass.

    Attributes:
        embeds: for each tower the projected, *not* normalised embedding, shape (B, D); empty where the family gives none.
        logit_scale: the factor on cosine similarities (already exponentiated), shape ().
        hidden: for each tower the hidden states after each layer, each (B, S, H); empty unless asked for.
        logits: of the tokens that answer, (B, T, V), ``logits[:, t]`` for ``labels[:, t]``; or of classes, (B, C).
        logit_bias: what is added to scaled similarities, shape (); a model that has one was trained pair by pair (SigLIP).
        attentions: for each tower its layers' maps over itself, each (B, heads, S, S); empty unless a loss needs them.
        masked: for the tower that sees or hears the embedding of masked media, (B, D); empty unless a loss needs it.
        masks: for each tower with padding which tokens are real, (B, S); set by the objective.
    """

    embeds: dict[str, torch.Tensor] = field(default_factory=dict)
    logit_scale: torch.Tensor = field(default_factory=lambda: torch.ones(()))
    hidden: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    logits: torch.Tensor | None = None
    logit_bias: torch.Tensor | None = None
    attentions: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    masked: dict[str, torch.Tensor] = field(default_factory=dict)
    masks: dict[str, torch.Tensor] = field(default_factory=dict)


class Family(ABC):
    """A model family. Stateless: every method is given the module it is asked about."""

    name: str
    model_types: tuple[str, ...]
    towers: tuple[str, ...]
    axes: Mapping[str, str]
    """For each axis a line that says what is cut and which config keys follow."""
    stock_axes: tuple[str, ...]
    """The axes whose result stock transformers reloads when the cut is the same in every layer of a tower."""
    abilities: frozenset[str]
    """What tasks may ask for: ``image`` or ``audio`` (what it looks at or listens to), ``embeddings``, ``captions``,
    ``transcripts``, ``answers`` (to questions), ``matching`` (whether a text fits)."""
    media: Mapping[str, tuple[str, ...]]
    """For each kind of media, ``image`` or ``audio``, the tensors that one of them becomes."""
    media_shapes_vary: bool = False
    """Whether two pictures or recordings can become tensors of different shapes."""
    padding: Literal["longest", "max_length"] = "longest"
    """How a batch of texts is padded."""
    reads_end: bool = True
    """Whether the end-of-text token that the config names matters to the model."""

    def of(self, config: PretrainedConfig) -> Self:
        """The variant of the family that handles a config; the family itself where there is but one.

        Raises:
            ModelError: none does.
        """
        return self

    def text_limit(self, config: PretrainedConfig) -> int | None:
        """How many tokens of a text the model has positions for; None where there is no limit."""
        return getattr(config.get_text_config(), "max_position_embeddings", None)

    def tower_axes(self, tower: str) -> tuple[str, ...]:
        """The axes along which a tower can be cut."""
        return tuple(self.axes)

    def drop_layers(self, module: PreTrainedModel, tower: str, keep: Sequence[int]) -> None:
        """Leaves only the layers with these numbers in a tower's stack, in place; what counts layers elsewhere follows."""
        layers = self.layers(module, tower)
        for i in reversed(range(len(layers))):
            if i not in keep:
                del layers[i]

    def cut_together(self, axis: str) -> tuple[str, ...]:
        """The towers that share the size that an axis cuts, so that all of them are cut alike or none; mostly none."""
        return ()

    @abstractmethod
    def model_class(self) -> type[PreTrainedModel]:
        """The stock class that the folder of a compressed model must load with."""

    @abstractmethod
    def tower_modules(self, module: PreTrainedModel) -> dict[str, list[nn.Module]]:
        """For each tower the modules that belong to it; every parameter is in at most one tower."""

    @abstractmethod
    def layers(self, module: PreTrainedModel, tower: str) -> nn.ModuleList:
        """The tower's stack of layers, which depth pruning shortens."""

    @abstractmethod
    def unit_groups(self, module: PreTrainedModel, tower: str, axis: str) -> list[UnitGroup]:
        """The groups of units that an axis cuts in a tower, in the order of the layers."""

    def tracing(self, module: PreTrainedModel, tower: str, batch: Batch) -> tuple[nn.Module, Any, list[nn.Parameter]]:
        """For Torch-Pruning's graph: a module to trace, its example inputs, and its unwrapped parameters.

        Only asked for towers with groups that leave ``explicit`` empty.
        """
        raise NotImplementedError(f"{self.name}: groups of units without `explicit` need tracing, which the family does not have")

    @abstractmethod
    def shrunk_config(self, module: PreTrainedModel) -> PretrainedConfig | None:
        """The stock config that describes the module as it is now cut, or None where no stock config can."""

    def settle(self, before: PreTrainedModel, after: PreTrainedModel) -> None:
        """Mends what speaks of the old sizes besides weights and config, such as generation settings; mostly nothing does.

        Args:
            before: the module as it was cut, with the config that it had before.
            after: the fresh one; changed in place.
        """
        return

    @abstractmethod
    def components(self, module: PreTrainedModel) -> dict[str, Component]:
        """The parts that run by themselves, by name."""

    @abstractmethod
    def example_batch(self, config: PretrainedConfig, batch_size: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Random inputs of ``forward``, of the right shape, made from the config alone."""

    def example_inputs(
        self, config: PretrainedConfig, component: Component, batch_size: int, seed: int = 0
    ) -> dict[str, torch.Tensor]:
        """Random inputs of one component. Every axis that is dynamic has a size of at least 2 where ``batch_size`` has.

        A decoder's hold a cache that is not empty.
        """
        batch = self.example_batch(config, batch_size, seed)
        return {name: batch[name] for name in component.inputs}

    def combined(self, module: PreTrainedModel) -> Combined | None:
        """How the components of a dual encoder are put into one file; None for families that are none."""
        if "embeddings" not in self.abilities:
            return None
        with torch.no_grad():
            found = self.forward(module, {})
        scale, bias = float(found.logit_scale), None if found.logit_bias is None else float(found.logit_bias)
        seen = next(tower for tower in self.towers if tower != "text")
        return Combined(f"{seen}_model", "text_model", next(iter(self.media)), scale, scale, bias)

    def calls(self, module: PreTrainedModel, batch_size: int) -> list[Call]:
        """What one batch costs: each component once, or for families that write text, `NEW_TOKENS` tokens of it."""
        parts = self.components(module).values()
        return [Call(part.name, self.example_inputs(module.config, part, batch_size)) for part in parts]

    def walk(self, predict: Predict, batch: Arrays, module: PreTrainedModel) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """Real inputs for the components in the order in which they run; later ones are fed what ``predict`` gave for earlier.

        Components whose inputs the batch does not hold are left out. A decoder comes twice: over the whole text with an empty
        cache, then over one more token with that cache.

        Args:
            predict: what runs the components.
            batch: what ``forward`` takes, as arrays.
            module: the model that ``predict`` runs, or that its files were made from.
        """
        for name, part in self.components(module).items():
            if all(i in batch for i in part.inputs):
                yield name, {i: batch[i] for i in part.inputs}

    @abstractmethod
    def forward(self, module: PreTrainedModel, batch: Batch, *, hidden: bool = False) -> Outputs:
        """One differentiable forward pass over the inputs that the batch holds (a tower without inputs is left out)."""

    def token_masks(self, batch: Batch) -> dict[str, torch.Tensor]:
        """For each tower whose hidden states have padding, which of its tokens are real, (B, S)."""
        return {"text": batch["attention_mask"]} if "text" in self.towers and "attention_mask" in batch else {}

    @abstractmethod
    def config_sizes(self, config: PretrainedConfig) -> dict[str, dict[str, int]]:
        """For each tower its sizes by axis (``ffn``, ``depth``, ``width``, ``heads``), read from a config alone.

        Only axes that the tower can be cut along, but ``heads`` always beside ``width``.
        """

    @abstractmethod
    def resized_config(self, config: PretrainedConfig, sizes: Mapping[str, Mapping[str, int]]) -> PretrainedConfig:
        """A copy of a config with other sizes, as ``config_sizes`` gives them."""

    # For families that read pictures or recordings in a way of their own.

    def prepare_media(self, processor: Processor, kind: str, items: list[Any]) -> list[dict[str, torch.Tensor]]:
        """Pictures (PIL, RGB) or recordings (`data.audio.Audio`) to the model's tensors, for each one a dict without batch axis.

        Raises:
            ValueError: the stock processor refuses one of them.
        """
        return processor.stock_media(kind, items)

    # For families that write text, choose among answers, or judge pairs: those whose abilities say so.

    def text_batch(
        self,
        processor: Processor,
        media: Sequence[Mapping[str, torch.Tensor]],
        prompts: Sequence[str] | None,
        answers: Sequence[str] | Sequence[Mapping[str, float]],
    ) -> dict[str, torch.Tensor]:
        """What joins the media in a training batch: the texts that ``forward`` reads, and ``labels``.

        Args:
            media: what ``prepare_media`` made of each example.
            prompts: a question for each example, or None.
            answers: a right answer for each example, or several with their weights, 0 to 1.

        Returns:
            Among others ``labels``: (B, T) token numbers with -100 where no loss falls, (B,) classes, or (B, C) soft targets.
        """
        raise NotImplementedError(f"{self.name} writes no text")

    def respond(
        self, predict: Predict, processor: Processor, media: Arrays, prompts: Sequence[str] | None, max_new_tokens: int
    ) -> list[str]:
        """The model's answers, through its components alone, so that every runtime is scored by the same code. Greedy.

        Args:
            media: (B, ...) each.
            prompts: a question for each example, or None.
            max_new_tokens: where an answer is cut off.
        """
        raise NotImplementedError(f"{self.name} writes no text")

    def fixed_answers(self, processor: Processor) -> frozenset[str] | None:
        """The answers that a classifier chooses among, as `data.answers.normalise` writes them; None where it writes them."""
        return None

    def match(self, predict: Predict, processor: Processor, media: Arrays, texts: Sequence[str]) -> np.ndarray:
        """How probable it is that text i fits media i, (B,), 0 to 1."""
        raise NotImplementedError(f"{self.name} does not judge pairs")


def without_weights(family: Family, config: PretrainedConfig) -> PreTrainedModel:
    """The module that a config describes, as shapes only: on the meta device, with attention written out."""
    config = type(config).from_dict(config.to_dict())
    config._attn_implementation = "eager"
    with torch.device("meta"):
        return family.model_class()(config).eval()


def seen_tower(embeds: Mapping[str, torch.Tensor]) -> str:
    """The tower of a dual encoder that is not the text's: ``vision`` or ``audio``."""
    return next(tower for tower in embeds if tower != "text")


def tower_parameters(family: Family, module: PreTrainedModel) -> dict[str, list[nn.Parameter]]:
    """Each tower's parameters, and under ``shared`` those that belong to none (a logit scale)."""
    found: dict[str, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for tower, modules in family.tower_modules(module).items():
        found[tower] = [p for m in modules for p in m.parameters() if id(p) not in seen]
        seen.update(id(p) for p in found[tower])
    rest = [p for p in module.parameters() if id(p) not in seen]
    if rest:
        found["shared"] = rest
    return found


def count(parameters: Sequence[nn.Parameter]) -> int:
    """How many numbers the parameters hold."""
    return sum(p.numel() for p in parameters)
