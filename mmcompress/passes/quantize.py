"""Quantizes the exported components after training (PTQ): int8 weights and inputs where integer kernels pay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mmcompress.context import Context
from mmcompress.errors import DataError, RecipeError
from mmcompress.passes._int8 import ReduceRange, reduced
from mmcompress.passes.base import Pass

if TYPE_CHECKING:
    import numpy as np

    from mmcompress.model import CompressedModel


class Quantize(Pass):
    """Exports each component, then quantizes it with onnxruntime.quantization into ``onnx/<component>_quantized.onnx``."""

    changes: ClassVar[Literal["weights", "files"]] = "files"
    makes_files: ClassVar[bool] = True

    name: Literal["quantize"] = Field("quantize", alias="pass", description="The pass's name.")
    scheme: Literal["int8-static", "int8-dynamic"] = Field(
        "int8-static",
        description="int8-static: ranges from calibration examples, QDQ nodes; decoders, which are called once a token, have "
        "ranges at run time all the same. int8-dynamic: ranges at run time, needs no data.",
    )
    samples: int = Field(256, ge=8, le=100_000, description="Calibration examples for int8-static (8 to 100000).")
    exclude: list[str] = Field(
        default_factory=list,
        description="Layers to leave in float: dotted module paths such as `visual_projection` or `layers.0`, globs allowed.",
    )

    reduce_range: ReduceRange = "auto"

    def run(self, model: CompressedModel, context: Context) -> tuple[CompressedModel, dict[str, Any]]:
        """Exports and quantizes; the torch model stays as it is."""
        from dataclasses import asdict, replace

        from mmcompress.quantization.onnx_export import export_component  # needs torch
        from mmcompress.quantization.ptq import quantize_dynamic_int8, quantize_static_int8

        if context.workdir is None:
            raise DataError("quantize: needs a folder to write to; call it from a recipe, or give Context(workdir=...)")
        # The weights stay as they are: a copy of them would only take memory.
        new = replace(model, history=list(model.history))
        folder, scratch = Path(context.workdir) / "onnx", Path(context.workdir) / "float"
        folder.mkdir(parents=True, exist_ok=True)
        scratch.mkdir(parents=True, exist_ok=True)
        result: dict[str, Any] = {}
        parts, narrow = model.family.components(model.module), reduced(self.reduce_range)
        for name, part in context.reporter.track(parts.items(), "quantizing", len(parts)):
            source, target = scratch / f"{name}.onnx", folder / f"{name}_quantized.onnx"
            export_component(part, model.family.example_inputs(model.module.config, part, 2), source)
            dynamic = self.scheme == "int8-dynamic" or part.decoder
            if dynamic:
                found = quantize_dynamic_int8(source, target, exclude=self.exclude, reduce_range=narrow)
            else:
                feeds = self._calibration(model, context, name)
                found = quantize_static_int8(source, target, feeds, exclude=self.exclude, reduce_range=narrow)
            source.unlink()
            result[name] = {"ranges": "at run time" if dynamic else "from calibration", **asdict(found)}
        for pattern in self.exclude:
            # Each component is quantized by itself: only a pattern that no component knows is a mistake.
            if all(pattern in one["unmatched_exclude"] for one in result.values()):
                raise RecipeError(f"quantize: exclude: {pattern!r} matches no layer of the model")
        new.onnx = folder
        return new, {"weight_bits": 7 if narrow else 8, "components": result}

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
