"""Exports the model's components to ONNX and compares them with torch on real examples."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mmcompress.context import Context
from mmcompress.errors import DataError
from mmcompress.passes.base import Pass

if TYPE_CHECKING:
    from mmcompress.model import CompressedModel


class Export(Pass):
    """Makes ``onnx/<component>.onnx`` with a dynamic batch axis; components that a quantizing pass already made are kept."""

    changes: ClassVar[Literal["weights", "files"]] = "files"
    makes_files: ClassVar[bool] = True

    name: Literal["export"] = Field("export", alias="pass", description="The pass's name.")
    format: Literal["onnx"] = Field("onnx", description="The format to export to.")
    opset: int = Field(20, ge=18, le=23, description="Version of the ONNX operator set (18 to 23).")
    keep_float: bool = Field(
        False, description="Also write the float32 component where a quantized one already exists, for clients that want both."
    )

    combined: bool = Field(
        True,
        description="Also write both components of a dual encoder as one file, `model.onnx` (with their suffix), which "
        "zero-shot pipelines open. It holds the weights a second time.",
    )

    def run(self, model: CompressedModel, context: Context) -> tuple[CompressedModel, dict[str, Any]]:
        """Exports what is missing, then measures each component's difference to torch on calibration or training examples."""
        from mmcompress.measure.rows import check_float_parity, parity  # needs torch
        from mmcompress.quantization.combine import combine_components
        from mmcompress.quantization.onnx_export import export_component
        from mmcompress.runtimes.onnx_predict import OnnxPredict, component_files
        from mmcompress.runtimes.precision import PRECISIONS, precision_of

        if context.workdir is None:
            raise DataError("export: needs a folder to write to; call it from a recipe, or give Context(workdir=...)")
        # The weights stay as they are: a copy of them would only take memory.
        new = replace(model, history=list(model.history))
        folder = Path(context.workdir) / "onnx"
        if model.onnx is not None and model.onnx.resolve() != folder.resolve():
            shutil.copytree(model.onnx, folder, dirs_exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        parts = model.family.components(model.module)
        for name, part in context.reporter.track(parts.items(), "exporting", len(parts)):
            quantized = any((folder / f"{name}{suffix}.onnx").exists() for suffix in PRECISIONS if suffix)
            if not (folder / f"{name}.onnx").exists() and (self.keep_float or not quantized):
                example = model.family.example_inputs(model.module.config, part, 2)
                export_component(part, example, folder / f"{name}.onnx", opset=self.opset)
        combined = model.family.combined(model.module) if self.combined else None
        if combined is not None:
            combine_components(combined, folder)
        new.onnx = folder
        result: dict[str, Any] = {"files": {p.name: p.stat().st_size for p in sorted(folder.glob("*.onnx"))}}
        examples = context.calibration if context.calibration is not None else context.train
        if examples is not None and context.task is not None:
            found = parity(model, OnnxPredict(folder), context.task, examples)
            if precision_of(component_files(folder, tuple(parts)).values()) == "float32":
                check_float_parity(found, "export")
            # A fact of this machine's kernels, not of the model: it stays out of the model's own files.
            context.facts["parity"] = {name: one.model_dump() for name, one in found.items()}
        else:
            context.warnings.append(
                "export: the recipe has no training or calibration data, so parity was not checked by the pass itself."
            )
        return new, result


PASS = Export
