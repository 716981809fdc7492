"""Training large models without memory that is held and not used.

The gradient of an embedding is a table of its size for the few rows that were looked up, 154 MB of a CLAP's 614 MB of weights,
and there while activations still are. Here it is the rows alone until the backward pass is over. Where the output layer is tied
to the embedding, autograd holds the gradient three times for a moment: the layer's own, the table, and their sum (318 MB of a
Whisper base's 290 MB of weights). Here the rows are added to the layer's, which itself waits for the end of the backward pass
where the tokens are so few that what it is the product of is smaller: 3 MB of 106 for 16 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from mmcompress.heap import BLOCK_BYTES


@contextmanager
def lean_gradients(module: nn.Module, device: torch.device, least_bytes: int = BLOCK_BYTES) -> Iterator[None]:
    """In the block, large embeddings and output layers tied to them have their gradients made with less memory.

    An embedding of its own has a sparse ``weight.grad`` after the backward pass, of the rows that were looked up, which
    `fill_tables` makes dense. One that shares its weight with another layer adds its rows to that layer's gradient. A linear
    layer that shares an embedding's weight has its gradient at the end of the backward pass where its input and the gradient of
    its output take less memory than the weight. These add to ``weight.grad``, not to what ``torch.autograd.grad`` gives for the
    weight. All are the same as without but for rounding. Does nothing on devices without sparse gradients.

    Args:
        least_bytes: of an embedding's weight.
    """
    large = _embeddings(module, least_bytes) if device.type in ("cpu", "cuda") else {}
    changed: list[nn.Module] = []
    alone: list[nn.Embedding] = []
    for weight, (embeddings, others) in large.items():
        if len(embeddings) + len(others) == 1:
            alone += embeddings
            continue
        later = _Later(weight)
        for embedding in embeddings:
            embedding.forward = partial(_look_up, embedding, later)  # type: ignore[method-assign] # it keeps its class and hooks
        linear = [layer for layer in others if type(layer) is nn.Linear]
        for layer in linear:
            layer.forward = partial(_project, layer, later)  # type: ignore[method-assign] # as above
        changed += [*embeddings, *linear]
    for embedding in alone:
        embedding.sparse = True
    try:
        yield
    finally:
        for part in changed:
            del part.forward
        for embedding in alone:
            embedding.sparse = False


def fill_tables(parameters: Iterable[nn.Parameter]) -> None:
    """Makes gradients of looked-up rows tables of zeros with these rows, as optimisers need them."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.to_dense()


def users(module: nn.Module) -> dict[nn.Parameter, list[nn.Module]]:
    """The layers that hold each parameter: more than one where it is tied."""
    found: dict[nn.Parameter, list[nn.Module]] = {}
    for part in module.modules():
        for weight in part.parameters(recurse=False):
            found.setdefault(weight, []).append(part)
    return found


def _embeddings(module: nn.Module, least_bytes: int) -> dict[nn.Parameter, tuple[list[nn.Embedding], list[nn.Module]]]:
    """Weights of embeddings whose gradients may be sparse: these embeddings, and the other layers that hold the weight."""
    found = {}
    for weight, parts in users(module).items():
        plain = [
            part for part in parts if type(part) is nn.Embedding and not (part.max_norm or part.scale_grad_by_freq or part.sparse)
        ]
        if plain and weight.nbytes >= least_bytes:
            found[weight] = (plain, [part for part in parts if part not in plain])
    return found


class _Later:
    """What is added to a weight's gradient at the end of the backward pass that is under way.

    Attributes:
        terms: each adds its own to the gradient that it is given.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.terms: list[Callable[[torch.Tensor], object]] = []

    def wait(self, term: Callable[[torch.Tensor], object]) -> None:
        """Called in a backward pass."""
        if not self.terms:
            torch.autograd.Variable._execution_engine.queue_callback(self._add)
        self.terms.append(term)

    def _add(self) -> None:
        terms, self.terms = self.terms, []
        if self.weight.grad is None:
            self.weight.grad = torch.zeros_like(self.weight)
        with torch.no_grad():
            for term in terms:
                term(self.weight.grad)


def _look_up(embedding: nn.Embedding, later: _Later, input: torch.Tensor) -> torch.Tensor:  # the name that nn.Embedding gives it
    weight = embedding.weight
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return F.embedding(input, weight, embedding.padding_idx)
    rows = weight.detach().requires_grad_()
    rows.register_post_accumulate_grad_hook(partial(_add_rows, later))
    return F.embedding(input, rows, embedding.padding_idx, sparse=True)


def _add_rows(later: _Later, rows: torch.Tensor) -> None:
    found, rows.grad = rows.grad, None
    assert found is not None  # called after it was made
    if later.weight.grad is None:
        later.wait(lambda gradient: gradient.add_(found))
    else:
        later.weight.grad.add_(found)


def _project(layer: nn.Linear, later: _Later, input: torch.Tensor) -> torch.Tensor:  # the name that nn.Linear gives it
    weight, trained = layer.weight, layer.weight.requires_grad and torch.is_grad_enabled() and input.requires_grad
    if not trained or input.numel() // input.shape[-1] * sum(weight.shape) >= weight.numel():
        return F.linear(input, weight, layer.bias)
    given = input.detach().flatten(0, -2)

    def wait(gradient: torch.Tensor) -> None:
        own = gradient.detach().flatten(0, -2)
        later.wait(lambda total: total.addmm_(own.T.to(total.dtype), given.to(total.dtype)))

    found = F.linear(input, weight.detach(), layer.bias)
    found.register_hook(wait)
    return found
