"""Pretrains the small ViLT model that ships as `bundled:shapes-vilt`, on synthetic pictures and questions, on a CPU.

    python examples/pretrain_shapes_vqa.py --out mmcompress/bundled/shapes-vilt

Shape legend: N rows of the pool, B batch, S words, C answers.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pretrain_parts import CLIP, PATCH_SIZE, begin_as, build_tokenizer, options, publish, render, started
from transformers import CLIPModel, PreTrainedTokenizerFast, ViltConfig, ViltForQuestionAnswering, ViltProcessor
from transformers import get_cosine_schedule_with_warmup as cosine
from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

from mmcompress.data.scenes import SCENE_ANSWERS, Scenes
from mmcompress.data.shapes import COLOURS, IMAGE_SIZE, INVERSE, RADII, SHAPES
from mmcompress.families.vilt import FAMILY

MAX_TOKENS = 24
SHOWN = (tuple(RADII), tuple(COLOURS), SHAPES)
FACTS = (*SHOWN, tuple(INVERSE), *SHOWN)
"""What there is to know of a scene: size, colour and shape of one object, the relation, and the same of the other one."""

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: visual-question-answering
tags: [vilt, synthetic]
---
# shapes-vilt

A stock `ViltForQuestionAnswering` with {parameters:,} parameters, stored in float16 ({megabytes:.1f} MB). It was trained
from scratch on **synthetic** data only: 48x48 pictures of two coloured shapes and made-up questions
(`mmcompress/data/scenes.py`). It knows these shapes, these questions and {answers} answers, and nothing else. It is here so
that tests and the quick start run offline on a CPU.

Made by `python examples/pretrain_shapes_vqa.py --rows {rows} --steps {steps} --batch {batch} --threads {threads}
--seed {seed}` in {seconds:.0f} seconds (bfloat16; the binary cross-entropy of stock ViLT plus the cross-entropy, and that of
all facts of a scene told from the picture's class token; a new question about a picture every time). Its layers began as those of
`shapes-clip`'s vision tower. Another CPU or number of threads may give slightly different weights.

| measured on the test split, whose scenes are not in the training split, {test_rows} rows | score |
|---|---|
| right answers | {accuracy:.4f} |
| the most frequent answer to each question, without looking at the picture | {blind:.4f} |
{table}
The first row is printed by `mmcompress eval recipes/vqa-quickstart.yaml bundled:shapes-vilt`. The scores are those of the
float16 weights computed in float32; before rounding to float16 the share of right answers was {before:.4f}.
"""


def build_processor(questions: list[str]) -> ViltProcessor:
    """A tokenizer learnt from the questions, and the 48-pixel image processor."""
    grey = [0.5, 0.5, 0.5]
    size = {"shortest_edge": IMAGE_SIZE}
    images = ViltImageProcessorPil(size=size, size_divisor=PATCH_SIZE, image_mean=grey, image_std=grey)
    return ViltProcessor(image_processor=images, tokenizer=build_tokenizer(questions, MAX_TOKENS))


def build_model(tokenizer: PreTrainedTokenizerFast) -> ViltForQuestionAnswering:
    """A stock ViLT whose layers begin as those of the bundled CLIP's vision tower, as ViLT's own began as a ViT's."""
    clip = CLIPModel.from_pretrained(CLIP, dtype=torch.float32).vision_model
    known = clip.config
    sizes = {name: getattr(known, name) for name in ("hidden_size", "num_attention_heads", "intermediate_size", "hidden_act")}
    sizes |= {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "num_hidden_layers": known.num_hidden_layers}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS, "pad_token_id": tokenizer.pad_token_id}
    labels = dict(enumerate(SCENE_ANSWERS))
    numbers = {name: i for i, name in labels.items()}
    model = ViltForQuestionAnswering(ViltConfig(**sizes, id2label=labels, label2id=numbers, layer_norm_eps=known.layer_norm_eps))
    for ours, theirs in zip(model.vilt.encoder.layer, clip.encoder.layers, strict=True):
        at, output = ours.attention.attention, ours.attention.output.dense
        pairs = [(at.query, "q_proj"), (at.key, "k_proj"), (at.value, "v_proj"), (output, "out_proj")]
        copies = [(part, getattr(theirs.self_attn, name)) for part, name in pairs]
        copies += [(ours.intermediate.dense, theirs.mlp.fc1), (ours.output.dense, theirs.mlp.fc2)]
        copies += [(ours.layernorm_before, theirs.layer_norm1), (ours.layernorm_after, theirs.layer_norm2)]
        for part, source in copies:
            part.load_state_dict(source.state_dict())
    seen = model.vilt.embeddings
    with torch.no_grad():
        for part, values in zip(
            (seen.patch_embeddings.projection.weight, seen.patch_embeddings.projection.bias, seen.position_embeddings[0]),
            begin_as(clip),
            strict=True,
        ):
            part.copy_(values)
        torch.nn.init.zeros_(seen.cls_token)
        torch.nn.init.constant_(model.classifier[-1].bias, -3.0)  # about one in the number of answers is right
    return model


def facts_loss(scores: torch.Tensor, scenes: list[str]) -> torch.Tensor:
    """The mean cross-entropy of the seven facts, out of scores [B, all values of all facts]."""
    parts = scores.split([len(values) for values in FACTS], dim=1)
    told = [[*words[:3], " ".join(words[3:-3]), *words[-3:]] for words in map(str.split, scenes)]
    pairs = zip(parts, FACTS, zip(*told, strict=True), strict=True)
    return torch.stack([F.cross_entropy(part, torch.tensor([v.index(t) for t in column])) for part, v, column in pairs]).mean()


def train(model: ViltForQuestionAnswering, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> float:
    """Trains in place on a pool that is rendered once, and returns the seconds that took (without rendering).

    A question tells little about a picture. So a further head, which is dropped in the end, learns to tell all facts from the
    state of the picture's class token two layers before the last, where the question's class token can read them.
    """
    pool, data = render(args.rows, args.seed), Scenes("train", args.rows, args.seed)
    start = time.perf_counter()
    teller = torch.nn.Linear(model.config.hidden_size, sum(map(len, FACTS)))
    decays: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for parameter in (*model.parameters(), *teller.parameters()):
        decays[parameter.ndim > 1].append(parameter)
    groups = [{"params": decays[True], "weight_decay": 0.05}, {"params": decays[False], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    schedule = cosine(optimizer, args.steps // 20, args.steps)
    model.train()
    log = []
    for step in range(args.steps):
        if step % (args.rows // args.batch) == 0:
            order = torch.randperm(args.rows)
        rows = order[step % (args.rows // args.batch) * args.batch :][: args.batch]
        asked = [data.words(int(i), turn=step) for i in rows]
        tokens = tokenizer([row["question"] for row in asked], padding=True, return_tensors="pt")
        target = torch.tensor([model.config.label2id[row["answers"][0]] for row in asked])
        pixels = pool[rows].float() / 127.5 - 1
        batch = {**tokens, "pixel_values": pixels, "pixel_mask": torch.ones_like(pixels[:, 0], dtype=torch.long)}
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        with torch.autocast("cpu", torch.bfloat16):
            found = FAMILY.forward(model, batch, hidden=True)
            told = teller(found.hidden["fused"][-3][:, batch["input_ids"].shape[1]])
        logits, right = found.logits.float(), F.one_hot(target, len(SCENE_ANSWERS)).float()
        own = F.binary_cross_entropy_with_logits(logits, right) * len(SCENE_ANSWERS) + F.cross_entropy(logits, target)
        facts = facts_loss(told.float(), [row["scene"] for row in asked])
        optimizer.zero_grad()
        torch.autograd.backward(own + facts)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        log.append((own.item(), facts.item(), (logits.argmax(1) == target).float().mean().item()))
        if step % 50 == 49:
            loss, unknown, hits = np.mean(log[-50:], axis=0)
            said = f"loss {loss:.3f}, of facts {unknown:.3f}, right {hits:.3f}"
            print(f"step {step + 1}: {said}, {time.perf_counter() - start:.0f} s", flush=True)
    return time.perf_counter() - start


@torch.inference_mode()
def evaluate(model: ViltForQuestionAnswering, processor: ViltProcessor, count: int) -> dict[str, list[bool]]:
    """For each kind of question which of the test split's answers are right, through the stock processor and forward pass."""
    model.eval()
    data = Scenes("test", count)[:]
    found: dict[str, list[bool]] = {}
    for start in range(0, count, 100):
        rows = data[start : start + 100]
        questions = [row["question"] for row in rows]
        inputs = processor([row["image"] for row in rows], questions, padding=True, return_tensors="pt")
        for row, number in zip(rows, model(**inputs).logits.argmax(-1).tolist(), strict=True):
            kind = " ".join(row["question"].split()[:2])
            found.setdefault(kind, []).append(model.config.id2label[number] == row["answers"][0])
    return found


def share_right(found: dict[str, list[bool]]) -> float:
    """Over all kinds of questions."""
    return float(np.mean([hit for hits in found.values() for hit in hits]))


def blind_accuracy(rows: int, seed: int, count: int) -> float:
    """The share of test answers that the most frequent training answer to the same question gets right."""
    counts: dict[str, dict[str, int]] = {}
    train_, test = Scenes("train", rows, seed), Scenes("test", count)
    for words in map(train_.words, range(rows)):
        own = counts.setdefault(words["question"], {})
        own[words["answers"][0]] = own.get(words["answers"][0], 0) + 1
    asked = [test.words(i) for i in range(count)]
    guesses = [max(counts.get(row["question"], {"": 0}).items(), key=lambda pair: pair[1])[0] for row in asked]
    return float(np.mean([guess == row["answers"][0] for guess, row in zip(guesses, asked, strict=True)]))


def main() -> None:
    """Trains, evaluates, and writes the folder in one move."""
    parser = options(__doc__, rows=8000, batch=64, lr=5e-4)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--test-rows", type=int, default=2000, help="questions that are scored")
    args = started(parser)
    train_rows = Scenes("train", args.rows, args.seed)
    processor = build_processor([train_rows.words(i)["question"] for i in range(min(args.rows, 4000))])
    model = build_model(processor.tokenizer)
    seconds = train(model, processor.tokenizer, args)
    before = evaluate(model, processor, args.test_rows)

    def card(stored: ViltForQuestionAnswering, facts: dict[str, Any]) -> str:
        scores = evaluate(stored, processor, args.test_rows)
        table = "".join(f"| {kind} ... ({len(hits)}) | {np.mean(hits):.4f} |\n" for kind, hits in sorted(scores.items()))
        facts |= {"seconds": seconds, "answers": len(SCENE_ANSWERS), "table": table}
        facts |= {"accuracy": share_right(scores), "before": share_right(before)}
        return CARD.format(**vars(args), **facts, blind=blind_accuracy(args.rows, args.seed, args.test_rows))

    publish(model, [processor.tokenizer, processor.image_processor], args.out, card)


if __name__ == "__main__":
    main()
