"""One file out of the two towers of a dual encoder: what clients open as ``model.onnx``.

Nothing is exported or quantized again: the graphs of the finished components are put side by side, and the similarities are
computed behind them, so that the combined file gives the very numbers of its parts.

Shapes: B pictures or recordings, T texts, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnx
from onnx import compose, helper, numpy_helper

from mmcompress.quantization import onnx_graph
from mmcompress.quantization.onnx_export import ExportError
from mmcompress.runtimes.precision import PRECISIONS

INPUTS = ("input_ids", "pixel_values", "input_features", "is_longer", "attention_mask")
"""The order of the combined file's inputs, which is Optimum's; others follow as they come."""
LEAST_OPSET = 18
"""From this version of the operator set on, reductions take their axes as an input."""


class Names(NamedTuple):
    """What the combined file calls its outputs.

    Attributes:
        logits_per_media: similarities, (B, T).
        logits_per_text: the same transposed, (T, B).
        media_embeds: normalised embeddings of the pictures or recordings, (B, D).
        text_embeds: normalised embeddings of the texts, (T, D).
    """

    logits_per_media: str = "logits_per_image"
    logits_per_text: str = "logits_per_text"
    media_embeds: str = "image_embeds"
    text_embeds: str = "text_embeds"

    @classmethod
    def of(cls, kind: str) -> Names:
        """The names for one kind of media, ``image`` or ``audio``, as the stock models have them."""
        return cls(f"logits_per_{kind}", "logits_per_text", f"{kind}_embeds", "text_embeds")


class CombinedSpec(Protocol):
    """What the combined file is made of. `families.base.Combined` is one.

    Attributes:
        media: Name of the vision or audio component.
        text: Name of the text component.
        kind: ``image`` or ``audio``.
        scale: Factor on the similarities of each of the media with the texts, already exponentiated.
        text_scale: Factor on those of each text with the media.
        bias: Added to the scaled similarities, or None.
    """

    @property
    def media(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def scale(self) -> float: ...
    @property
    def text_scale(self) -> float: ...
    @property
    def bias(self) -> float | None: ...


def combine_components(combined: CombinedSpec, folder: Path) -> list[Path]:
    """Writes ``model.onnx`` and its like with a suffix into a folder, each where both components are there in that precision.

    Returns:
        The files written.

    Raises:
        ExportError: see `combine_dual_encoder`.
    """
    written = []
    for suffix in PRECISIONS:
        media, text = (folder / f"{name}{suffix}.onnx" for name in (combined.media, combined.text))
        if media.exists() and text.exists():
            target = folder / f"model{suffix}.onnx"
            combine_dual_encoder(
                media,
                text,
                target,
                scale=combined.scale,
                text_scale=combined.text_scale,
                bias=combined.bias,
                names=Names.of(combined.kind),
            )
            written.append(target)
    return written


def combine_dual_encoder(
    media: Path,
    text: Path,
    target: Path,
    *,
    scale: float,
    bias: float | None = None,
    text_scale: float | None = None,
    names: Names = Names(),  # noqa: B008  (a tuple: it cannot be changed)
    embeds: tuple[str | None, str | None] = (None, None),
) -> None:
    """Puts two component files into one that also compares their embeddings.

    ``logits_per_text = scale * text_embeds @ media_embeds.T + bias`` with both embeddings normalised, and
    ``logits_per_media`` its transpose. The batch axes of the two stay separate. Either file may be float, dynamically
    quantized or hold QDQ nodes. Weights above ``EXTERNAL_DATA_LIMIT_BYTES`` go beside the file, as in the components.

    Args:
        media: The vision or audio component.
        text: The text component.
        target: Where to write.
        scale: Factor on the cosine similarities, already exponentiated.
        bias: Added to the similarities (SigLIP); None where the model has none.
        text_scale: Factor in ``logits_per_text`` where the model has another one there (CLAP has two scales); None for
            ``scale``.
        names: Names of the outputs.
        embeds: Which output of ``media`` and of ``text`` is the embedding, (B, D) and (T, D); None where it has only one.

    Raises:
        ExportError: The files do not fit together: an input of both has one name, versions of an operator set differ, the
            embedding is none of the outputs, or widths differ.
    """
    model = onnx.load(media)
    other = onnx.load(text)
    parts = (_Part.of(media, model, "media", embeds[0]), _Part.of(text, other, "text", embeds[1]))
    _check_pair(*parts)
    versions = {**parts[0].versions, **parts[1].versions}
    # The text goes into the first file, not both into a third: the weights are the file, and a third would hold them twice.
    graph = model.graph
    for part in parts:
        compose.add_prefix_graph(part.model.graph, f"{part.name}.", rename_inputs=False, inplace=True)
    inputs = [*graph.input, *other.graph.input]
    inputs.sort(key=lambda v: INPUTS.index(v.name) if v.name in INPUTS else len(INPUTS))
    graph.node.extend(other.graph.node)
    while other.graph.initializer:
        graph.initializer.append(other.graph.initializer.pop())
    del graph.input[:], graph.output[:], graph.value_info[:]
    graph.input.extend(inputs)
    _compare(graph, parts, (scale, scale if text_scale is None else text_scale), bias, names)
    graph.name, model.ir_version = "model", max(model.ir_version, other.ir_version)
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in versions.items())
    onnx_graph.save(model, target)


@dataclass(frozen=True)
class _Part:
    """One of the two files.

    Attributes:
        name: ``media`` or ``text``: what its nodes and values are prefixed with, since both files count theirs from 0.
        embedding: The name of its embedding, before the prefix.
        kind: The embedding's number type.
        width: The embedding's width; 0 where the graph does not say.
        batch: Name of the batch axis.
        versions: Operator sets by domain.
    """

    path: Path
    model: onnx.ModelProto
    name: str
    inputs: frozenset[str]
    embedding: str
    kind: int
    width: int
    batch: str
    versions: Mapping[str, int]

    @classmethod
    def of(cls, path: Path, model: onnx.ModelProto, name: str, embedding: str | None) -> _Part:
        outputs = {value.name: value for value in model.graph.output}
        if embedding is None and len(outputs) > 1:
            raise ExportError(f"{path}: has the outputs {', '.join(outputs)}; say which of them is the embedding")
        value = outputs.get(embedding or next(iter(outputs)))
        if value is None:
            raise ExportError(f"{path}: has no output {embedding}; its outputs are {', '.join(outputs)}")
        kind = value.type.tensor_type
        if len(kind.shape.dim) != 2:
            raise ExportError(f"{path}: {value.name} has {len(kind.shape.dim)} axes; an embedding has 2 (batch and width)")
        batch, width = kind.shape.dim
        versions = {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in model.opset_import}
        inputs = frozenset(v.name for v in model.graph.input)
        return cls(path, model, name, inputs, value.name, kind.elem_type, width.dim_value, batch.dim_param, versions)


def _check_pair(media: _Part, text: _Part) -> None:
    pair = f"{media.path} and {text.path}"
    for part in (media, text):
        if part.model.functions:
            raise ExportError(f"{part.path}: holds functions of its own, which cannot be combined; inline them first")
        if part.versions.get("", LEAST_OPSET) < LEAST_OPSET:
            raise ExportError(f"{part.path}: is of opset {part.versions['']}; allowed: {LEAST_OPSET} or newer")
    shared = sorted(media.inputs & text.inputs)
    if shared:
        raise ExportError(f"{pair} both take {', '.join(shared)}; one file cannot tell them apart")
    for domain in media.versions.keys() & text.versions.keys():
        found = (media.versions[domain], text.versions[domain])
        if found[0] != found[1]:
            raise ExportError(f"{pair} use versions {found[0]} and {found[1]} of operator set {domain or 'ai.onnx'}")
    if media.width and text.width and media.width != text.width:
        raise ExportError(f"{pair} give embeddings of {media.width} and {text.width} numbers, which cannot be compared")
    if media.kind != text.kind:
        raise ExportError(f"{pair} give embeddings of different number types; export both in one precision")


def _compare(
    graph: onnx.GraphProto, parts: tuple[_Part, _Part], scales: tuple[float, float], bias: float | None, names: Names
) -> None:
    """Adds the nodes behind the embeddings, and the outputs."""
    media, text = parts
    number = helper.tensor_dtype_to_np_dtype(media.kind)

    def constant(name: str, value: float | list[int], kind: Any = number) -> str:
        graph.initializer.append(numpy_helper.from_array(np.asarray(value, dtype=kind), name))
        return name

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        graph.node.append(helper.make_node(kind, inputs, [output], f"compare.{output}/{kind}", **attributes))
        return output

    axis = constant("compare.axis", [1], np.int64)
    for part, output in ((media, names.media_embeds), (text, names.text_embeds)):
        found = f"{part.name}.{part.embedding}"
        norm = node("ReduceL2", [found, axis], f"compare.{part.name}.norm", keepdims=1)
        node("Div", [found, norm], output)
    turned = node("Transpose", [names.media_embeds], "compare.turned", perm=[1, 0])
    cosines = node("MatMul", [names.text_embeds, turned], "compare.cosines")
    offset = constant("compare.bias", bias) if bias is not None else None
    for which, scale in zip(("media", "text"), scales, strict=True):
        factor = constant(f"compare.{which}.scale", scale)
        last = names.logits_per_text if which == "text" else "compare.media.logits"
        scaled = node("Mul", [cosines, factor], last if offset is None else f"compare.{which}.scaled")
        if offset is not None:
            node("Add", [scaled, offset], last)
    node("Transpose", ["compare.media.logits"], names.logits_per_media, perm=[1, 0])
    rows, columns = _batch_axes(graph, media, text)
    shapes: list[tuple[str, list[int | str]]] = [
        (names.logits_per_media, [rows, columns]),
        (names.logits_per_text, [columns, rows]),
        (names.text_embeds, [columns, media.width or "width"]),
        (names.media_embeds, [rows, media.width or "width"]),
    ]
    graph.output.extend(helper.make_tensor_value_info(name, media.kind, shape) for name, shape in shapes)


def _batch_axes(graph: onnx.GraphProto, media: _Part, text: _Part) -> tuple[str, str]:
    """Names of the two batch axes; where both files use one name, the inputs' axes are told apart first."""
    if media.batch != text.batch:
        return media.batch or "media_batch_size", text.batch or "text_batch_size"
    for value in graph.input:
        part = media if value.name in media.inputs else text
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param and axis.dim_param == part.batch:
                axis.dim_param = f"{part.name}_batch_size"
    return "media_batch_size", "text_batch_size"
