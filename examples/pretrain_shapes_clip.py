"""Pretrains the small CLIP model that ships as `bundled:shapes-clip`, on synthetic pictures, on a CPU.

    python examples/pretrain_shapes_clip.py --out mmcompress/bundled/shapes-clip

Shape legend: N rows of the pool, B batch, C classes, T tokens, D width of the shared space.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pretrain_parts import options, publish, started
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast
from transformers import get_cosine_schedule_with_warmup as cosine

from mmcompress.data.shapes import CLASSES, IMAGE_SIZE, Shapes

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a {}.")
MAX_TOKENS = 32
TEST_ROWS, RETRIEVAL_ROWS = 2000, 1000

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags: [clip, synthetic]
---
# shapes-clip

A stock `CLIPModel` with {parameters:,} parameters, stored in float16 ({megabytes:.1f} MB). It was trained from scratch
on **synthetic** data only: 48x48 pictures of two coloured shapes with made-up captions (`mmcompress/data/shapes.py`).
It knows these shapes and nothing else. It is here so that tests and the quick start run offline on a CPU.

Made by `python examples/pretrain_shapes_clip.py --rows {rows} --epochs {epochs} --batch {batch} --threads {threads}
--seed {seed}` in {seconds:.0f} seconds (bfloat16; the symmetric contrastive loss on captions, plus the
same loss on class prompts). Another CPU or number of threads may give slightly different weights.

| measured on the test split, whose scenes are not in the training split | score |
|---|---|
| zero-shot top-1, {classes} classes, {test_rows} rows, three templates averaged | {top1:.4f} |
| image to text R@1 / R@5, {retrieval_rows} rows (an equal caption counts as a match) | {i2t_r1:.4f} / {i2t_r5:.4f} |
| text to image R@1 / R@5, the same rows | {t2i_r1:.4f} / {t2i_r5:.4f} |

The main object is the one with the black outline. The templates: {templates}. The scores
are those of the float16 weights computed in float32; before rounding to float16 the top-1 was {top1_before:.4f}.
"""


def build_processor(captions: list[str]) -> CLIPProcessor:
    """A byte-level BPE tokenizer learnt from the captions, and the 48-pixel image processor."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    raw.decoder = decoders.ByteLevel()
    specials, alphabet = ["<pad>", "<bos>", "<unk>"], sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator([*captions, *(t.format(c) for t in TEMPLATES for c in CLASSES)], trainer)
    # CLIP pools at the end token: older code looks for the highest id, newer code for this id. The last id serves both.
    raw.add_special_tokens(["<eos>"])
    ends = [(token, raw.token_to_id(token)) for token in ("<bos>", "<eos>")]
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=MAX_TOKENS, **names)
    grey, square = [0.5, 0.5, 0.5], {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=square, image_mean=grey, image_std=grey)
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def build_model(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """A stock CLIP with about 3.6 M parameters and random weights."""
    text = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 512}
    vision = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    vision |= {"image_size": IMAGE_SIZE, "patch_size": 8}
    shared = {"projection_dim": 128}
    config = CLIPConfig(text_config=text | shared, vision_config=vision | shared, **shared)
    # On a CPU the backward pass of fused attention in bfloat16 is about twice as slow as that of plain attention.
    return CLIPModel._from_config(config, attn_implementation="eager")


def contrastive(scores: torch.Tensor, match: torch.Tensor) -> torch.Tensor:
    """Symmetric contrastive loss where a row may have several matches, which share its target evenly.

    Args:
        scores: [B, M] scaled similarities of pictures and texts.
        match: [B, M] True where the text belongs to the picture; a row or column without a match is left out.
    """
    total = scores.new_zeros(())
    for logits, hits in ((scores, match), (scores.T, match.T)):
        kept = hits.any(dim=1)
        target = hits[kept].float()
        total = total + F.cross_entropy(logits[kept], target / target.sum(dim=1, keepdim=True)) / 2
    return total


def render(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Draws the pool once: pictures [N, 3, 48, 48] uint8, labels [N], captions."""
    pool = torch.empty(rows, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    labels, captions = torch.empty(rows, dtype=torch.long), []
    for i, row in enumerate(Shapes("train", rows, seed)):
        pool[i] = torch.from_numpy(np.array(row["image"])).permute(2, 0, 1)
        labels[i] = row["label"]
        captions.append(row["text"])
    return pool, labels, captions


def train(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> float:
    """Trains in place on a pool that is rendered once, and returns the seconds that took (without rendering)."""
    pool, labels, captions = render(args.rows, args.seed)
    start = time.perf_counter()
    number = {text: k for k, text in enumerate(dict.fromkeys(captions))}
    same = torch.tensor([number[text] for text in captions])  # [N] equal for equal captions: no false negatives
    tokens = tokenizer(captions, padding=True, return_tensors="pt")["input_ids"]  # [N, T]
    prompts = [tokenizer([t.format(c) for c in CLASSES], padding=True, return_tensors="pt") for t in TEMPLATES]
    pad, per_epoch = tokenizer.pad_token_id, args.rows // args.batch
    decays: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        decays[parameter.ndim > 1].append(parameter)
    groups = [{"params": decays[True], "weight_decay": 0.05}, {"params": decays[False], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    schedule = cosine(optimizer, args.epochs * per_epoch // 20, args.epochs * per_epoch)
    model.train()
    for epoch in range(args.epochs):
        losses, hits = [], []
        order = torch.randperm(args.rows)
        for step in range(per_epoch):
            rows = order[step * args.batch : (step + 1) * args.batch]
            ids = tokens[rows]
            ids = ids[:, : int((ids != pad).sum(dim=1).max())]
            with torch.autocast("cpu", torch.bfloat16):
                pixels = pool[rows].float() / 127.5 - 1
                image = model.get_image_features(pixel_values=pixels).pooler_output
                text = model.get_text_features(input_ids=ids, attention_mask=(ids != pad).long()).pooler_output
                names = model.get_text_features(**prompts[step % len(prompts)]).pooler_output
            image, text, names = (F.normalize(x.float(), dim=-1) for x in (image, text, names))  # [., D]
            scale = model.logit_scale.exp()
            own = labels[rows][:, None] == torch.arange(len(CLASSES))  # [B, C]
            loss = contrastive(scale * image @ text.T, same[rows][:, None] == same[rows])
            loss = loss + contrastive(scale * image @ names.T, own)
            hits.append(own.gather(1, (image @ names.T).argmax(1, keepdim=True)).float().mean().item())
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            model.logit_scale.data.clamp_(max=4.6052)  # ln 100, as in the CLIP paper
            losses.append(loss.item())
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.3f}, top-1 {np.mean(hits):.3f}, {seconds:.0f} s", flush=True)
    return seconds


@torch.inference_mode()
def evaluate(model: CLIPModel, processor: CLIPProcessor) -> dict[str, float]:
    """Zero-shot top-1 and retrieval recalls (fractions) on the test split, through the stock processor."""
    model.eval()
    data = Shapes("test", TEST_ROWS)[:]

    def encode(texts: list[str]) -> torch.Tensor:
        inputs = processor(text=texts, padding=True, return_tensors="pt")
        return F.normalize(model.get_text_features(**inputs).pooler_output, dim=-1)

    chunks = [[row["image"] for row in data[i : i + 250]] for i in range(0, TEST_ROWS, 250)]
    inputs = (processor(images=chunk, return_tensors="pt") for chunk in chunks)
    image = F.normalize(torch.cat([model.get_image_features(**x).pooler_output for x in inputs]), dim=-1)
    names = F.normalize(torch.stack([encode([t.format(c) for c in CLASSES]) for t in TEMPLATES]).mean(0), dim=-1)
    labels = torch.tensor([row["label"] for row in data])
    scores = {"top1": ((image @ names.T).argmax(-1) == labels).float().mean().item()}

    captions = [row["text"] for row in data[:RETRIEVAL_ROWS]]
    similarity = image[:RETRIEVAL_ROWS] @ encode(captions).T
    match = torch.tensor([[a == b for b in captions] for a in captions])
    for name, table in (("i2t", similarity), ("t2i", similarity.T)):
        ranked = match.gather(1, table.topk(5, dim=1).indices)
        scores |= {f"{name}_r{k}": ranked[:, :k].any(1).float().mean().item() for k in (1, 5)}
    return scores


def main() -> None:
    """Trains, evaluates, and writes the folder in one move."""
    parser = options(__doc__, rows=16384, batch=128, lr=1e-3)
    parser.add_argument("--epochs", type=int, default=10)
    args = started(parser)
    processor = build_processor([row["text"] for row in Shapes("train", 4000, args.seed)])
    model = build_model(processor.tokenizer)
    seconds = train(model, processor.tokenizer, args)
    before = evaluate(model, processor)

    def card(stored: CLIPModel, facts: dict[str, Any]) -> str:
        facts |= {"seconds": seconds, "classes": len(CLASSES), "top1_before": before["top1"]}
        facts |= {"test_rows": TEST_ROWS, "retrieval_rows": RETRIEVAL_ROWS, "templates": ", ".join(f'"{t}"' for t in TEMPLATES)}
        return CARD.format(**vars(args), **facts, **evaluate(stored, processor))

    publish(model, [processor.tokenizer, processor.image_processor], args.out, card)


if __name__ == "__main__":
    main()
