"""BLIP: a vision transformer and BERT-like text towers that look at its states (Li et al. 2022, arXiv 2201.12086).

Three models, told apart by ``architectures`` in the config: captions, answers to questions, and whether a text fits a picture.

Shapes: B examples, C x H x W a picture, S its states, T tokens of a text, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch
from torch import nn
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    PretrainedConfig,
    PreTrainedModel,
)

from mmcompress.errors import ModelError
from mmcompress.families._blip_parts import (
    DECODER,
    STATES,
    AnswerDecoder,
    CaptionDecoder,
    MatchingComponent,
    TextComponent,
    VisionComponent,
    decoder_component,
    text_component,
)
from mmcompress.families._blip_texts import decoded, prompt_ids, questions_of, teacher_forced, texts_of
from mmcompress.families.base import NEW_TOKENS, Arrays, Batch, Call, Component, Family, Outputs, UnitGroup
from mmcompress.runtimes.decoding import empty_cache, next_cache

if TYPE_CHECKING:
    from mmcompress.processor import Processor
    from mmcompress.runtimes.base import Predict

VISION, QUESTION, MATCHING = "vision_model", "question_encoder", "text_encoder"
EXAMPLE_TOKENS = 6


class Blip(Family):
    """BlipForConditionalGeneration, BlipForQuestionAnswering and BlipForImageTextRetrieval of stock transformers.

    The question encoder and the decoder of BlipForQuestionAnswering share one config, so that both are cut alike. Its width
    and that of the other models' towers are not cut: vision and text widths hang together in cross-attention, and the vision
    tower's query, key and value are one matrix.
    """

    name = "blip"
    model_types = ("blip",)
    axes = MappingProxyType(
        {
            "ffn": "hidden units of the feed-forward layers; sets intermediate_size",
            "depth": "whole layers; sets num_hidden_layers",
        }
    )
    stock_axes = ("ffn", "depth")
    media = MappingProxyType({"image": ("pixel_values",)})
    encoders: Mapping[str, str]
    """For each tower the module with its embeddings and layers, by its dotted name."""
    heads: Mapping[str, tuple[str, ...]]
    """For each tower the modules that belong to it, by name."""

    def of(self, config: PretrainedConfig) -> Self:
        """The variant for the config's ``architectures``.

        Raises:
            ModelError: none of the three is among them, or the text towers have no cross-attention.
        """
        variants = {variant.model_class().__name__: variant for variant in (CAPTIONS, ANSWERS, MATCHES)}
        made = list(getattr(config, "architectures", None) or [])
        for name in made:
            if name in variants:
                if not cast(Any, config).text_config.is_decoder:
                    raise ModelError(
                        "blip: config.json: text_config.is_decoder: found false; without it no text looks at a picture"
                    )
                return cast(Self, variants[name])
        raise ModelError(
            f"blip: config.json: architectures: found {', '.join(made) or 'none'}; allowed: {', '.join(variants)} "
            "(the projections of BlipModel alone have no task here)"
        )

    def _encoder(self, module: PreTrainedModel, tower: str) -> Any:
        """Untyped: nn.Module's attributes are all ``Tensor | Module`` to a type checker."""
        return module.get_submodule(self.encoders[tower])

    def tower_modules(self, module: PreTrainedModel) -> dict[str, list[nn.Module]]:
        return {tower: [module.get_submodule(name) for name in names] for tower, names in self.heads.items()}

    def layers(self, module: PreTrainedModel, tower: str) -> nn.ModuleList:
        stack = self._encoder(module, tower).encoder
        return cast(nn.ModuleList, stack.layers if tower == "vision" else stack.layer)

    def unit_groups(self, module: PreTrainedModel, tower: str, axis: str) -> list[UnitGroup]:
        groups = []
        stack, first = ("encoder.layers", "mlp.fc1") if tower == "vision" else ("encoder.layer", "intermediate.dense")
        for i, layer in enumerate(self.layers(module, tower)):
            root = cast(nn.Linear, layer.get_submodule(first))
            groups.append(UnitGroup(tower, axis, f"{self.encoders[tower]}.{stack}.{i}.{first}", root, root.out_features))
        return groups

    def tracing(self, module: PreTrainedModel, tower: str, batch: Batch) -> tuple[nn.Module, Any, list[nn.Parameter]]:
        encoder = self._encoder(module, tower)
        if tower == "vision":
            unwrapped = [encoder.embeddings.class_embedding, encoder.embeddings.position_embedding]
            return VisionComponent(encoder), (batch["pixel_values"],), unwrapped
        # A decoder is traced without its cache, as an encoder: the weights hang together in the same way.
        inputs = _text_inputs(module.config, len(batch["input_ids"]), 0)
        return TextComponent(encoder), tuple(inputs.values()), []

    def shrunk_config(self, module: PreTrainedModel) -> PretrainedConfig | None:
        sizes: dict[str, dict[str, int]] = {}
        for tower in self.towers:
            ffn = {group.size for group in self.unit_groups(module, tower, "ffn")}
            if len(ffn) > 1:
                return None
            sizes[tower] = {"ffn": ffn.pop(), "depth": len(self.layers(module, tower))}
        if sizes.get("question", sizes["text"]) != sizes["text"]:
            return None
        return self.resized_config(module.config, sizes)

    def config_sizes(self, config: PretrainedConfig) -> dict[str, dict[str, int]]:
        subs = {tower: _sub_config(config, tower) for tower in self.towers}
        return {tower: {"ffn": c.intermediate_size, "depth": c.num_hidden_layers} for tower, c in subs.items()}

    def resized_config(self, config: PretrainedConfig, sizes: Mapping[str, Mapping[str, int]]) -> PretrainedConfig:
        if "question" in sizes and "text" in sizes and dict(sizes["question"]) != dict(sizes["text"]):
            raise ModelError("blip: the question and text towers share one config; cut both alike")
        new = cast(Any, type(config)).from_dict(config.to_dict())
        for tower, axes in sizes.items():
            sub = _sub_config(new, tower)
            sub.intermediate_size, sub.num_hidden_layers = axes["ffn"], axes["depth"]
        return cast(PretrainedConfig, new)

    def components(self, module: PreTrainedModel) -> dict[str, Component]:
        axes = {"pixel_values": {0: "batch_size"}, "last_hidden_state": {0: "batch_size"}}
        part = VisionComponent(module.get_submodule("vision_model"))
        vision = Component(VISION, "vision", part, ("pixel_values",), ("last_hidden_state",), axes)
        return {part.name: part for part in (vision, *self._text_components(cast(Any, module)))}

    @abstractmethod
    def _text_components(self, module: Any) -> list[Component]:
        """All components but the vision tower, in the order in which they run."""

    def example_batch(self, config: PretrainedConfig, batch_size: int, seed: int = 0) -> dict[str, torch.Tensor]:
        vision = cast(Any, config).vision_config
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn((batch_size, 3, vision.image_size, vision.image_size), generator=generator)
        tokens = _text_inputs(config, batch_size, seed)
        return {"pixel_values": pixels, **{name: values for name, values in tokens.items() if name != STATES}}

    def example_inputs(
        self, config: PretrainedConfig, component: Component, batch_size: int, seed: int = 0
    ) -> dict[str, torch.Tensor]:
        if component.name == VISION:
            return {"pixel_values": self.example_batch(config, batch_size, seed)["pixel_values"]}
        if not component.decoder:
            return _text_inputs(config, batch_size, seed)
        return self._decoder_inputs(config, component, batch_size, (3, 4, 7, 5), seed)

    def _decoder_inputs(
        self, config: PretrainedConfig, part: Component, batch_size: int, sizes: tuple[int, int, int, int], seed: int
    ) -> dict[str, torch.Tensor]:
        """Random inputs of the decoder; ``sizes``: new tokens, cached ones, states, and how many of them are cached."""
        generator = torch.Generator().manual_seed(seed)
        new, before, states, cached = sizes
        text = cast(Any, config).text_config
        found = {"input_ids": torch.randint(0, text.vocab_size, (batch_size, new), generator=generator)}
        if "encoder_attention_mask" in part.inputs:
            found["encoder_attention_mask"] = torch.ones((batch_size, states), dtype=torch.int64)
        found[STATES] = torch.randn((batch_size, states, text.encoder_hidden_size), generator=generator)
        for name, (heads, size) in part.cache.items():
            length = before if ".decoder." in name else cached
            found[name] = torch.randn((batch_size, heads, length, size), generator=generator)
        return found

    def calls(self, module: PreTrainedModel, batch_size: int) -> list[Call]:
        found = []
        for part in self.components(module).values():
            if not part.decoder:
                found.append(Call(part.name, self.example_inputs(module.config, part, batch_size)))
                continue
            states = EXAMPLE_TOKENS if "encoder_attention_mask" in part.inputs else _picture_states(module.config)
            for new, before, cached, times in ((1, 0, 0, 1), (1, NEW_TOKENS // 2, states, NEW_TOKENS - 1)):
                inputs = self._decoder_inputs(module.config, part, batch_size, (new, before, states, cached), 0)
                found.append(Call(part.name, inputs, times))
        return found

    def walk(self, predict: Predict, batch: Arrays, module: PreTrainedModel) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        seen = {"pixel_values": batch["pixel_values"]}
        yield VISION, seen
        inputs = {STATES: predict(VISION, seen)["last_hidden_state"], "input_ids": batch["input_ids"]}
        parts = self.components(module)
        for part in parts.values():
            if part.name in (QUESTION, MATCHING):
                read = {"attention_mask": batch["attention_mask"], **inputs}
                yield part.name, {name: read[name] for name in part.inputs}
                if part.name == QUESTION:
                    inputs = {STATES: predict(QUESTION, read)["last_hidden_state"], "input_ids": batch["decoder_input_ids"]}
                    inputs["encoder_attention_mask"] = batch["attention_mask"]
            elif part.decoder:
                first = {**inputs, **empty_cache(predict, DECODER, len(inputs["input_ids"]))}
                yield DECODER, {name: first[name] for name in part.inputs}
                found = predict(DECODER, first)
                # Right padding does no harm before the cache: what is compared and calibrated is the same arithmetic.
                after = {**inputs, "input_ids": found["logits"][:, -1:].argmax(axis=-1), **next_cache(found)}
                yield DECODER, {name: after[name] for name in part.inputs}

    def forward(self, module: PreTrainedModel, batch: Batch, *, hidden: bool = False) -> Outputs:
        seen = cast(Any, module).vision_model(pixel_values=batch["pixel_values"], output_hidden_states=hidden)
        outputs = Outputs(hidden={"vision": tuple(seen.hidden_states)} if hidden else {})
        if "input_ids" in batch:
            self._read(cast(Any, module), seen.last_hidden_state, batch, outputs, hidden)
        return outputs

    @abstractmethod
    def _read(self, module: Any, states: torch.Tensor, batch: Batch, outputs: Outputs, hidden: bool) -> None:
        """The text towers' share of ``forward``: adds their hidden states and the logits."""


class BlipCaptions(Blip):
    """BLIP that describes pictures: BlipForConditionalGeneration."""

    towers = ("vision", "text")
    abilities = frozenset({"image", "captions"})
    encoders = MappingProxyType({"vision": "vision_model", "text": "text_decoder.bert"})
    heads = MappingProxyType({"vision": ("vision_model",), "text": ("text_decoder",)})

    def model_class(self) -> type[PreTrainedModel]:
        return cast(type[PreTrainedModel], BlipForConditionalGeneration)

    def _text_components(self, module: Any) -> list[Component]:
        return [decoder_component(module, CaptionDecoder(module.text_decoder), ("input_ids", STATES))]

    def _read(self, module: Any, states: torch.Tensor, batch: Batch, outputs: Outputs, hidden: bool) -> None:
        read = module.text_decoder(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            encoder_hidden_states=states,
            use_cache=False,
            output_hidden_states=hidden,
        )
        outputs.logits = read.logits
        if hidden:
            outputs.hidden["text"] = tuple(read.hidden_states)

    def text_batch(
        self,
        processor: Processor,
        media: Sequence[Mapping[str, torch.Tensor]],
        prompts: Sequence[str] | None,
        answers: Sequence[str] | Sequence[Mapping[str, float]],
    ) -> dict[str, torch.Tensor]:
        """The decoder reads the prompt and the caption; a loss falls on the caption and its end (Li et al.'s ``blip.py``)."""
        ids, mask, labels = teacher_forced(processor, prompts, texts_of(answers))
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def respond(
        self, predict: Predict, processor: Processor, media: Arrays, prompts: Sequence[str] | None, max_new_tokens: int
    ) -> list[str]:
        """Captions without their prompts, which stock ``generate`` repeats before them."""
        states = predict(VISION, {"pixel_values": media["pixel_values"]})["last_hidden_state"]
        starts = prompt_ids(processor, prompts, len(states))
        found = [""] * len(states)
        # Prompts of one length at a time: the decoder knows no padding before its first token.
        for length in sorted({len(start) for start in starts}):
            rows = [i for i, start in enumerate(starts) if len(start) == length]
            ids = np.array([starts[i] for i in rows], dtype=np.int64)
            texts = decoded(predict, processor, ids, {STATES: states[rows]}, max_new_tokens)
            for i, text in zip(rows, texts, strict=True):
                found[i] = text
        return found


class BlipAnswers(Blip):
    """BLIP that answers questions about pictures: BlipForQuestionAnswering."""

    towers = ("vision", "question", "text")
    abilities = frozenset({"image", "answers"})
    encoders = MappingProxyType({"vision": "vision_model", "question": "text_encoder", "text": "text_decoder.bert"})
    heads = MappingProxyType({"vision": ("vision_model",), "question": ("text_encoder",), "text": ("text_decoder",)})

    def cut_together(self, axis: str) -> tuple[str, ...]:
        return ("question", "text")

    def model_class(self) -> type[PreTrainedModel]:
        return cast(type[PreTrainedModel], BlipForQuestionAnswering)

    def _text_components(self, module: Any) -> list[Component]:
        reads = ("input_ids", "encoder_attention_mask", STATES)
        return [
            text_component(QUESTION, "question", TextComponent(module.text_encoder), "last_hidden_state"),
            decoder_component(module, AnswerDecoder(module.text_decoder), reads),
        ]

    def example_batch(self, config: PretrainedConfig, batch_size: int, seed: int = 0) -> dict[str, torch.Tensor]:
        found = super().example_batch(config, batch_size, seed)
        ids = found["input_ids"].flip(1)[:, : EXAMPLE_TOKENS - 2].contiguous()
        return {**found, "decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}

    def _read(self, module: Any, states: torch.Tensor, batch: Batch, outputs: Outputs, hidden: bool) -> None:
        asked = module.text_encoder(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            encoder_hidden_states=states,
            output_hidden_states=hidden,
        )
        answered = module.text_decoder(
            input_ids=batch["decoder_input_ids"],
            attention_mask=batch["decoder_attention_mask"],
            encoder_hidden_states=asked.last_hidden_state,
            encoder_attention_mask=batch["attention_mask"],
            use_cache=False,
            output_hidden_states=hidden,
        )
        outputs.logits = answered.logits
        if hidden:
            outputs.hidden |= {"question": tuple(asked.hidden_states), "text": tuple(answered.hidden_states)}

    def token_masks(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"question": batch["attention_mask"], "text": batch["decoder_attention_mask"]}

    def text_batch(
        self,
        processor: Processor,
        media: Sequence[Mapping[str, torch.Tensor]],
        prompts: Sequence[str] | None,
        answers: Sequence[str] | Sequence[Mapping[str, float]],
    ) -> dict[str, torch.Tensor]:
        """The question for its encoder, and the answer for the decoder; of several answers the one of most weight."""
        ids, mask, labels = teacher_forced(processor, None, texts_of(answers))
        questions = processor.tokens(questions_of(prompts))
        return {**questions, "decoder_input_ids": ids, "decoder_attention_mask": mask, "labels": labels}

    def respond(
        self, predict: Predict, processor: Processor, media: Arrays, prompts: Sequence[str] | None, max_new_tokens: int
    ) -> list[str]:
        """Answers that do not depend on what else is in the batch.

        The decoder never looks at a question's padding. Stock ``generate`` does, as it passes on a mask of ones; for questions
        of one length both are the same.
        """
        questions = {name: values.numpy() for name, values in processor.tokens(questions_of(prompts)).items()}
        seen = predict(VISION, {"pixel_values": media["pixel_values"]})["last_hidden_state"]
        states = predict(QUESTION, {**questions, STATES: seen})["last_hidden_state"]
        ids = np.array(prompt_ids(processor, None, len(states)), dtype=np.int64)
        fixed = {STATES: states, "encoder_attention_mask": questions["attention_mask"]}
        return decoded(predict, processor, ids, fixed, max_new_tokens)


class BlipMatches(Blip):
    """BLIP that says whether a text fits a picture: BlipForImageTextRetrieval, with its matching head."""

    towers = ("vision", "text")
    abilities = frozenset({"image", "matching"})
    encoders = MappingProxyType({"vision": "vision_model", "text": "text_encoder"})
    heads = MappingProxyType({"vision": ("vision_model", "vision_proj"), "text": ("text_encoder", "text_proj", "itm_head")})

    def model_class(self) -> type[PreTrainedModel]:
        return cast(type[PreTrainedModel], BlipForImageTextRetrieval)

    def _text_components(self, module: Any) -> list[Component]:
        return [text_component(MATCHING, "text", MatchingComponent(module.text_encoder, module.itm_head), "logits")]

    def _read(self, module: Any, states: torch.Tensor, batch: Batch, outputs: Outputs, hidden: bool) -> None:
        read = module.text_encoder(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            encoder_hidden_states=states,
            output_hidden_states=hidden,
        )
        outputs.logits = module.itm_head(read.last_hidden_state[:, 0])
        if hidden:
            outputs.hidden["text"] = tuple(read.hidden_states)

    def match(self, predict: Predict, processor: Processor, media: Arrays, texts: Sequence[str]) -> np.ndarray:
        tokens = {name: values.numpy() for name, values in processor.tokens(list(texts)).items()}
        states = predict(VISION, {"pixel_values": media["pixel_values"]})["last_hidden_state"]
        logits = predict(MATCHING, {**tokens, STATES: states})["logits"].astype(np.float64)
        chance: np.ndarray = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
        return chance


def _sub_config(config: PretrainedConfig, tower: str) -> Any:
    return cast(Any, config).vision_config if tower == "vision" else cast(Any, config).text_config


def _picture_states(config: PretrainedConfig) -> int:
    vision = cast(Any, config).vision_config
    return int((vision.image_size // vision.patch_size) ** 2 + 1)


def _text_inputs(config: PretrainedConfig, batch_size: int, seed: int) -> dict[str, torch.Tensor]:
    """Random inputs of a text tower that reads all tokens at once."""
    generator = torch.Generator().manual_seed(seed)
    text = cast(Any, config).text_config
    ids = torch.randint(0, text.vocab_size, (batch_size, EXAMPLE_TOKENS), generator=generator)
    states = torch.randn((batch_size, _picture_states(config), text.encoder_hidden_size), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), STATES: states}


CAPTIONS, ANSWERS, MATCHES = BlipCaptions(), BlipAnswers(), BlipMatches()
FAMILY: Family = CAPTIONS
