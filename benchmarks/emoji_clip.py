"""Trains a small CLIP on emoji of three vendors, for `recovery.py`: pictures of the fourth vendor are new to it.

    python benchmarks/emoji_clip.py --data FOLDER [--held-out twemoji] [--epochs 60] [--out benchmarks/results/emoji-clip]

FOLDER holds a Parquet file for each vendor with the columns ``image``, ``text`` (the name) and ``keywords``; row i is the same
concept in each. Leaves a stock `CLIPModel` folder, and prints R@10 from pictures to names among all names of the held-out vendor.

Shape legend: N pictures, B of them in a batch, U distinct texts, T tokens, S pixels a side.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast
from transformers import get_cosine_schedule_with_warmup as cosine

import mmcompress as mm
from mmcompress.data.examples import Examples
from mmcompress.files import writing_folder
from mmcompress.logs import silence_libraries
from mmcompress.progress import SILENT
from mmcompress.runtimes.torch_predict import TorchPredict
from mmcompress.tasks.image_text_retrieval import ImageTextRetrieval
from mmcompress.training.autocast import computing
from mmcompress.training.device import pick_precision

SIDE, PATCH, MAX_TOKENS = 48, 12, 24
VENDORS = ("noto", "twemoji", "openmoji", "fluentui")
METRIC = "image_to_text_r10"


def vendor(folder: Path, name: str) -> Examples:
    """One vendor's pictures with their names."""
    rows = datasets.load_dataset("parquet", data_files=str(folder / f"{name}.parquet"), split="train")
    return Examples(rows.cast_column("image", datasets.Image(decode=False)), name, {"image": "image", "text": "text"})


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """WordPiece over the names and keywords, with CLIP's begin and end tokens."""
    raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["<pad>", "<bos>", "<unk>"]
    raw.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=2000, special_tokens=specials, show_progress=False))
    raw.add_special_tokens(["<eos>"])  # the highest id: CLIP pools there
    ends = [(token, raw.token_to_id(token)) for token in ("<bos>", "<eos>")]
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=MAX_TOKENS, **names)


def build_model(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """A stock CLIP of about 3.7 M parameters with random weights."""
    text = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 512}
    vision = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    vision |= {"image_size": SIDE, "patch_size": PATCH}
    shared = {"projection_dim": 128}
    return CLIPModel(CLIPConfig(text_config=text | shared, vision_config=vision | shared, **shared))


def augmented(pixels: torch.Tensor) -> torch.Tensor:
    """Each picture turned, moved, scaled and coloured a little: (B, 3, S, S) in -1 to 1, the same shape."""
    count = len(pixels)
    angle = (torch.rand(count) - 0.5) * math.radians(30)
    scale, move = 0.8 + 0.45 * torch.rand(count), (torch.rand(count, 2) - 0.5) * 0.3
    flip = torch.where(torch.rand(count) < 0.25, -1.0, 1.0)
    turn = torch.stack([torch.cos(angle) * flip, -torch.sin(angle), torch.sin(angle) * flip, torch.cos(angle)], 1).view(-1, 2, 2)
    grid = F.affine_grid(torch.cat([turn * scale.view(-1, 1, 1), move[:, :, None]], 2), list(pixels.shape), align_corners=False)
    pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    mix = torch.eye(3) + 0.12 * torch.randn(count, 3, 3)  # a cast and a change of saturation at once
    pixels = torch.einsum("bij,bjhw->bihw", mix, pixels)
    return (pixels * (0.8 + 0.4 * torch.rand(count, 1, 1, 1)) + 0.2 * torch.randn(count, 1, 1, 1)).clamp(-1, 1)


def caption(row: dict[str, Any], rng: random.Random) -> str:
    """The name, or some of the keywords behind it or alone."""
    if not row["keywords"] or rng.random() < 0.6:
        return str(row["text"])
    words = rng.sample(row["keywords"], min(len(row["keywords"]), rng.randint(1, 4)))
    return " ".join([row["text"], *words] if rng.random() < 0.5 else words)


def train(model: mm.model.CompressedModel, seen: list[Examples], args: argparse.Namespace) -> float:
    """Trains in place; returns the seconds it took."""
    rows = [row for examples in seen for row in examples.rows.select_columns(["text", "keywords"])]
    pool = torch.cat([model.processor.pixels([e.media(i) for i in range(len(e))]) for e in seen])
    module, tokenizer, rng, start = model.module, model.processor.tokenizer, random.Random(args.seed), time.perf_counter()
    decays: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for parameter in module.parameters():
        decays[parameter.ndim > 1].append(parameter)
    groups = [{"params": decays[True], "weight_decay": 0.1}, {"params": decays[False], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    per_epoch, precision = len(pool) // args.batch, pick_precision("auto", torch.device("cpu"))
    schedule = cosine(optimizer, args.epochs * per_epoch // 20, args.epochs * per_epoch)
    module.train()
    for epoch in range(args.epochs):
        order, losses = torch.randperm(len(pool)), []
        for step in range(per_epoch):
            chosen = order[step * args.batch : (step + 1) * args.batch]
            concepts = (chosen % len(seen[0])).tolist()
            distinct = {c: k for k, c in enumerate(dict.fromkeys(concepts))}
            tokens = tokenizer([caption(rows[c], rng) for c in distinct], padding=True, truncation=True, return_tensors="pt")
            right = F.one_hot(torch.tensor([distinct[c] for c in concepts]), len(distinct)).float()  # (B, U)
            with computing(torch.device("cpu"), precision):
                image = module.get_image_features(pixel_values=augmented(pool[chosen])).pooler_output
                text = module.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output
            scores = module.logit_scale.exp() * F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T
            loss = (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right.T / right.T.sum(1, keepdim=True))) / 2
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            module.logit_scale.data.clamp_(max=math.log(100))
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    module.eval()
    return time.perf_counter() - start


def recall(model: mm.model.CompressedModel, held_out: Examples) -> dict[str, float]:
    """R@1, 5 and 10 both ways on the held-out vendor."""
    scores = ImageTextRetrieval(type="image-text-retrieval").evaluate(TorchPredict(model), model.processor, held_out, SILENT)
    return {name: float(values.mean()) for name, values in scores.per_example.items()}


def main() -> None:
    """Trains, writes the folder in one move, prints what it recalls."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with a Parquet file for each vendor")
    parser.add_argument("--held-out", choices=VENDORS, default="twemoji")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/emoji-clip"))
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    seen = [vendor(args.data, name) for name in VENDORS if name != args.held_out]
    words = [*seen[0].rows["text"], *(word for row in seen[0].rows["keywords"] for word in row)]
    tokenizer = build_tokenizer(words)
    grey, square = [0.5, 0.5, 0.5], {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square, image_mean=grey, image_std=grey)
    with writing_folder(args.out) as beside:
        build_model(tokenizer).save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        images.save_pretrained(beside)
        model = mm.load(str(beside))
        seconds = train(model, seen, args)
        model.module.save_pretrained(beside)
        found = recall(model, vendor(args.data, args.held_out))
    print(f"{model.parameters():,} parameters, {seconds:.0f} s; on {args.held_out}: " + str(found))


if __name__ == "__main__":
    main()
