"""What the scripts that pretrain the bundled ViLT and BLIP share: a tokenizer, pictures, and the bundled CLIP to begin with.

Shape legend: N rows of a pool.
"""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mmcompress.data.scenes import Scenes
from mmcompress.data.shapes import IMAGE_SIZE

CLIP = Path(__file__).parent.parent / "mmcompress" / "bundled" / "shapes-clip"
PATCH_SIZE = 8


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
