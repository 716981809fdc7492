"""What the scripts that pretrain the bundled models share: their options, the folder they leave, and for ViLT and BLIP a
tokenizer, pictures, and the bundled CLIP to begin with.

Shape legend: N rows of a pool.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mmcompress.data.scenes import Scenes
from mmcompress.data.shapes import IMAGE_SIZE
from mmcompress.files import writing_folder

CLIP = Path(__file__).parent.parent / "mmcompress" / "bundled" / "shapes-clip"
PATCH_SIZE = 8


def options(doc: str | None, *, rows: int, batch: int, lr: float) -> argparse.ArgumentParser:
    """The options of every script, with its own defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write (replaced if it exists)")
    parser.add_argument("--rows", type=int, default=rows, help="rows in the training pool")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="1 is faster than 2 where other work shares the cores")
    return parser


def started(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options given, with threads and seed set to them."""
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return args


def publish(model: PreTrainedModel, parts: list[Any], out: Path, card: Callable[[PreTrainedModel, dict[str, Any]], str]) -> None:
    """Writes a model in float16 with its tokenizer and the like, reads it back, and writes its card beside it, in one move.

    Args:
        card: makes the text of README.md from the model as it was read back, in float32, and its size.
    """
    with writing_folder(out) as beside:
        model.half().save_pretrained(beside)
        weights = beside / "model.safetensors"
        weights.chmod(0o644)  # it is written readable by its owner only
        for part in parts:
            part.save_pretrained(beside)
        stored = type(model).from_pretrained(beside, dtype=torch.float32)
        text = card(stored, {"parameters": stored.num_parameters(), "megabytes": weights.stat().st_size / 1e6})
        (beside / "README.md").write_text(text, encoding="utf-8")
    print(text)


def build_tokenizer(texts: list[str], max_tokens: int, more: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer in the manner of BERT, learnt from the texts; ``more`` are further special tokens."""
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *more]
    alphabet = list("abcdefghijklmnopqrstuvwxyz0123456789?.,'-")
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(texts, trainer)
    ends = [(token, raw.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    raw.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=max_tokens, **names)


def render(rows: int, seed: int) -> torch.Tensor:
    """Draws the pool once: pictures [N, 3, 48, 48] uint8."""
    pool = torch.empty(rows, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    for i, row in enumerate(Scenes("train", rows, seed)):
        pool[i] = torch.from_numpy(np.array(row["image"])).permute(2, 0, 1)
    return pool


@torch.no_grad()
def begin_as(clip: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A CLIP's patch kernel, its bias and the position embeddings, the first with the class token, for a model without CLIP's
    LayerNorm behind them: it is folded in as far as it goes.

    Its mean and gain are linear. The spread that it divides by varies from patch to patch; real pictures' mean is taken. The
    zero-shot accuracy of `shapes-clip` falls from 0.97 to 0.96 by that.
    """
    old, norm = clip.embeddings, clip.pre_layrnorm
    spread = old(render(64, 0).float() / 127.5 - 1)[:, 1:].std(dim=-1).mean()
    kernel, places = old.patch_embedding.weight, old.position_embedding.weight
    gain = norm.weight / spread
    positions = (places - places.mean(dim=1, keepdim=True)) * gain
    positions[0] = norm(old.class_embedding + places[0])
    return (kernel - kernel.mean(dim=0)) * gain[:, None, None, None], norm.bias.clone(), positions
