"""Pretrains the small Whisper model that ships as `bundled:tones-whisper`, on synthetic tone speech, on a CPU.

    python examples/pretrain_tones_whisper.py --out mmcompress/bundled/tones-whisper

Shape legend: N rows of the pool, B batch, F frames of 20 ms, T tokens.
"""

import argparse
import time
from typing import Any

import jiwer
import numpy as np
import torch
import torch.nn.functional as F
from pretrain_parts import options, publish, started
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers import get_cosine_schedule_with_warmup as cosine

from mmcompress.data.tones import LONGEST_SECONDS, RATE, WORDS, Tones

MEL_BINS, HOP = 80, 320
FRAMES = round(LONGEST_SECONDS * RATE / HOP)
MAX_TOKENS = 32
AT_ONCE = 250

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: automatic-speech-recognition
tags: [whisper, synthetic]
---
# tones-whisper

A stock `WhisperForConditionalGeneration` with {parameters:,} parameters, stored in float16 ({megabytes:.1f} MB). It was
trained from scratch on **synthetic** data only: sentences of one to four of {words} made-up words, each word three tones
(`mmcompress/data/tones.py`). It knows these words and nothing else, and it has never heard a voice. It is here so that
tests and the quick start run offline on a CPU.

Made by `python examples/pretrain_tones_whisper.py --rows {rows} --epochs {epochs} --batch {batch} --threads {threads}
--seed {seed}` in {seconds:.0f} seconds (cross-entropy, plus a CTC loss on the encoder through a layer that is then thrown
away; the loudness of the spectrograms was varied and parts of them were hidden). Another CPU or number of threads may give
slightly different weights.

| measured on {test_rows} rows of the test split, whose sentences and speakers are not in the training split | score |
|---|---|
| word error rate, all errors over all words | {wer:.4f} |
| recordings with every word right | {exact:.4f} |

It takes recordings of up to {longest:g} seconds at 16 kHz. Its tokenizer has a token for each word and none for a language
or a task. The scores are those of the float16 weights computed in float32; before rounding to float16 the word error rate
was {wer_before:.4f}.
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word, and those that begin and end a transcript."""
    specials = {"pad_token": "<pad>", "bos_token": "<|startoftranscript|>", "eos_token": "<|endoftext|>", "unk_token": "<unk>"}
    vocabulary = {token: i for i, token in enumerate([*specials.values(), *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, vocabulary[token]) for token in (specials["bos_token"], specials["eos_token"])]
    raw.post_processor = processors.TemplateProcessing(single="<|startoftranscript|> $A <|endoftext|>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=MAX_TOKENS, **specials)


def build_model(tokenizer: PreTrainedTokenizerFast) -> WhisperForConditionalGeneration:
    """A stock Whisper with about 0.7 M parameters and random weights."""
    sides = {"layers": 3, "attention_heads": 4, "ffn_dim": 384}
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sides.items()}
    sizes |= {"decoder_layers": 2, "d_model": 96}
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=MEL_BINS,
        max_source_positions=FRAMES // 2,
        max_target_positions=MAX_TOKENS,
        decoder_start_token_id=tokenizer.bos_token_id,
        init_std=0.1,  # about 1 / sqrt(width); with the default of 0.02 what is heard drowns in the positions
        begin_suppress_tokens=None,
        suppress_tokens=None,
        **sizes,
        **tokens,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config.update(max_length=MAX_TOKENS // 2, decoder_start_token_id=tokenizer.bos_token_id, **tokens)
    return model


def features_of(extractor: WhisperFeatureExtractor, rows: list[dict]) -> torch.Tensor:
    """Log-mel spectrograms, [B, 80, F]."""
    samples = [row["audio"].samples for row in rows]
    return extractor(samples, sampling_rate=RATE, return_tensors="pt").input_features


def render(extractor: WhisperFeatureExtractor, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> tuple:
    """Makes the pool once: spectrograms [N, 80, F] in half precision, tokens [N, T] with padding."""
    data = Tones("train", args.rows, args.seed)
    pool, texts = torch.empty(args.rows, MEL_BINS, FRAMES, dtype=torch.float16), []
    for start in range(0, args.rows, AT_ONCE):
        rows = data[start : start + AT_ONCE]
        pool[start : start + len(rows)] = features_of(extractor, rows).half()
        texts += [row["text"] for row in rows]
    return pool, tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]


def hide(features: torch.Tensor) -> torch.Tensor:
    """Varies the loudness and hides up to 8 mel bins and up to 2 frames of each spectrogram (SpecAugment, Park et al. 2019)."""
    found = features + torch.empty(len(features), 1, 1).uniform_(-0.2, 0.2)
    for axis, most in ((1, 8), (2, 2)):
        size = features.shape[axis]
        start = torch.randint(0, size - most, (len(features), 1))
        width = torch.randint(0, most + 1, (len(features), 1))
        place = torch.arange(size)
        gone = (place >= start) & (place < start + width)
        found = found.masked_fill(gone.unsqueeze(3 - axis), 0.0)
    return found


def train(model: WhisperForConditionalGeneration, pool: torch.Tensor, tokens: torch.Tensor, args: argparse.Namespace) -> float:
    """Trains in place, and returns the seconds that took (without rendering).

    A CTC loss (Graves et al. 2006) on the encoder finds where the words are before the decoder's attention does, and sentences
    of one or two words come first: both shorten the time in which nothing but the sentences' length is learnt.
    """
    ctc = torch.nn.Linear(model.config.d_model, model.config.vocab_size)  # the padding token is the blank
    start, pad, end = time.perf_counter(), model.config.pad_token_id, model.config.eos_token_id
    words = (tokens > end).sum(dim=1)
    epochs = [torch.nonzero(words <= most).squeeze(1) for most in [2] * args.short_epochs + [4] * args.epochs]
    steps = sum(len(rows) // args.batch for rows in epochs)
    decays: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for parameter in [*model.parameters(), *ctc.parameters()]:
        if parameter.requires_grad:
            decays[parameter.ndim > 1].append(parameter)
    groups = [{"params": decays[True], "weight_decay": 0.02}, {"params": decays[False], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    schedule = cosine(optimizer, steps // 20, steps)
    model.train()
    for epoch, pool_rows in enumerate(epochs):
        losses, order = [], pool_rows[torch.randperm(len(pool_rows))]
        for step in range(len(pool_rows) // args.batch):
            rows = order[step * args.batch : (step + 1) * args.batch]
            labels = tokens[rows, 1:].masked_fill(tokens[rows, 1:] == pad, -100)  # the model puts the start token in front
            outputs = model(input_features=hide(pool[rows].float()), labels=labels)
            heard = ctc(outputs.encoder_last_hidden_state).log_softmax(dim=-1).transpose(0, 1)  # [F / 2, B, V]
            frames = torch.full((len(rows),), heard.shape[0])
            loss = outputs.loss + 0.3 * F.ctc_loss(heard, tokens[rows, 1:], frames, words[rows], blank=pad, zero_infinity=True)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(outputs.loss.item())
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    return time.perf_counter() - start


@torch.inference_mode()
def evaluate(
    model: WhisperForConditionalGeneration, extractor: WhisperFeatureExtractor, tokenizer: PreTrainedTokenizerFast, count: int
) -> dict[str, float]:
    """Word error rate and share of right transcripts on the test split, by stock `generate`."""
    model.eval()
    data, said = Tones("test", count), []
    for start in range(0, count, AT_ONCE):
        ids = model.generate(input_features=features_of(extractor, data[start : start + AT_ONCE]))
        said += tokenizer.batch_decode(ids, skip_special_tokens=True)
    wanted = [data.text(i) for i in range(count)]
    return {"wer": jiwer.wer(wanted, said), "exact": float(np.mean([a == b for a, b in zip(wanted, said, strict=True)]))}


def main() -> None:
    """Trains, evaluates, and writes the folder in one move."""
    parser = options(__doc__, rows=8000, batch=16, lr=8e-4)
    parser.add_argument("--short-epochs", type=int, default=2, help="passes over the sentences of one or two words")
    parser.add_argument("--epochs", type=int, default=5, help="passes over all sentences, behind the short ones")
    parser.add_argument("--test-rows", type=int, default=2000)
    args = started(parser)
    tokenizer, longest = build_tokenizer(), int(LONGEST_SECONDS)
    extractor = WhisperFeatureExtractor(feature_size=MEL_BINS, sampling_rate=RATE, hop_length=HOP, chunk_length=longest)
    model = build_model(tokenizer)
    seconds = train(model, *render(extractor, tokenizer, args), args)
    before = evaluate(model, extractor, tokenizer, args.test_rows)

    def card(stored: WhisperForConditionalGeneration, facts: dict[str, Any]) -> str:
        facts |= {"seconds": seconds, "words": len(WORDS), "wer_before": before["wer"], "longest": longest}
        return CARD.format(**vars(args), **facts, **evaluate(stored, extractor, tokenizer, args.test_rows))

    publish(model, [tokenizer, extractor], args.out, card)


if __name__ == "__main__":
    main()
