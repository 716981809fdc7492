"""Quantization-aware training: trains with int8 rounding in the forward pass, and leaves true int8 ONNX files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mmcompress.context import Context
from mmcompress.errors import DataError, RecipeError
from mmcompress.passes._int8 import ReduceRange, reduced
from mmcompress.passes.base import Pass
from mmcompress.training.settings import DistillationSettings

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mmcompress.families.base import Family
    from mmcompress.model import CompressedModel

CALIBRATION_BATCHES = 8
"""Batches that set the ranges before the first training step."""


class Qat(DistillationSettings, Pass):
    """Quantization-aware training. Weights change, and ``onnx/<component>_quantized.onnx`` holds them as int8.

    The model that is left is a stock float one; it is what was trained under rounding, and is not rounded itself.
    """

    changes: ClassVar[Literal["weights", "files"]] = "weights"
    makes_files: ClassVar[bool] = True
    uses: ClassVar[tuple[str, ...]] = ("train", "calibration")

    name: Literal["qat"] = Field("qat", alias="pass", description="The pass's name.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "fp32",
        description="Of the forward pass; bf16 rounds about as coarsely as int8 does, so that fp32 is the default here.",
    )
    exclude: list[str] = Field(
        default_factory=list,
        description="Layers to leave in float: dotted paths such as `visual_projection` or `encoder.layers.0`, globs allowed.",
    )
    switch_on: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the steps, 0 to 1, over which layers begin to round, from the first one on; 0: all at once.",
    )
    freeze_ranges: float = Field(
        0.5, ge=0, le=1, description="Share of the steps, 0 to 1, after which the ranges of the activations stay as they are."
    )

    reduce_range: ReduceRange = "auto"

    def weight_bytes(self) -> float:
        """One byte: int8."""
        return 1

    def check_against(self, family: Family, sizes: Mapping[str, Mapping[str, int]]) -> list[str]:
        """What is wrong with ``freeze`` and with weights by tower for a model of these towers."""
        return [*self.freeze_mistakes(family.towers), *self.loss_mistakes(family.towers)]

    def run(self, model: CompressedModel, context: Context) -> tuple[CompressedModel, dict[str, Any]]:
        """Calibrates, trains and exports a copy of the model.

        Raises:
            DataError: no task, no training examples, no folder to write to, or as `distill`.
            ModelError: the teacher cannot be loaded, or reads other pictures or texts than the student.
            RecipeError: ``exclude`` or ``freeze`` does not fit the model.
            TrainingError: a loss or a gradient is not finite.
        """
        from mmcompress.quantization import fake
        from mmcompress.training.loop import train
        from mmcompress.training.objective import distillation

        if self.checkpointing:
            # Layers that run again in the backward pass would move their ranges again.
            raise RecipeError("qat: checkpointing: does not go together with the ranges that qat observes; use micro_batch")
        if context.workdir is None:
            raise DataError("qat: needs a folder to write to; call it from a recipe, or give Context(workdir=...)")
        # Before the layers are replaced: it runs the model on random inputs, which no range should see.
        objective = distillation(self, model, context, "qat")
        new = context.copy_of(model)
        try:
            layers = fake.insert_fake_quant(new.module, exclude=self.exclude, reduce_range=reduced(self.reduce_range))
        except ValueError as e:
            raise RecipeError(f"qat: {e}") from e
        probe = self._calibrate(new, context)

        def before_step(step: int, steps: int) -> None:
            fake.set_observing(new.module, step < self.freeze_ranges * steps)
            fake.set_fake_quant(new.module, min(1.0, (step + 1) / max(1.0, self.switch_on * steps)))

        facts = train(new, context, self, objective, "qat", before_step)
        fake.set_observing(new.module, False)
        fake.set_fake_quant(new.module, True)
        folder = Path(context.workdir) / "onnx"
        folder.mkdir(parents=True, exist_ok=True)
        facts |= {"quantized_layers": len(layers), "weight_bits": 7 if reduced(self.reduce_range) else 8}
        facts |= {"components": self._export(new, folder, probe)}
        fake.remove_fake_quant(new.module)
        new.onnx = folder
        return new, facts

    def _calibrate(self, model: CompressedModel, context: Context) -> dict[str, torch.Tensor]:
        """Sets the ranges from a few batches, without rounding; returns the last batch, to compare outputs on."""
        import torch

        from mmcompress.families.base import BESIDE_INPUTS
        from mmcompress.quantization import fake
        from mmcompress.training.device import pick_device
        from mmcompress.training.feed import Feed

        device = pick_device(self.device if self.device != "auto" else context.device)
        task, examples = context.need_task("qat"), context.need_calibration("qat")
        examples.need(task.roles, task.type, task.optional)
        feed = Feed(examples, model.processor, task, self.batch_size, context.seed, self.workers)
        fake.set_fake_quant(model.module, False)
        model.module.to(device)
        batch: dict[str, torch.Tensor] = {}
        steps = min(CALIBRATION_BATCHES, feed.steps_per_epoch)
        with torch.no_grad():
            for batch in context.reporter.track(feed.batches(steps), "calibrating", steps):
                model.family.forward(model.module, {k: v.to(device) for k, v in batch.items() if k not in BESIDE_INPUTS})
        model.module.to("cpu")
        fake.set_fake_quant(model.module, True)
        return batch

    def _export(self, model: CompressedModel, folder: Path, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Writes each component, and compares float, fake-quantized and exported outputs on a real batch.

        Returns:
            For each component both distances, or nothing where ``exclude`` leaves all of it in float.
        """
        import torch

        from mmcompress.quantization import fake
        from mmcompress.quantization.onnx_export import export_component
        from mmcompress.runtimes.onnx_predict import open_session
        from mmcompress.runtimes.torch_predict import TorchPredict

        found: dict[str, Any] = {}
        parts = model.family.components(model.module)
        arrays = {name: values.numpy() for name, values in batch.items()}
        real: dict[str, dict[str, np.ndarray]] = {}
        for name, given in model.family.walk(TorchPredict(model), arrays, model.module):
            real.setdefault(name, given)
        for name, part in parts.items():
            example = model.family.example_inputs(model.module.config, part, 2)
            if not any(isinstance(layer, fake.FakeQuantLinear) for layer in part.module.modules()):
                # It has no such layers, or all are excluded: the float file takes its place in the folder.
                export_component(part, example, folder / f"{name}.onnx")
                found[name] = {}
                continue
            path = folder / f"{name}_quantized.onnx"
            fake.export_qdq(part, example, path)
            inputs = [torch.from_numpy(real[name][i]) for i in part.inputs]
            with torch.no_grad():
                rounded = part.module(*inputs)[0]
                fake.set_fake_quant(part.module, False)
                plain = part.module(*inputs)[0]
                fake.set_fake_quant(part.module, True)
            exported = torch.from_numpy(open_session(path).run(list(part.outputs), real[name])[0])
            found[name] = {"onnx_to_fake": distance(exported, rounded), "fake_to_float": distance(rounded, plain)}
        return found


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, float]:
    """How far outputs (..., D) are from others: the least cosine of a row, and the largest difference of a number."""
    import torch

    cosine = torch.nn.functional.cosine_similarity(ours.float(), theirs.float(), dim=-1)
    return {"least_cosine": round(float(cosine.min()), 6), "max_abs_difference": round(float((ours - theirs).abs().max()), 6)}


PASS = Qat
