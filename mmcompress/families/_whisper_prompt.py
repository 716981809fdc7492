"""The tokens that a Whisper decoder starts from, and those that it may not write: what stock `generate` takes from the settings.

After ``WhisperGenerationMixin._retrieve_init_tokens`` of transformers 5.23, without time stamps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PretrainedConfig
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from mmcompress.errors import ModelError, one_of


@dataclass(frozen=True)
class Prompt:
    """Start tokens.

    Attributes:
        tokens: the numbers; the one at ``language_at`` is a place holder.
        language_at: where the language's token goes that the model has to detect; None where none is to be detected.
    """

    tokens: tuple[int, ...]
    language_at: int | None = None


def prompt_of(generation: GenerationConfig, config: PretrainedConfig, language: str | None = None) -> Prompt:
    """What a decoder starts from: start of transcript, language and task (models of many languages), no time stamps.

    Args:
        generation: the model's stock generation settings.
        config: the model's config, where old files have ``forced_decoder_ids``.
        language: such as ``en`` or ``english``; else the settings' own, else detected where the model knows several.

    Raises:
        ModelError: the language is unknown, or the model knows but one.
    """
    found: list[int | None] = [generation.decoder_start_token_id]
    task, language = _own(generation, "task"), language or _own(generation, "language")
    known = _own(generation, "lang_to_id")
    if task is None and language is None:
        found += _forced(_own(generation, "forced_decoder_ids") or _own(config, "forced_decoder_ids") or [])
    detected = language is None and known is not None and (len(found) < 2 or found[1] is None)
    if language is not None or detected:
        found[1:2] = [0 if language is None else _language_token(generation, language)]
    tasks = _own(generation, "task_to_id") or {}
    if task is not None:
        if task not in tasks:
            raise ModelError("generation_config.json: " + one_of("task", str(task), tasks))
        found.append(tasks[task])
    elif language is not None and tasks and not set(tasks.values()) & set(found):
        found.append(tasks["transcribe"])
    plain = _own(generation, "no_timestamps_token_id")
    if plain is not None and found[-1] != plain:
        found.append(plain)
    return Prompt(tuple(token for token in found if token is not None), 1 if detected else None)


def _own(settings: Any, key: str) -> Any:
    """Whisper's own settings: stock classes know none of them, and old files lack some."""
    return getattr(settings, key, None)


def _forced(pairs: Sequence[Sequence[int | None]]) -> list[int | None]:
    """The tokens of ``forced_decoder_ids``, the old way to say language and task: [[1, None], [2, 50359]]."""
    found: list[int | None] = []
    for place, token in pairs:
        if place != len(found) + 1:
            raise ModelError(f"generation_config.json: forced_decoder_ids: places 1, 2, ... in order are needed; found {place}")
        found.append(token)
    return found


def _language_token(generation: GenerationConfig, language: str) -> int:
    known: dict[str, int] | None = _own(generation, "lang_to_id")
    if known is None or _own(generation, "is_multilingual") is False:
        raise ModelError(f"language {language}: this Whisper knows one language (no lang_to_id in generation_config.json)")
    said = language.lower()
    token = said if said in known else f"<|{TO_LANGUAGE_CODE.get(said, said)}|>"
    if token not in known:
        raise ModelError(one_of("language", said, [name.strip("<|>") for name in known]))
    return known[token]


def forbidden(generation: GenerationConfig, vocabulary: int) -> tuple[list[int], list[int]]:
    """The tokens that are never written, and those that are not written first. Numbers outside of the vocabulary mean none."""
    found = [_own(generation, key) or [] for key in ("suppress_tokens", "begin_suppress_tokens")]
    never, not_first = ([token for token in tokens if 0 <= token < vocabulary] for tokens in found)
    return never, not_first


def ends(generation: GenerationConfig) -> list[int]:
    """The tokens that end a transcript."""
    end = generation.eos_token_id
    return list(end) if isinstance(end, list) else [] if end is None else [end]
