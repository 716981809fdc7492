"""Quantizes the exported components after training: integer weights and inputs, integer weights alone, or half precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

from pydantic import Field, model_validator

from mmcompress.context import Context
from mmcompress.errors import DataError, RecipeError
from mmcompress.heap import give_back_blocks
from mmcompress.passes._int8 import ReduceRange, reduced
from mmcompress.passes._keeping import (
    BiasField,
    CalibrationField,
    Keeping,
    MaxDropField,
    PercentileField,
    SensitivityField,
    SmoothField,
    Work,
)
from mmcompress.passes._weights import (
    OURS,
    Algorithm,
    Backend,
    Rounding,
    backend_mistakes,
    quantized_weights,
    static_by_backend,
)
from mmcompress.passes.base import Pass
from mmcompress.quantization.naming import broken
from mmcompress.quantization.schemes import FIXED, WEIGHT_BYTES, ArrangementName, Scheme, scheme_of
from mmcompress.runtimes.openvino_predict import HINT as OPENVINO_HINT
from mmcompress.runtimes.openvino_predict import is_installed as openvino_installed

if TYPE_CHECKING:
    import numpy as np

    from mmcompress.families.base import Component, Family
    from mmcompress.model import CompressedModel
    from mmcompress.quantization.ranges import Ranges
    from mmcompress.quantization.result import QuantizationResult

OVERFLOWS = (
    "backend: neural-compressor rounds weights to 8 bits under int8-static, which overflow on x86 without VNNI; set "
    "backend: mmcompress, or reduce_range: false where the files run on other processors"
)


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
    block_size: Literal[32, 64, 128, 256] | None = Field(
        None,
        description="Weights that share a scale under the weight-only schemes: 32, 64, 128 or 256. Smaller is more exact and "
        "larger. Left out: 64 at 4 bits, 256 at 8. Layers that it does not divide take a smaller one where that takes less "
        "space.",
    )
    algorithm: Algorithm = Field(
        "rtn",
        description="How the weight-only schemes round. rtn: to the nearest, needs no data. gptq: later weights make up for the "
        "errors of earlier ones, by calibration examples. awq: finer where inputs are large, by calibration examples. autoround "
        "and autotune (rtn, then gptq, until `min_cosine` is kept) are of the backend neural-compressor.",
    )
    backend: Backend = Field(
        "mmcompress",
        description="What rounds the weights under the weight-only schemes, and takes ranges and scales under int8-static. "
        "neural-compressor: Intel's, which needs the extra of that name; `check` tries it on a small model, and refuses what "
        "does not work on this machine.",
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
    runtime: Literal["onnxruntime", "openvino"] = Field(
        "onnxruntime",
        description="What a measured placement is timed in. openvino (an extra) leaves out the placements that ONNX Runtime "
        "alone runs, and has static-scores among its own.",
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
    calibration: CalibrationField = "min-max"
    percentile: PercentileField = 99.99
    smooth: SmoothField = "off"
    bias_correction: BiasField = False
    max_drop: MaxDropField = None
    sensitivity: SensitivityField = "embedding"

    @model_validator(mode="after")
    def _patterns_compile(self) -> Self:
        for field, patterns in (("include", self.include), ("exclude", self.exclude)):
            for text in broken(patterns):
                raise ValueError(f"{field}: {text}")
        return self

    @model_validator(mode="after")
    def _algorithm_has_weights(self) -> Self:
        schemes = self._schemes()
        rounded = any(scheme.endswith("weight-only") for scheme in schemes)
        # One int8 scheme for a whole model gives decoders int8 weights alone.
        if self.algorithm not in OURS and self.backend == "mmcompress":
            raise ValueError(f"algorithm: {self.algorithm} needs `backend: neural-compressor`; here are {', '.join(OURS)}")
        plain = self.algorithm == "rtn" and self.backend == "mmcompress"
        if self.algorithm == "rtn" and "int8-static" in schemes:  # the backend's own
            return self
        if not plain and not (rounded or self.scheme in FIXED if isinstance(self.scheme, str) else rounded):
            found = f"algorithm: {self.algorithm}" if self.algorithm != "rtn" else f"backend: {self.backend}"
            raise ValueError(f"{found} is of the weight-only schemes, and `scheme` names none")
        return self

    @model_validator(mode="after")
    def _quality_has_int8(self) -> Self:
        schemes = self._schemes()
        asked = {
            "calibration": self.calibration != "min-max",
            "smooth": self.smooth != "off",
            "bias_correction": self.bias_correction,
            "max_drop": self.max_drop is not None,
        }
        for field, wanted in asked.items():
            if wanted and "int8-static" not in schemes:
                raise ValueError(f"{field}: is of the scheme int8-static, and `scheme` does not name it")
        if self._by_backend("int8-static") and "int8-static" in schemes:
            asked |= {"calibration": self.calibration not in ("min-max", "entropy"), "placement": self.placement != "fixed"}
            for field, wanted in asked.items():
                if wanted:
                    allowed = "min-max or entropy" if field == "calibration" else "only what is the default"
                    raise ValueError(f"{field}: int8-static of the backend neural-compressor takes {allowed}")
        if self.runtime != "onnxruntime" and self.placement == "fixed":
            raise ValueError(f"runtime: {self.runtime} is what `placement: measure` times in, and `placement` is fixed")
        if self.sensitivity != "embedding" and self.max_drop is None:
            raise ValueError(f"sensitivity: {self.sensitivity} sorts layers for `max_drop`, which is left out")
        return self

    @property
    def uses(self) -> tuple[str, ...]:  # type: ignore[override]  # depends on what is asked for
        """The splits that the pass reads."""
        schemes = self._schemes()
        measured = self.placement == "measure" and any(scheme in FIXED for scheme in schemes)
        calibrated = "int8-static" in schemes or measured or self.algorithm != "rtn"
        return (*(("train",) if self.max_drop is not None else ()), *(("calibration",) if calibrated else ()))

    def weight_bytes(self) -> float:
        """Bytes of one weight; of the widest where towers differ."""
        return max(WEIGHT_BYTES[scheme] for scheme in self._schemes())

    def _schemes(self) -> list[Scheme]:
        """All that are asked for."""
        return [self.scheme] if isinstance(self.scheme, str) else list(self.scheme.values())

    def check_against(self, family: Family, sizes: Mapping[str, Mapping[str, int]]) -> list[str]:
        """What is wrong with ``runtime``, and with ``algorithm`` and int8-static under ``backend``, on this machine."""
        if self.runtime == "openvino" and not openvino_installed():
            return [f"runtime: {OPENVINO_HINT}"]
        if self.backend != "neural-compressor":
            return []
        static = "int8-static" in self._schemes()
        wrong = backend_mistakes(self.algorithm, static)
        if static and reduced(self.reduce_range):
            wrong.append(OVERFLOWS)
        return wrong

    def settled(self, family: Family, config: Any) -> tuple[Pass, str]:
        """The pass itself, once the names in ``scheme`` and ``placement`` are those of towers or components.

        Raises:
            RecipeError: one is neither, or ``algorithm`` and ``backend`` would round nothing.
        """
        if not self._named() <= set(family.towers) or self._rounds_decoders():
            from mmcompress.families.base import without_weights  # needs torch, as plans do

            parts = family.components(without_weights(family, config))
            self._check_names(family, parts)
            self._check_decoders(family, parts)
        return self, ""

    def _rounds_decoders(self) -> bool:
        """Whether ``algorithm`` or ``backend`` can only be meant for decoders, the others being int8 throughout."""
        if not isinstance(self.scheme, str) or self.scheme not in FIXED:
            return False
        return self.algorithm != "rtn" or (self.backend != "mmcompress" and not self._by_backend(self.scheme))

    def _by_backend(self, scheme: str) -> bool:
        """Whether a scheme with integer activations is the backend's own work."""
        return scheme == "int8-static" and self.backend == "neural-compressor"

    def _check_decoders(self, family: Family, parts: dict[str, Component]) -> None:
        if self._rounds_decoders() and not any(part.decoder for part in parts.values()):
            found = f"algorithm: {self.algorithm}" if self.algorithm != "rtn" else f"backend: {self.backend}"
            raise RecipeError(
                f"quantize: {found} rounds the weights of weight-only schemes; under {self.scheme} only decoders get one, and "
                f"{family.name} has none; set scheme: int8-weight-only or int4-weight-only"
            )

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

        from mmcompress.quantization import onnx_graph
        from mmcompress.quantization.onnx_export import export_component  # needs torch

        if context.workdir is None:
            raise DataError("quantize: needs a folder to write to; call it from a recipe, or give Context(workdir=...)")
        # The weights stay as they are: a copy of them would only take memory.
        new = replace(model, history=list(model.history))
        folder, scratch = Path(context.workdir) / "onnx", Path(context.workdir) / "float"
        folder.mkdir(parents=True, exist_ok=True)
        scratch.mkdir(parents=True, exist_ok=True)
        result: dict[str, Any] = {}
        give_back_blocks(sum(p.nbytes for p in model.module.parameters()))
        parts, narrow = model.family.components(model.module), reduced(self.reduce_range)
        self._check_names(model.family, parts)
        self._check_decoders(model.family, parts)
        for name, part in context.reporter.track(parts.items(), "exporting", len(parts)):
            scheme, _ = scheme_of(self.scheme, name, part.tower, part.decoder)
            kept = scheme == "float32"
            target = (folder if kept else scratch) / f"{name}.onnx"
            example = model.family.example_inputs(model.module.config, part, 2)
            export_component(part, example, target, beside=not kept)
        works = self._works(parts, scratch, folder, narrow, model, context)
        for name, part in context.reporter.track(parts.items(), "quantizing", len(parts)):
            scheme, suffix = scheme_of(self.scheme, name, part.tower, part.decoder)
            source, target = scratch / f"{name}.onnx", folder / f"{name}{suffix}.onnx"
            if scheme == "float32":
                continue
            facts: dict[str, Any] = {"scheme": scheme}
            if scheme in FIXED:
                work = works[name]
                place, made = self._int8(scheme, work, target, narrow, model, context, part)
                if place is None or made is None:  # the float file stays
                    onnx_graph.move(source, folder / f"{name}.onnx")
                    continue
                found = made
                ranges = "from calibration" if place.startswith("static") else "at run time"
                facts |= {"placement": place, "ranges": ranges}
                onnx_graph.remove(work.ready)
            else:
                found = self._quantize(scheme, source, target, part, self._feeds(model, context, name))
            onnx_graph.remove(source)
            result[name] = {**facts, **asdict(found)}
        for pattern in (*self.include, *self.exclude):
            # Each component is quantized by itself: only a pattern that no component knows is a mistake.
            if result and all(pattern in one["unmatched_exclude"] for one in result.values()):
                field = "exclude" if pattern in self.exclude else "include"
                raise RecipeError(f"quantize: {field}: {pattern!r} matches no layer of the model")
        new.onnx = folder
        return new, {"weight_bits": 7 if narrow else 8, "components": result}

    def _quantize(
        self, scheme: Scheme, source: Path, target: Path, part: Component, feeds: Callable[[], Iterator[Mapping[str, np.ndarray]]]
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

    def _works(
        self,
        parts: dict[str, Component],
        scratch: Path,
        folder: Path,
        narrow: bool,
        model: CompressedModel,
        context: Context,
    ) -> dict[str, Work]:
        """The components that are going to be int8, made easier to quantize as the recipe asks for."""
        works, static, others = {}, {}, {}
        keeping = self._keeping(narrow)
        for name, part in parts.items():
            scheme, _ = scheme_of(self.scheme, name, part.tower, part.decoder)
            source = (folder if scheme == "float32" else scratch) / f"{name}.onnx"
            if scheme in FIXED:
                works[name] = Work(source, source, self._feeds(model, context, name))
            if scheme == "int8-static":
                static[name] = works[name]
                keeping.improve(works[name], scratch / "improved")
            else:
                others[name] = source
        facts: dict[str, Any] = {}
        if self.max_drop is not None:
            from mmcompress.passes._mixed import leave_float

            facts["mixed_precision"] = leave_float(static, others, keeping, self.max_drop, self.sensitivity, model, context)
        done = {name: work.done for name, work in static.items() if work.done}
        if done or facts or self.calibration != "min-max":
            context.facts["keeping"] = {**self._settings(), **facts, "components": done}
        return works

    def _settings(self) -> dict[str, Any]:
        """What the report says was asked for."""
        asked: dict[str, Any] = {"calibration": self.calibration, "smooth": self.smooth, "bias_correction": self.bias_correction}
        return asked | ({"percentile": self.percentile} if self.calibration == "percentile" else {})

    def _keeping(self, narrow: bool) -> Keeping:
        return Keeping(self.calibration, self.percentile, self.smooth, self.bias_correction, self.include, self.exclude, narrow)

    def _int8(
        self,
        scheme: Scheme,
        work: Work,
        target: Path,
        narrow: bool,
        model: CompressedModel,
        context: Context,
        part: Component,
    ) -> tuple[ArrangementName | None, QuantizationResult | None]:
        """One component's int8 file and its placement; None and no file where it stays in float."""
        from mmcompress.quantization.arrangements import arrange

        layers = work.done.get("distances", {})
        if layers and len(work.exclude) == len(layers):
            context.warnings.append(
                f"quantize: all layers of {part.name} must stay in float for `max_drop`; it is not quantized."
            )
            return None, None
        if self._by_backend(scheme):
            if narrow:
                raise RecipeError(f"quantize: {OVERFLOWS}")
            return "static", static_by_backend(
                work.ready, target, part, work.feeds, self.calibration, (self.include, self.exclude)
            )
        if self.placement == "measure":
            return self._measured(scheme, work, target, narrow, model, context, part)
        place = self._place(scheme, part)
        exclude = [*self.exclude, *work.exclude]
        keeping = self._keeping(narrow)

        def ranges() -> Ranges:
            return keeping.ranges(work.ready, work.feeds())

        return place, arrange(place, work.ready, target, ranges, include=self.include, exclude=exclude, reduce_range=narrow)

    def _place(self, scheme: Scheme, part: Component) -> ArrangementName:
        """The placement of int8 in one component, fixed or recorded."""
        if isinstance(self.placement, str):
            return FIXED[scheme]
        return self.placement.get(part.name, self.placement.get(part.tower, FIXED[scheme]))

    def _measured(
        self,
        scheme: Scheme,
        work: Work,
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
        exclude, ranges = [*self.exclude, *work.exclude], self._keeping(narrow).ranges
        settings = Settings(self.include, exclude, narrow, self.min_cosine, self.threads, ranges, self.runtime)
        context.reporter.note(f"timing placements of int8 in {part.name}")
        found = search(scheme, work.source, target, work.feeds, inputs, settings, work.ready)
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

    def _feeds(
        self, model: CompressedModel, context: Context, component: str
    ) -> Callable[[], Iterator[Mapping[str, np.ndarray]]]:
        """Gives calibration batches of one component."""
        from mmcompress.passes._calibrating import judged

        return judged(partial(self._calibration, model, context, component), component)

    def _calibration(self, model: CompressedModel, context: Context, component: str) -> Iterator[dict[str, np.ndarray]]:
        """Real examples in blocks, as one component's inputs; one block is in memory at a time."""
        from mmcompress.passes._calibrating import calibration_batches

        return calibration_batches(model, context, component, self.samples)


PASS = Quantize
