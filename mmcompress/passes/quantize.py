"""Quantizes the exported components after training: integer weights and inputs, integer weights alone, or half precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

from pydantic import Field, model_validator

from mmcompress.context import Context
from mmcompress.errors import DataError, RecipeError
from mmcompress.passes._int8 import ReduceRange, reduced
from mmcompress.passes._weights import OURS, Algorithm, Backend, Rounding, backend_mistakes, quantized_weights
from mmcompress.passes.base import Pass
from mmcompress.quantization.naming import broken
from mmcompress.quantization.schemes import FIXED, WEIGHT_BYTES, ArrangementName, Scheme, scheme_of

if TYPE_CHECKING:
    import numpy as np

    from mmcompress.families.base import Component, Family
    from mmcompress.model import CompressedModel
    from mmcompress.quantization.result import QuantizationResult


class Quantize(Pass):
    """Exports each component, then quantizes it into ``onnx/<component><suffix>.onnx``, named as transformers.js expects."""

    changes: ClassVar[Literal["weights", "files"]] = "files"
    makes_files: ClassVar[bool] = True

    name: Literal["quantize"] = Field("quantize", alias="pass", description="The pass's name.")
    scheme: Scheme | dict[str, Scheme] = Field(
        "int8-static",
        description="int8-static: ranges from calibration examples, QDQ nodes. int8-dynamic: ranges at run time, needs no data. "
        "Under either, decoders, which are called once a token, get int8 weights alone. int8-weight-only and int4-weight-only: "
        "weights in blocks, activations in float. float16: weights and arithmetic, but for LayerNorm and Softmax. bfloat16: "
        "weights alone. A mapping names a scheme by tower or component, and leaves the others in float32.",
    )
    samples: int = Field(256, ge=8, le=100_000, description="Calibration examples for int8-static, gptq and awq (8 to 100000).")
    block_size: Literal[32, 64, 128] | None = Field(
        None,
        description="Weights that share a scale under the weight-only schemes: 32, 64 or 128. Smaller is more exact and larger. "
        "Left out: 32 at 4 bits, 128 at 8. Layers that it does not divide take a smaller one where that takes less space.",
    )
    algorithm: Algorithm = Field(
        "rtn",
        description="How the weight-only schemes round. rtn: to the nearest, needs no data. gptq: later weights make up for the "
        "errors of earlier ones, by calibration examples. awq: finer where inputs are large, by calibration examples. autoround "
        "and autotune (rtn, then gptq, until `min_cosine` is kept) are of the backend neural-compressor.",
    )
    backend: Backend = Field(
        "mmcompress",
        description="What rounds the weights under the weight-only schemes. neural-compressor: Intel's, which needs the extra of "
        "that name; `check` tries the algorithm on a small model, and refuses it where it does not work on this machine.",
    )
    include: list[str] = Field(
        default_factory=list,
        description="Layers to quantize, all where empty; written as in `exclude`, which comes first.",
    )
    exclude: list[str] = Field(
        default_factory=list,
        description="Layers to leave in float: dotted module paths such as `visual_projection` or `layers.0`, globs, or regular "
        "expressions after `re:`, such as `re:layers\\.(0|11)\\.`.",
    )
    placement: Literal["fixed", "measure"] | dict[str, ArrangementName] = Field(
        "fixed",
        description="Where int8 goes in the graph of what an int8 scheme quantizes. fixed: a placement that is good on most "
        "machines and that every runtime runs. measure: the known placements are timed on this machine, each in a process of its "
        "own, and the fastest that keeps `min_cosine` stays. A mapping by tower or component: one that was measured before; the "
        "`-fused` ones are for ONNX Runtime alone.",
    )
    min_cosine: float = Field(
        0.995,
        ge=0,
        le=1,
        description="The least mean cosine (0 to 1) of outputs to those of the float file on calibration examples that a "
        "measured placement must keep.",
    )
    threads: int = Field(2, ge=1, le=1024, description="Threads of the processes that placements are timed in.")

    reduce_range: ReduceRange = "auto"

    @model_validator(mode="after")
    def _patterns_compile(self) -> Self:
        for field, patterns in (("include", self.include), ("exclude", self.exclude)):
            for text in broken(patterns):
                raise ValueError(f"{field}: {text}")
        return self

    @model_validator(mode="after")
    def _algorithm_has_weights(self) -> Self:
        schemes = [self.scheme] if isinstance(self.scheme, str) else self.scheme.values()
        rounded = any(scheme.endswith("weight-only") for scheme in schemes)
        # One int8 scheme for a whole model gives decoders int8 weights alone.
        if self.algorithm not in OURS and self.backend == "mmcompress":
            raise ValueError(f"algorithm: {self.algorithm} needs `backend: neural-compressor`; here are {', '.join(OURS)}")
        plain = self.algorithm == "rtn" and self.backend == "mmcompress"
        if not plain and not (rounded or self.scheme in FIXED if isinstance(self.scheme, str) else rounded):
            found = f"algorithm: {self.algorithm}" if self.algorithm != "rtn" else f"backend: {self.backend}"
            raise ValueError(f"{found} is of the weight-only schemes, and `scheme` names none")
        return self

    def weight_bytes(self) -> float:
        """Bytes of one weight; of the widest where towers differ."""
        schemes = [self.scheme] if isinstance(self.scheme, str) else list(self.scheme.values())
        return max(WEIGHT_BYTES[scheme] for scheme in schemes)

    def check_against(self, family: Family, sizes: Mapping[str, Mapping[str, int]]) -> list[str]:
        """What is wrong with ``algorithm`` under ``backend`` on this machine."""
        return backend_mistakes(self.algorithm) if self.backend == "neural-compressor" else []

    def settled(self, family: Family, config: Any) -> tuple[Pass, str]:
        """The pass itself, once the names in ``scheme`` and ``placement`` are those of towers or components.

        Raises:
            RecipeError: one is neither.
        """
        if not self._named() <= set(family.towers):
            from mmcompress.families.base import without_weights  # needs torch, as plans do

            self._check_names(family, family.components(without_weights(family, config)))
        return self, ""

    def _named(self) -> set[str]:
        return {name for field in (self.scheme, self.placement) if not isinstance(field, str) for name in field}

    def _check_names(self, family: Family, parts: dict[str, Component]) -> None:
        known = [*family.towers, *(name for name in parts if name not in family.towers)]
        for field in ("scheme", "placement"):
            found = getattr(self, field)
            for name in () if isinstance(found, str) else found:
                if name not in known:
                    allowed = f"allowed: {', '.join(known)}"
                    raise RecipeError(f"quantize: {field}: {name!r} is neither a tower nor a component; {allowed}")

    def run(self, model: CompressedModel, context: Context) -> tuple[CompressedModel, dict[str, Any]]:
        """Exports and quantizes; the torch model stays as it is.

        Raises:
            DataError: no folder to write to, or int8-static without task or data.
            RecipeError: ``scheme`` names what the model has not, or a pattern means nothing.
        """
        from dataclasses import asdict, replace

        from mmcompress.quantization.onnx_export import export_component  # needs torch

        if context.workdir is None:
            raise DataError("quantize: needs a folder to write to; call it from a recipe, or give Context(workdir=...)")
        # The weights stay as they are: a copy of them would only take memory.
        new = replace(model, history=list(model.history))
        folder, scratch = Path(context.workdir) / "onnx", Path(context.workdir) / "float"
        folder.mkdir(parents=True, exist_ok=True)
        scratch.mkdir(parents=True, exist_ok=True)
        result: dict[str, Any] = {}
        parts, narrow = model.family.components(model.module), reduced(self.reduce_range)
        self._check_names(model.family, parts)
        for name, part in context.reporter.track(parts.items(), "quantizing", len(parts)):
            scheme, suffix = scheme_of(self.scheme, name, part.tower, part.decoder)
            source, target = scratch / f"{name}.onnx", folder / f"{name}{suffix}.onnx"
            example = model.family.example_inputs(model.module.config, part, 2)
            if scheme == "float32":
                export_component(part, example, target)
                continue
            export_component(part, example, source)
            facts: dict[str, Any] = {"scheme": scheme}
            if scheme in FIXED:
                if self.placement == "measure":
                    place, measured = self._measured(scheme, source, target, narrow, model, context, part)
                    if place is None or measured is None:  # nothing keeps the bound: the float file stays
                        source.rename(folder / f"{name}.onnx")
                        continue
                    found = measured
                else:
                    place = self._place(scheme, part)
                    found = self._arranged(place, source, target, narrow, model, context, name)
                ranges = "from calibration" if place.startswith("static") else "at run time"
                facts |= {"placement": place, "ranges": ranges}
            else:
                found = self._quantize(scheme, source, target, part, partial(self._calibration, model, context, name))
            source.unlink()
            result[name] = {**facts, **asdict(found)}
        for pattern in (*self.include, *self.exclude):
            # Each component is quantized by itself: only a pattern that no component knows is a mistake.
            if result and all(pattern in one["unmatched_exclude"] for one in result.values()):
                field = "exclude" if pattern in self.exclude else "include"
                raise RecipeError(f"quantize: {field}: {pattern!r} matches no layer of the model")
        new.onnx = folder
        return new, {"weight_bits": 7 if narrow else 8, "components": result}

    def _quantize(
        self, scheme: Scheme, source: Path, target: Path, part: Component, feeds: Callable[[], Iterator[dict[str, np.ndarray]]]
    ) -> QuantizationResult:
        """One component's file by a scheme without int8 activations; ``feeds`` gives calibration batches."""
        from mmcompress.quantization.half import to_bfloat16, to_float16

        if scheme in ("int8-weight-only", "int4-weight-only"):
            bits: Literal[4, 8] = 8 if scheme == "int8-weight-only" else 4
            how = Rounding(bits, self.block_size, self.algorithm, self.backend, self.min_cosine, self.include, self.exclude)
            return quantized_weights(how, source, target, part, feeds)
        halve = to_float16 if scheme == "float16" else to_bfloat16
        try:
            return halve(source, target, include=self.include, exclude=self.exclude)
        except ValueError as e:
            raise RecipeError(f"quantize: {part.name}: {e}") from e

    def _arranged(
        self,
        place: ArrangementName,
        source: Path,
        target: Path,
        narrow: bool,
        model: CompressedModel,
        context: Context,
        name: str,
    ) -> QuantizationResult:
        """One component's file by one placement of int8."""
        from mmcompress.quantization.arrangements import arrange

        def feeds() -> Iterator[dict[str, np.ndarray]]:
            return self._calibration(model, context, name)

        return arrange(place, source, target, feeds, include=self.include, exclude=self.exclude, reduce_range=narrow)

    def _place(self, scheme: Scheme, part: Component) -> ArrangementName:
        """The placement of int8 in one component, fixed or recorded."""
        if isinstance(self.placement, str):
            return FIXED[scheme]
        return self.placement.get(part.name, self.placement.get(part.tower, FIXED[scheme]))

    def _measured(
        self,
        scheme: Scheme,
        source: Path,
        target: Path,
        narrow: bool,
        model: CompressedModel,
        context: Context,
        part: Component,
    ) -> tuple[ArrangementName | None, QuantizationResult | None]:
        """One component's file by the fastest placement that keeps ``min_cosine``; no file where none does."""
        from mmcompress.passes._placement import Settings, search

        call = next(call for call in model.family.calls(model.module, 1) if call.component == part.name)
        inputs = {name: values.numpy() for name, values in call.inputs.items()}
        settings = Settings(self.include, self.exclude, narrow, self.min_cosine, self.threads)
        context.reporter.note(f"timing placements of int8 in {part.name}")
        found = search(scheme, source, target, lambda: self._calibration(model, context, part.name), inputs, settings)
        context.facts.setdefault("placement", {})[part.name] = found.as_data()
        chosen = found.choice.chosen
        if chosen is None:
            context.warnings.append(
                f"quantize: no placement of int8 in {part.name} keeps a cosine of {self.min_cosine}; it stays in float32."
            )
        elif found.choice.speedup is not None and not found.choice.pays:
            context.warnings.append(
                f"quantize: int8 is not faster than float32 in {part.name} ({found.choice.speedup.ratio:.2f} times, {chosen}): "
                + "; ".join(found.reasons)
                + "."
            )
        return cast("ArrangementName | None", chosen), found.result

    def _calibration(self, model: CompressedModel, context: Context, component: str) -> Iterator[dict[str, np.ndarray]]:
        """Real examples in blocks, as one component's inputs; one block is in memory at a time."""
        import torch

        from mmcompress.data.prepare import prepared, prepared_rows
        from mmcompress.runtimes.torch_predict import TorchPredict

        task = context.need_task("quantize")
        task.fits(model.family.abilities, model.family.name)
        examples = context.need_calibration("quantize")
        if len(examples) > self.samples:
            chosen = torch.randperm(len(examples), generator=torch.Generator().manual_seed(context.seed))[: self.samples]
            examples = examples.take(sorted(chosen.tolist()))
        predict = TorchPredict(model)
        for draw, (indices, media) in enumerate(prepared(examples, model.processor)):
            if not len(indices):
                continue
            rows = prepared_rows(examples, indices, media)
            batch = {k: v.numpy() for k, v in task.collate(rows, model.processor, examples, draw).items()}
            for name, given in model.family.walk(predict, batch, model.module):
                if name == component:
                    yield given
                    break


PASS = Quantize
