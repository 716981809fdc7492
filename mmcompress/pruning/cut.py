"""Cuts units and layers, and rebuilds a module of the new size.

Torch-Pruning's dependency graph (Fang et al. 2023, arXiv 2301.12900) finds what hangs together and cuts it; what is cut is
decided here. Afterwards a fresh stock module is built from the family's config for the new sizes and given the cut
weights, so that no attribute of the old sizes (number of heads, embed_dim) is left over.

Shapes: U units of a group, C = U * block channels of its root.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch_pruning as tp
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from mmcompress.errors import ModelError, TrainingError
from mmcompress.families.base import Coupled, Family, UnitGroup
from mmcompress.model import CompressedModel, reshape_like
from mmcompress.pruning.criteria.base import Criterion, Cut, Probe
from mmcompress.pruning.reconstruct import reconstruct
from mmcompress.pruning.units import CoupledGroup, Shares, Slice, Tap


class _SortedLayerNorm(tp.pruner.function.BasePruningFunc):
    """Cuts a LayerNorm and keeps the order of what stays.

    Torch-Pruning 1.6.1 reads the kept channels out of a set without sorting them, and a set of ints is not in order once
    it is small beside its largest number: LayerNorm(768) cut to 256 comes out permuted, and the model silently wrong.
    """

    def prune_out_channels(self, layer: nn.LayerNorm, idxs: Sequence[int]) -> nn.LayerNorm:
        keep = sorted(set(range(layer.normalized_shape[-1])) - set(idxs))
        if layer.elementwise_affine:
            layer.weight = self._prune_parameter_and_grad(layer.weight, keep, -1)
            if layer.bias is not None:
                layer.bias = self._prune_parameter_and_grad(layer.bias, keep, -1)
        layer.normalized_shape = (*layer.normalized_shape[:-1], len(keep))
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.LayerNorm) -> int:
        return layer.normalized_shape[-1]

    get_in_channels = get_out_channels


def trace(family: Family, module: PreTrainedModel, tower: str) -> Any:
    """Torch-Pruning's dependency graph of one tower, from one forward pass with random inputs on the CPU."""
    module.requires_grad_(True)  # the graph is read off autograd's: a frozen weight would be missing from it
    part, inputs, unwrapped = family.tracing(module, tower, family.example_batch(module.config, 2))
    # Only autograd's graph is looked at, never what it keeps for the gradients: gigabytes for 30 seconds of sound.
    forget = torch.autograd.graph.saved_tensors_hooks(lambda kept: None, lambda forgotten: forgotten)
    with torch.enable_grad(), forget:
        return tp.DependencyGraph().build_dependency(
            part,
            inputs,
            # Without it Torch-Pruning swallows an error of the forward pass and calls again with other arguments.
            forward_fn=lambda traced, given: traced(*given),
            unwrapped_parameters=[(p, p.dim() - 1) for p in unwrapped],
            customized_pruners={nn.LayerNorm: _SortedLayerNorm()},
            verbose=False,
        )


def couple(graph: Any, module: PreTrainedModel, group: UnitGroup) -> CoupledGroup:
    """What goes with the units of a group.

    Raises:
        ModelError: the graph found less than a whole dimension of some weight, so that a cut would go wrong.
    """
    if group.explicit:
        return _spelled_out(module, group)
    names = {id(p): name for name, p in module.named_parameters()}
    slices: dict[tuple[int, int], Slice] = {}
    readers: list[Tap] = []
    norms: list[Tap] = []
    for root in (group.root, *group.also):
        for item in _pruning_group(graph, root, range(group.size)):
            target = item.dep.target
            index = torch.tensor(item.idxs)
            unit = group.unit_of(torch.tensor(item.root_idxs))
            for parameter, dim in _cut_parameters(target, item.dep.handler.__name__):
                if sorted(item.idxs) != list(range(parameter.shape[dim])):
                    raise ModelError(
                        f"prune: Torch-Pruning's graph couples {group.name} with only {len(set(item.idxs))} of "
                        f"{parameter.shape[dim]} channels of {names.get(id(parameter))}; this axis cannot be cut safely"
                    )
                slices.setdefault((id(parameter), dim), Slice(names[id(parameter)], parameter, dim, index, unit))
            if isinstance(target.module, nn.LayerNorm):
                norms.append(Tap(target.module, "output", index, unit))
            elif (
                isinstance(target.module, (nn.Linear, nn.Conv1d, nn.Conv2d)) and item.dep.handler.__name__ == "prune_in_channels"
            ):
                readers.append(Tap(target.module, "input", index, unit))
    # On a residual stream every reader sits behind a LayerNorm, whose output it sees; q, k, v and fc1 would count it often.
    taps = {id(tap.module): tap for tap in norms or readers}
    return CoupledGroup(group, tuple(slices.values()), tuple(taps.values()))


def _spelled_out(module: PreTrainedModel, group: UnitGroup) -> CoupledGroup:
    """The same for a group whose family names all weights that are cut.

    Raises:
        ModelError: a weight does not have the channels that the family says.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    slices, taps = [], []
    for part in group.explicit:
        index = torch.arange(group.units * part.block)
        unit = index // part.block
        for parameter, dim in _explicit_parameters(part):
            if parameter.shape[dim] != len(index):
                raise ModelError(
                    f"prune: {names[id(parameter)]} has {parameter.shape[dim]} channels, not {group.units} units of {part.block}"
                )
            slices.append(Slice(names[id(parameter)], parameter, dim, index, unit))
        if part.dim == 1:
            taps.append(Tap(part.module, "input", index, unit))
    return CoupledGroup(group, tuple(slices), tuple(taps))


def _explicit_parameters(part: Coupled) -> list[tuple[nn.Parameter, int]]:
    weight, bias = part.module.weight, getattr(part.module, "bias", None)
    found = [(weight, part.dim)] + ([(bias, 0)] if part.dim == 0 and bias is not None else [])
    return cast(list[tuple[nn.Parameter, int]], found)


def _cut_explicit(group: UnitGroup, keep: Sequence[int]) -> None:
    """Cuts the weights that a family names; sizes that modules remember follow, as far as they are Linear's."""
    for part in group.explicit:
        channels = torch.tensor([u * part.block + i for u in keep for i in range(part.block)])
        for parameter, dim in _explicit_parameters(part):
            parameter.data = parameter.data.index_select(dim, channels).clone()
            parameter.grad = None
        if isinstance(part.module, nn.Linear):
            part.module.out_features, part.module.in_features = part.module.weight.shape


def _pruning_group(graph: Any, root: nn.Module, channels: Sequence[int]) -> Any:
    return graph.get_pruning_group(root, graph.get_pruner_of_module(root).prune_out_channels, list(channels))


def _cut_parameters(target: Any, how: str) -> list[tuple[torch.Tensor, int]]:
    """The parameters of a graph node with the dimension that a cut shortens."""
    part = target.module
    if isinstance(part, nn.Parameter):
        return [(part, target.pruning_dim % part.dim())]
    if isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        if how == "prune_in_channels":
            return [(part.weight, 1)]
        return [(part.weight, 0)] + ([(part.bias, 0)] if part.bias is not None else [])
    if isinstance(part, (nn.LayerNorm, nn.BatchNorm2d)):
        return [(p, 0) for p in (part.weight, part.bias) if p is not None]
    if isinstance(part, nn.Embedding):
        return [(part.weight, 1)]
    if any(True for _ in part.parameters()):
        raise ModelError(f"prune: do not know which weights of a {type(part).__name__} go with its units")
    return []  # reshape, addition and the like


def cut_units(graph: Any, group: UnitGroup, keep: Sequence[int]) -> None:
    """Cuts all units but those in ``keep`` (unit numbers, not channels), and everything that goes with them."""
    if group.explicit:
        _cut_explicit(group, keep)
        return
    kept = set(keep)
    drop = sorted(channel for u in range(group.units) if u not in kept for channel in group.channels(u))
    for root in (group.root, *group.also):
        # The graph mostly finds query and key from value; a root that it did not reach is cut by a group of its own.
        if drop and graph.get_out_channels(root) == group.size:
            _pruning_group(graph, root, drop).prune()
    if group.strided and group.head_size is not None:
        _narrow(group, len(kept))


def _narrow(group: UnitGroup, size: int) -> None:
    """Has attention give the products that it gave, where heads have become narrower.

    Stock attention divides query times key by the square root of a head's size d, which goes from d to d': the query takes the
    factor sqrt(d' / d), so that what is left is divided by sqrt(d) as before.
    """
    assert group.head_size is not None
    query = cast(nn.Linear, group.also[0])
    with torch.no_grad():
        for parameter in (query.weight, query.bias):
            if parameter is not None:
                parameter.mul_((size / group.units) ** 0.5)
    setattr(*group.head_size, size)


def best(scores: torch.Tensor, count: int) -> list[int]:
    """The places of the ``count`` highest scores, in rising order; of equal scores the first ones."""
    order = torch.sort(scores, descending=True, stable=True).indices[:count]
    return sorted(int(i) for i in order)


def unit_shape(group: CoupledGroup) -> tuple[object, ...]:
    """What is the same for two groups if and only if one of their units is cut from weights of the same shapes.

    Units of different shape (heads and neurons, the neurons of a narrow and of a wide stage) are not ranked together: how their
    scores compare says more about their shapes than about their worth (Isomorphic Pruning, Fang et al. 2024, arXiv 2407.04616).
    How many units a group has left does not matter.
    """
    shapes = []
    for part in group.slices:
        shape = list(part.parameter.shape)
        shape[part.dim] = len(part.index) // group.units
        shapes.append((part.dim, tuple(shape)))
    return group.group.axis, group.group.block, tuple(sorted(shapes))


def choose_over_tower(scores: Sequence[torch.Tensor], total: int, step: int, one_scale: bool = False) -> list[list[int]]:
    """Which units stay when groups of units of one shape are ranked together.

    Scores are divided by their group's mean unless they are of one scale: magnitudes and gradients differ from layer to layer.
    Units go in chunks of
    ``step`` (a group's best ones first), so that every group keeps a multiple of it, and at least one chunk.

    Args:
        scores: for each group a tensor of shape (U,).
        total: how many units stay in all groups together.
        step: what each group's count must be a multiple of.
        one_scale: whether scores of different groups compare as they are.
    """
    chunks = []  # (first of its group, worth, group, size)
    for number, own in enumerate(scores):
        mean = own.mean()
        ranked = torch.sort(own if one_scale or mean <= 0 else own / mean, descending=True).values
        for place, part in enumerate(ranked.split(step)):
            chunks.append((place == 0, float(part.mean()), number, len(part)))
    counts = [0] * len(scores)
    for first, _, number, size in sorted(chunks, key=lambda chunk: (not chunk[0], -chunk[1], chunk[2])):
        if first or sum(counts) < total:
            counts[number] += size
    return [best(own, count) for own, count in zip(scores, counts, strict=True)]


def prune_units(model: CompressedModel, shares: Shares, criterion: Criterion, probe: Probe, fit: bool = False) -> dict[str, Any]:
    """Cuts FFN units, heads or the residual width of ``model`` in place; returns facts for the report.

    Args:
        fit: whether readers are fitted by least squares; else the criterion makes up for what goes, if it does.

    Raises:
        ModelError: the graph does not couple the units as they must be.
        TrainingError: a score is not a number.
    """
    model.module.requires_grad_(True)
    groups = {tower: groups_of(model, tower, shares) for tower in shares.towers()}
    graphs = {
        tower: trace(model.family, model.module, tower) if any(not g.explicit for g in own) else None
        for tower, own in groups.items()
    }
    # Once more: tracing may put parts that can be cut in the place of stock ones.
    groups = {tower: groups_of(model, tower, shares) for tower in graphs}
    coupled = [couple(graphs[tower], model.module, group) for tower, own in groups.items() for group in own]
    model.module.to(probe.device)
    scores = criterion.unit_scores(coupled, probe)
    model.module.to("cpu")
    scores = [_finite(s, c.group.name, c.units) for c, s in zip(coupled, scores, strict=True)]
    cuts: dict[str, list[Cut]] = {}
    for tower in graphs:
        own = [(c, s) for c, s in zip(coupled, scores, strict=True) if c.group.tower == tower]
        chosen = _choose(own, tower, shares, criterion.one_scale)
        cuts[tower] = [Cut(c, tuple(keep)) for (c, _), keep in zip(own, chosen, strict=True)]
    every = [cut for own in cuts.values() for cut in own]
    facts = reconstruct(every, probe) if fit else criterion.compensate(every, probe)
    for tower, graph in graphs.items():
        for cut in cuts[tower]:
            cut_units(graph, cut.group.group, cut.keep)
    return facts


def groups_of(model: CompressedModel, tower: str, shares: Shares) -> list[UnitGroup]:
    """The groups that an axis cuts; a residual width goes with heads of every layer, whole ones or channels of all of them.

    Raises:
        ModelError: heads are to become narrower, and the family does not say where their size is remembered.
    """
    heads = model.family.unit_groups(model.module, tower, "heads") if shares.axis == "width" else []
    if shares.narrows:
        if any(group.explicit or group.head_size is None for group in heads):
            raise ModelError(f"prune: heads: the family {model.family.name} cannot make heads narrower; use heads: fewer")
        heads = [replace(group, block=group.units, strided=True) for group in heads]
    return [*heads, *model.family.unit_groups(model.module, tower, shares.axis)]


def _choose(
    own: Sequence[tuple[CoupledGroup, torch.Tensor]], tower: str, shares: Shares, one_scale: bool = False
) -> list[list[int]]:
    """For each group of one tower the units that stay."""
    if shares.scope == "tower":
        return _choose_by_shape(own, tower, shares, one_scale)
    first = own[0][0].group
    if shares.axis != "width" or first.axis != "heads":
        # Where layers differ in size (stages of a Swin tower or a ResNet) one key sets all sizes: they are cut in proportion.
        least = min(len(s) for _, s in own)
        kept = shares.kept(tower, least)
        return [best(s, kept * len(s) // least if len(s) % least == 0 else shares.kept(tower, len(s))) for _, s in own]
    heads = shares.kept(tower, own[-1][0].group.size // first.block)
    return [best(s, heads if c.group.axis == "heads" else heads * first.block) for c, s in own]


def _choose_by_shape(
    own: Sequence[tuple[CoupledGroup, torch.Tensor]], tower: str, shares: Shares, one_scale: bool
) -> list[list[int]]:
    """The same where units are ranked over a tower: the same share of each class of units of one shape."""
    classes: dict[tuple[object, ...], list[int]] = {}
    for place, (group, _) in enumerate(own):
        classes.setdefault(unit_shape(group), []).append(place)
    chosen: list[list[int]] = [[] for _ in own]
    for places in classes.values():
        scores = [own[place][1] for place in places]
        total = shares.kept(tower, sum(map(len, scores)))
        for place, keep in zip(places, choose_over_tower(scores, total, shares.step, one_scale), strict=True):
            chosen[place] = keep
    return chosen


def _finite(scores: torch.Tensor, what: str, units: int) -> torch.Tensor:
    if tuple(scores.shape) != (units,):
        raise ValueError(f"criterion: gave scores of shape {tuple(scores.shape)} for the {units} units of {what}")
    if not bool(torch.isfinite(scores.double()).all()):
        raise TrainingError(f"prune: scores of {what} are not numbers; are the weights and the data sound?")
    return scores.detach().cpu().double()


def prune_layers(model: CompressedModel, shares: Shares, criterion: Criterion, probe: Probe) -> dict[str, list[int]]:
    """Drops whole layers of ``model`` in place; returns for each tower the old numbers of the layers that stay.

    Raises:
        TrainingError: a score is not a number.
    """
    model.module.requires_grad_(True)
    stacks = {tower: model.family.layers(model.module, tower) for tower in shares.towers()}
    model.module.to(probe.device)
    probe.keep = {tower: shares.kept(tower, len(layers)) for tower, layers in stacks.items()}
    scores = criterion.layer_scores({tower: list(layers) for tower, layers in stacks.items()}, probe)
    model.module.to("cpu")
    kept = {}
    for tower, layers in stacks.items():
        own = _finite(scores[tower], f"the {tower} tower's layers", len(layers))
        kept[tower] = best(own, probe.keep[tower])
        model.family.drop_layers(model.module, tower, kept[tower])
    return kept


def rebuild(model: CompressedModel, allow_custom: bool) -> None:
    """Puts the cut weights of ``model`` into a fresh module of the family's stock class, in place.

    Where no stock config has these shapes, the fresh module is shaped as `mmcompress.model.load` will do it.

    Raises:
        ModelError: no stock config has these shapes, and a custom model was not allowed.
    """
    old, family = model.module, model.family
    config = family.shrunk_config(old)
    model.custom = config is None
    if config is None:
        if not allow_custom:
            raise ModelError(
                f"prune: no config of {family.model_class().__name__} has these shapes (sizes differ between layers, or heads no "
                "longer divide the width); cut the same in every layer, or set allow_custom: true: then only mmcompress and ONNX "
                "runtimes load the result"
            )
        config = _custom_config(family, old)
    weights = old.state_dict()
    with torch.random.fork_rng(devices=[]):
        # Building a module draws random weights: later steps must not depend on whether this one did.
        fresh = family.model_class()(config)
    if model.custom:
        reshape_like(fresh, {name: list(values.shape) for name, values in weights.items()})
    fresh.load_state_dict(weights, strict=True)
    if fresh.config._attn_implementation != old.config._attn_implementation:
        fresh.set_attn_implementation(old.config._attn_implementation)
    if getattr(old, "generation_config", None) is not None:
        fresh.generation_config = old.generation_config
    family.settle(old, fresh)
    model.module = fresh.eval()


def _custom_config(family: Family, module: PreTrainedModel) -> PretrainedConfig:
    """The config that a custom model's shapes are laid over: the old one, with the layers that are left."""
    with torch.device("meta"):
        stock = family.model_class()(module.config)
    for tower in family.towers:
        if "depth" not in family.tower_axes(tower):
            continue
        family.drop_layers(stock, tower, range(len(family.layers(module, tower))))
    config = family.shrunk_config(stock)
    if config is None:
        raise ModelError(f"prune: the family {family.name} finds no config for its own stock module")
    return config


def sizes(model: CompressedModel) -> dict[str, dict[str, int | list[int]]]:
    """For each tower its sizes by axis, read from the module; a list of one number a layer where layers differ."""
    found: dict[str, dict[str, int | list[int]]] = {}
    for tower in model.family.towers:
        found[tower] = {}
        for axis in model.family.tower_axes(tower):
            if axis == "depth":
                found[tower][axis] = len(model.family.layers(model.module, tower))
                continue
            units = [g.units for g in model.family.unit_groups(model.module, tower, axis)]
            found[tower][axis] = units if len(set(units)) > 1 else units[0]
    return found


def smallest(found: Mapping[str, Mapping[str, int | list[int]]]) -> dict[str, dict[str, int]]:
    """Sizes with the smallest layer's number where layers differ."""
    return {t: {a: min(s) if isinstance(s, list) else s for a, s in axes.items()} for t, axes in found.items()}
