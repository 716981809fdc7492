"""Export of one component (a tower with its projection) to ONNX.

Shapes: B batch, S sequence length, D embedding size.
"""

import ast
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import onnx
import onnx_ir
import torch
from torch import nn

from mmcompress.quantization.onnx_file import write_model

DEFAULT_OPSET = 20
EXTERNAL_DATA_LIMIT_BYTES = 1_800_000_000
"""Weights above this go beside the file: protobuf cannot hold 2 GiB, and the graph needs room too."""
EXTERNAL_DATA_SUFFIX = "_data"
"""What follows the name of the file whose weights lie beside it: transformers.js and Optimum look for ``model.onnx_data``."""

_SCOPES_KEY = "pkg.torch.onnx.name_scopes"


class ExportError(RuntimeError):
    """The exporter made a graph that does not have the axes that were asked for."""


class ComponentSpec(Protocol):
    """What is needed to export a component. `families.base.Component` offers it.

    Attributes:
        name: For messages.
        module: Its `forward` takes the inputs by position and returns a tuple of the outputs in order.
        inputs: Names of the graph's inputs.
        outputs: Names of the graph's outputs.
        dynamic_axes: Input or output name -> {axis: name of the axis}. Axes with one name have one size.
    """

    @property
    def name(self) -> str: ...
    @property
    def module(self) -> nn.Module: ...
    @property
    def inputs(self) -> tuple[str, ...]: ...
    @property
    def outputs(self) -> tuple[str, ...]: ...
    @property
    def dynamic_axes(self) -> Mapping[str, Mapping[int, str]]: ...


def export_component(
    component: ComponentSpec,
    example_inputs: Mapping[str, torch.Tensor],
    path: Path,
    *,
    opset: int = DEFAULT_OPSET,
    beside: bool = False,
) -> None:
    """Writes a component as one ONNX file, with the batch (and what else is named) left open.

    Nodes are named `<module path>/<op type>`, so that tools that work on the file can speak of the model's layers.
    Weights above `EXTERNAL_DATA_LIMIT_BYTES` are written to `<path>_data`. The graph holds that file's name, so
    rename the folder afterwards, not the file.

    Args:
        component: What to export. Its module is left as it was found.
        example_inputs: A tensor for each input. Dynamic axes must have a size of at least 2: torch.export takes a
            size of 0 or 1 for a constant.
        path: Where to write.
        opset: Version of the default operator set.
        beside: Whether weights lie in `<path>_data` whatever their size: a file that others are made from is read without them.

    Raises:
        ValueError: An input is missing or unknown, or a dynamic axis has a size below 2.
        ExportError: An axis that should be dynamic is a constant in the graph.
        torch.onnx.OnnxExporterError: The module does something that cannot be exported.
    """
    _check_examples(component, example_inputs)
    module = component.module
    arguments = tuple(example_inputs[name] for name in component.inputs)
    axes = [dict(component.dynamic_axes.get(name, {})) for name in component.inputs]
    with _eval_mode(module), eager_attention(module), warnings.catch_warnings():
        # The exporter warns about its own internals (pytree, shared axis names); none of it is the user's doing.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            arguments,
            input_names=list(component.inputs),
            output_names=list(component.outputs),
            opset_version=opset,
            dynamo=True,
            dynamic_shapes=_nest_like_signature(module, axes),
            verbose=False,
        )
    if program is None:  # only the type allows it: with dynamo=True there is always a program
        raise ExportError(f"{component.name}: the exporter returned nothing")
    _name_axes(component, program.model.graph)
    _name_nodes(program.model.graph)
    _strip_metadata(program.model)
    _save(program.model, path, beside)


def _save(model: onnx_ir.Model, path: Path, beside: bool) -> None:
    values = dict(model.graph.initializers)
    if beside or _weight_bytes(model.graph) > EXTERNAL_DATA_LIMIT_BYTES:
        onnx_ir.save(model, path, external_data=f"{path.name}{EXTERNAL_DATA_SUFFIX}")
        return
    model.graph.initializers.clear()

    def tensors() -> Iterator[onnx.TensorProto]:
        for name, value in values.items():
            if value.const_value is None:
                raise ExportError(f"{path.name}: the weight {name} has no value")
            tensor = onnx_ir.to_proto(value.const_value)
            tensor.name = name
            yield tensor

    write_model(onnx_ir.to_proto(model), tensors, path)


def _check_examples(component: ComponentSpec, example_inputs: Mapping[str, torch.Tensor]) -> None:
    missing = [name for name in component.inputs if name not in example_inputs]
    unknown = [name for name in example_inputs if name not in component.inputs]
    if missing or unknown:
        raise ValueError(
            f"{component.name}: example inputs must be exactly {list(component.inputs)}; missing {missing}, unknown {unknown}"
        )
    for name in component.inputs:
        shape = tuple(example_inputs[name].shape)
        for axis, label in component.dynamic_axes.get(name, {}).items():
            if shape[axis] < 2:
                raise ValueError(
                    f"{component.name}: axis {axis} ({label}) of the example input {name} has size {shape[axis]};"
                    " a dynamic axis needs an example of 2 or more"
                )


def _nest_like_signature(module: nn.Module, axes: Sequence[dict[int, str]]) -> tuple[Any, ...]:
    """The axes as torch.export wants them: what `*args` takes (a decoder's flat cache) is one nested tuple."""
    for position, parameter in enumerate(inspect.signature(module.forward).parameters.values()):
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            return (*axes[:position], tuple(axes[position:]))
    return tuple(axes)


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Switches dropout and the like off, and gives every submodule its own mode back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def eager_attention(module: nn.Module) -> Iterator[None]:
    """Has transformers' modules write attention out as products and a softmax.

    The graph of SDPA's decomposition holds 36 more Slice and 24 more Reshape nodes for 12 layers, and no kernel of
    ONNX Runtime makes up for them: it is as fast at best.
    """
    configs = _attention_configs(module)
    before = [(config, config._attn_implementation) for config in configs]
    for config in configs:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        # Parents come first, as in modules(): setting a parent's attention sets its sub-configs' as well.
        for config, implementation in before:
            config._attn_implementation = implementation


def _attention_configs(module: nn.Module) -> list[Any]:
    """The distinct transformers configs of a module and its parts, parents first."""
    configs: dict[int, Any] = {}
    for part in module.modules():
        config = getattr(part, "config", None)
        if hasattr(config, "_attn_implementation"):
            configs.setdefault(id(config), config)
    return list(configs.values())


def _name_axes(component: ComponentSpec, graph: onnx_ir.Graph) -> None:
    """Checks that every dynamic axis is open in the graph, and gives it its name."""
    values = dict(zip((*component.inputs, *component.outputs), (*graph.inputs, *graph.outputs), strict=True))
    for name, axes in component.dynamic_axes.items():
        shape = values[name].shape
        if shape is None:
            raise ExportError(f"{component.name}: the graph gives no shape for {name}")
        for axis, label in axes.items():
            if isinstance(shape[axis], int):
                raise ExportError(f"{component.name}: axis {axis} ({label}) of {name} became the constant {shape[axis]}")
            shape[axis] = label


def _name_nodes(graph: onnx_ir.Graph) -> None:
    """Names nodes after the module they came from. The exporter keeps that path in metadata, which optimizers drop."""
    taken: set[str] = set()
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES_KEY, "[]"))
        # The last scope is the operator's own; the ones before it are the modules, outermost ('') first.
        path = scopes[-2] if len(scopes) > 1 else ""
        name = stem = f"{path}/{node.op_type}" if path else str(node.op_type)
        count = 1
        while name in taken:
            count += 1
            name = f"{stem}_{count}"
        taken.add(name)
        node.name = name


def _strip_metadata(model: onnx_ir.Model) -> None:
    """Drops the exporter's notes: they hold stack traces with paths of this machine, and weigh half a megabyte."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def _weight_bytes(graph: onnx_ir.Graph) -> int:
    tensors = (value.const_value for value in graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
