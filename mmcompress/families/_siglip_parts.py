"""SigLIP's vision encoder with its pooling head: one learned query (the probe) attends to all patches, and an MLP follows.

Shapes: B examples, S patches, H hidden width, which is also that of the pooled output.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from mmcompress.families._encoders import SIGLIP_LAYOUT, VisionTransformer
from mmcompress.families.base import UnitGroup


class SplitHead(nn.Module):
    """SigLIP's pooling head with a Linear each for query, key and value, in place of nn.MultiheadAttention's one matrix.

    The same numbers in a form that can be cut (Torch-Pruning takes MultiheadAttention for one block whose inputs, heads and
    outputs are cut at the same places) and quantized (exported as a slice of a matrix, the weights are no constants of a
    MatMul). The parameters share their memory with the stock head's, and `state_dict` writes them under the stock names.
    """

    def __init__(self, head: Any) -> None:
        super().__init__()
        attention = head.attention
        width, heads = attention.embed_dim, attention.num_heads
        self.head_dim = width // heads
        # A module, so that the graph has a root to cut: (1, H).
        self.probe = nn.Embedding(1, width, _weight=head.probe.detach().reshape(1, width))
        parts = zip(attention.in_proj_weight.detach().chunk(3), attention.in_proj_bias.detach().chunk(3), strict=True)
        self.q_proj, self.k_proj, self.v_proj = (_linear(weight, bias) for weight, bias in parts)
        self.out_proj = _linear(attention.out_proj.weight.detach(), attention.out_proj.bias.detach())
        self.layernorm = head.layernorm
        self.mlp = head.mlp
        self.train(head.training)
        self.register_state_dict_post_hook(_stock_names)

    def forward(self, hidden_state: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(B, S, H), and (B, S) where some patches are padding -> (B, H)."""
        size, length, _ = hidden_state.shape
        probe = self.probe(torch.zeros(1, 1, dtype=torch.int64, device=hidden_state.device))
        query = self.q_proj(probe).view(1, 1, -1, self.head_dim).transpose(1, 2)
        key = self.k_proj(hidden_state).view(size, length, -1, self.head_dim).transpose(1, 2)
        value = self.v_proj(hidden_state).view(size, length, -1, self.head_dim).transpose(1, 2)
        scores = query @ key.transpose(-1, -2) * self.head_dim**-0.5
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask[:, None, None, :] == 0, torch.finfo(scores.dtype).min)
        weights = F.softmax(scores, dim=-1)
        mixed = self.out_proj((weights @ value).transpose(1, 2).reshape(size, 1, -1))
        mixed = mixed + self.mlp(self.layernorm(mixed))
        pooled: torch.Tensor = mixed[:, 0]
        return pooled


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    """A Linear over memory that is there already."""
    made = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    made.weight, made.bias = nn.Parameter(weight), nn.Parameter(bias)
    return made


def _stock_names(head: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Writes a split head's numbers as the stock head would: query, key and value in one matrix."""
    state[f"{prefix}probe"] = state.pop(f"{prefix}probe.weight").unsqueeze(0)
    for kind in ("weight", "bias"):
        state[f"{prefix}attention.in_proj_{kind}"] = torch.cat([state.pop(f"{prefix}{part}_proj.{kind}") for part in "qkv"])
        state[f"{prefix}attention.out_proj.{kind}"] = state.pop(f"{prefix}out_proj.{kind}")


class SiglipVision(VisionTransformer):
    """SigLIP's vision tower. Its pooling head counts as one more layer for units, and as none for depth."""

    def __init__(self) -> None:
        super().__init__(SIGLIP_LAYOUT)

    def make_ready(self, encoder: nn.Module) -> None:
        vision = cast(Any, encoder)
        if not isinstance(vision.head, SplitHead):
            vision.head = SplitHead(vision.head)

    def exported(self, encoder: nn.Module) -> nn.Module:
        vision: Any = copy.copy(encoder)
        # A shallow copy shares all weights; its own table of parts lets it have another head.
        vision._modules = dict(vision._modules)
        self.make_ready(vision)
        return cast(nn.Module, vision)

    def unit_groups(self, encoder: nn.Module, tower: str, axis: str, prefix: str) -> list[UnitGroup]:
        groups = super().unit_groups(encoder, tower, axis, prefix)
        head: Any = cast(Any, encoder).head
        at = f"{prefix}.head"
        if axis == "ffn":
            return [*groups, UnitGroup(tower, axis, f"{at}.mlp.fc1", head.mlp.fc1, head.mlp.fc1.out_features)]
        if not isinstance(head, SplitHead):
            # Only sizes are asked for: `make_ready` puts the split head in place before anything is cut.
            head = SplitHead(head)
        if axis == "heads":
            also = (head.q_proj, head.k_proj)
            root, remembers = head.v_proj, (head, "head_dim")
            own = UnitGroup(tower, axis, f"{at}.v_proj", root, root.out_features, head.head_dim, also, head_size=remembers)
            return [*groups, own]
        if axis == "width":
            # Neither the probe nor what the head writes lies on the residual stream; all three are hidden_size wide.
            return [
                *groups,
                UnitGroup(tower, axis, f"{at}.probe", head.probe, head.probe.embedding_dim),
                UnitGroup(tower, axis, f"{at}.out_proj", head.out_proj, head.out_proj.out_features),
            ]
        return groups

    def shrink(self, encoder: nn.Module, config: PretrainedConfig) -> bool:
        head: Any = cast(Any, encoder).head
        if not super().shrink(encoder, config):
            return False
        sizes = cast(Any, config)
        inner = head.v_proj.out_features if isinstance(head, SplitHead) else head.attention.embed_dim
        width = head.mlp.fc2.out_features
        return bool(head.mlp.fc1.out_features == sizes.intermediate_size and inner == width == sizes.hidden_size)
