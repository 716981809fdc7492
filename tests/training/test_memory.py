"""Whether a tied gradient is held once, and tables are gradients of rows until they are needed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmcompress.training.memory import fill_tables, lean_gradients

CPU = torch.device("cpu")


class Tied(nn.Module):
    """An embedding whose weight is the output layer's as well, padding in row 1, and one that stands alone.

    Args:
        bare: no output layer.
        two: a second embedding of the same weight.
    """

    def __init__(self, bare: bool = False, two: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.places = nn.Embedding(50, 8, padding_idx=1), nn.Embedding(4, 8)
        self.out = nn.Linear(8, 50, bias=False)
        self.out.weight = self.embed.weight
        self.bare, self.again = bare, False
        self.second = nn.Embedding(50, 8) if two else None
        if self.second is not None:
            self.second.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T) to a loss of shape ()."""

        def body(ids: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.embed(ids) + self.places(torch.arange(ids.shape[1]))
            return hidden.tanh() if self.second is None else (hidden + self.second(ids.flip(0))).tanh()

        hidden = checkpoint(body, ids, use_reentrant=False) if self.again else body(ids)
        return hidden.square().sum() if self.bare else self.out(hidden).logsumexp(-1).square().sum()


FEW = torch.tensor([[3, 1, 3], [49, 3, 1]])
"""So few that input and logits are smaller than the table."""
MANY = torch.tensor([[3, 1, 3, 7], [49, 3, 1, 8]])


def allocated(model: Tied, passes: int, ids: torch.Tensor = FEW) -> int:
    """How many tables as large as the embedding the backward passes make."""
    table = model.embed.weight.nbytes
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        for _ in range(passes):
            model(ids).backward()
    assert found.profiler is not None
    results = found.profiler.kineto_results
    return sum(e.name() == "[memory]" and table <= e.nbytes() < 2 * table for e in results.events())


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("ids", [FEW, MANY])
@pytest.mark.parametrize("two", [False, True])
def test_gradients_are_those_of_autograd(bare: bool, again: bool, passes: int, ids: torch.Tensor, two: bool) -> None:
    plain, lean = Tied(bare, two), Tied(bare, two)
    lean.again = again
    allocated(plain, passes, ids)
    with lean_gradients(lean, CPU, 0):
        allocated(lean, passes, ids)
    fill_tables(lean.parameters())
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        found = lean.get_parameter(name).grad
        torch.testing.assert_close(found, parameter.grad)
        assert found is not None
        assert found.layout is torch.strided
    assert "forward" not in {**vars(lean.embed), **vars(lean.out)}
    assert not lean.places.sparse


def test_a_tied_gradient_is_held_once() -> None:
    assert allocated(Tied(), 1) == 3  # what this is about: the layer's, the rows in a table, their sum
    lean = Tied()
    with lean_gradients(lean, CPU, 0):
        assert allocated(lean, 1) == 1


@pytest.mark.parametrize(("ids", "there"), [(FEW, False), (MANY, True)])
def test_a_table_that_is_the_product_of_less_waits_for_the_end(ids: torch.Tensor, there: bool) -> None:
    lean, found = Tied(), []
    lean.places.register_full_backward_hook(lambda *_: found.append(lean.embed.weight.grad is not None))
    with lean_gradients(lean, CPU, 0):
        lean(ids).backward()
    assert found == [there]
    assert lean.embed.weight.grad is not None


def test_gradients_under_autocast_are_close_to_those_of_autograd() -> None:
    plain, lean = Tied(), Tied()
    with torch.autocast("cpu", torch.bfloat16):
        plain(FEW).backward()
        with lean_gradients(lean, CPU, 0):
            lean(FEW).backward()
    for name, parameter in plain.named_parameters():
        fill_tables(lean.parameters())
        torch.testing.assert_close(lean.get_parameter(name).grad, parameter.grad, atol=0.05, rtol=0.02)


def test_until_the_backward_pass_is_over_there_are_rows_and_no_table() -> None:
    lean = Tied()
    with lean_gradients(lean, CPU, 0):
        lean(torch.tensor([[2, 3], [3, 2]])).backward()
    found = lean.places.weight.grad
    assert found is not None
    assert found.is_sparse
    assert found._nnz() <= 4


def test_frozen_and_small_embeddings_are_left_alone() -> None:
    lean = Tied()
    lean.embed.weight.requires_grad_(False)
    with lean_gradients(lean, CPU, lean.embed.weight.nbytes):
        lean(torch.tensor([[2, 3]])).backward()
    assert lean.embed.weight.grad is None
    assert lean.places.weight.grad is not None
    assert not lean.places.weight.grad.is_sparse
