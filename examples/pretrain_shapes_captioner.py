"""Trains the small BLIP model that ships as `bundled:shapes-blip` to describe synthetic pictures, on a CPU.

    python examples/pretrain_shapes_captioner.py --out mmcompress/bundled/shapes-blip

The vision tower is that of `bundled:shapes-clip` and stays as it is, so that each picture goes through it once.

Shape legend: N rows of the pool, B batch, T tokens of a caption, S patches, D vision width.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pretrain_parts import CLIP, PATCH_SIZE, begin_as, build_tokenizer, options, publish, render, started
from transformers import BlipConfig, BlipForConditionalGeneration, CLIPModel, PreTrainedTokenizerFast
from transformers import get_cosine_schedule_with_warmup as cosine
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from mmcompress.data.scenes import Scenes
from mmcompress.data.shapes import IMAGE_SIZE

MAX_TOKENS = 32

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-to-text
tags: [blip, synthetic]
---
# shapes-blip

A stock `BlipForConditionalGeneration` with {parameters:,} parameters, stored in float16 ({megabytes:.1f} MB). It was trained
on **synthetic** data only: 48x48 pictures of two coloured shapes with made-up captions (`mmcompress/data/scenes.py`). It
knows these shapes and nothing else. It is here so that tests and the quick start run offline on a CPU.

Made by `python examples/pretrain_shapes_captioner.py --rows {rows} --steps {steps} --batch {batch} --threads {threads}
--seed {seed}` in {seconds:.0f} seconds (bfloat16; cross-entropy; one of a picture's {forms} captions every time). The vision
tower is that of `shapes-clip`. Another CPU or number of threads may give slightly different weights.

| measured on the test split, whose scenes are not in the training split, {test_rows} rows | score |
|---|---|
| captions that are one of the picture's {forms}, word by word | {exact:.4f} |

`mmcompress eval recipes/captions-quickstart.yaml bundled:shapes-blip` prints this too, with CIDEr-D and BLEU-4. The
score is that of the float16 weights computed in float32; before rounding to float16 it was {before:.4f}.
"""


def build_model(tokenizer: PreTrainedTokenizerFast) -> BlipForConditionalGeneration:
    """A stock BLIP: the bundled CLIP's vision tower, and a decoder of two layers with random weights."""
    clip = CLIPModel.from_pretrained(CLIP, dtype=torch.float32).vision_model
    known = clip.config
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps")
    vision = {name: getattr(known, name) for name in names}
    vision |= {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    text = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS, "pad_token_id": tokenizer.pad_token_id}
    # BLIP's captions begin with a token of their own and end with [SEP].
    text |= {"bos_token_id": tokenizer.bos_token_id, "sep_token_id": tokenizer.sep_token_id}
    text |= {"eos_token_id": tokenizer.sep_token_id}
    model = BlipForConditionalGeneration(BlipConfig(vision_config=vision, text_config=text))
    own = model.vision_model
    with torch.no_grad():
        kernel, bias, positions = begin_as(clip)
        own.embeddings.patch_embedding.weight.copy_(kernel)
        own.embeddings.patch_embedding.bias.copy_(bias)
        own.embeddings.position_embedding[0].copy_(positions)
        own.embeddings.class_embedding.zero_()
        for ours, theirs in zip(own.encoder.layers, clip.encoder.layers, strict=True):
            at = theirs.self_attn
            for name in ("weight", "bias"):
                joined = torch.cat([getattr(part, name) for part in (at.q_proj, at.k_proj, at.v_proj)])
                getattr(ours.self_attn.qkv, name).copy_(joined)
            ours.self_attn.projection.load_state_dict(at.out_proj.state_dict())
            for part in ("layer_norm1", "layer_norm2", "mlp"):
                getattr(ours, part).load_state_dict(getattr(theirs, part).state_dict())
        own.post_layernorm.load_state_dict(clip.post_layernorm.state_dict())
    return model


@torch.inference_mode()
def look(model: BlipForConditionalGeneration, rows: int, seed: int) -> torch.Tensor:
    """What the vision tower makes of the pool, [N, S, D] bfloat16."""
    model.eval()
    chunks = render(rows, seed).split(128)
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([model.vision_model(chunk.float() / 127.5 - 1).last_hidden_state.bfloat16() for chunk in chunks])


def train(model: BlipForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> float:
    """Trains the decoder in place, and returns the seconds that took, rendering included."""
    start = time.perf_counter()
    seen, data = look(model, args.rows, args.seed), Scenes("train", args.rows, args.seed)
    captions = [data.words(i)["text"] for i in range(args.rows)]
    decoder = model.text_decoder.train()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    schedule = cosine(optimizer, args.steps // 20, args.steps)
    losses = []
    for step in range(args.steps):
        rows = torch.randint(args.rows, (args.batch,))
        drawn = torch.randint(1 << 30, (args.batch,)).tolist()
        texts = [captions[i][k % len(captions[i])] for i, k in zip(rows.tolist(), drawn, strict=True)]
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        ids[:, 0] = tokenizer.bos_token_id
        with torch.autocast("cpu", torch.bfloat16):
            states = seen[rows].float()
            logits = decoder(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], encoder_hidden_states=states).logits.float()
        loss = F.cross_entropy(logits[mask[:, 1:] > 0], ids[:, 1:][mask[:, 1:] > 0])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"step {step + 1}: loss {np.mean(losses[-100:]):.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    return time.perf_counter() - start


@torch.inference_mode()
def evaluate(
    model: BlipForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, images: BlipImageProcessorPil, count: int
) -> float:
    """The share of test captions that are one of their picture's, by the stock processor and `generate`."""
    model.eval()
    hits = []
    data = Scenes("test", count)
    for start in range(0, count, 100):
        rows = data[start : start + 100]
        pixels = images(images=[row["image"] for row in rows], return_tensors="pt")
        said = tokenizer.batch_decode(model.generate(**pixels, max_new_tokens=MAX_TOKENS - 2), skip_special_tokens=True)
        hits += [text.strip() in row["text"] for text, row in zip(said, rows, strict=True)]
    return float(np.mean(hits))


def main() -> None:
    """Trains, evaluates, and writes the folder in one move."""
    parser = options(__doc__, rows=8000, batch=64, lr=2e-3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--test-rows", type=int, default=1000, help="pictures whose captions are scored")
    args = started(parser)
    known = Scenes("train", min(args.rows, 4000), args.seed)
    texts = [text for i in range(len(known)) for text in known.words(i)["text"]]
    tokenizer = build_tokenizer(texts, MAX_TOKENS, more=("[DEC]", "[ENC]"))
    tokenizer.bos_token = "[DEC]"
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    grey, square = [0.5, 0.5, 0.5], {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = BlipImageProcessorPil(size=square, image_mean=grey, image_std=grey)
    model = build_model(tokenizer)
    seconds = train(model, tokenizer, args)
    before = evaluate(model, tokenizer, images, args.test_rows)

    def card(stored: BlipForConditionalGeneration, facts: dict[str, Any]) -> str:
        facts |= {"seconds": seconds, "forms": len(known.words(0)["text"]), "before": before}
        return CARD.format(**vars(args), **facts, exact=evaluate(stored, tokenizer, images, args.test_rows))

    publish(model, [tokenizer, images], args.out, card)


if __name__ == "__main__":
    main()
