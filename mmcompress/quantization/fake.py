"""Quantization-aware training: layers that compute with rounded numbers, and their export as true int8.

Layers are Linear ones, and patch embeddings, which are products of matrices as well.

The scheme is the one `ptq.quantize_static_int8` writes: weights int8, symmetric, one scale an output channel;
activations uint8, asymmetric, one scale a tensor, with a moving average of the range. From Jacob et al. 2018,
"Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", section 3.

Shapes: O output features, I input features, ... any leading dimensions; B pictures, C colours, H x W
pixels, P x Q a patch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmcompress.environment import int8_saturates
from mmcompress.quantization import onnx_graph
from mmcompress.quantization.naming import is_excluded, unmatched
from mmcompress.quantization.onnx_export import DEFAULT_OPSET, ComponentSpec, export_component
from mmcompress.quantization.stored import fold_lookups, store_constants
from mmcompress.quantization.tied import share_integers

WEIGHT_LEVELS, REDUCED_LEVELS = 127, 63
ACTIVATION_LEVELS = 255
# Keeps 1 / scale finite for channels of zeros and for ranges of no width.
_SMALLEST_SCALE = 1e-12
_EXPORT_BUFFERS = ("weight_int8", "weight_int8_scale", "export_scale", "export_zero_point")


class FakeQuantLinear(nn.Module):
    """A Linear layer that rounds its weights and inputs as the int8 layer will, and passes gradients straight through.

    Gradients are 1 inside of the range and 0 outside (straight-through estimator, Bengio et al. 2013). Weights are
    always inside. The parameters are the ones of the wrapped layer, not copies, under the same names.

    Attributes:
        observing: Whether a call moves the range.
        fake_quant: Whether a call rounds; if not, the layer is the plain Linear.
        minimum: Lower end of the inputs' range, never above 0. Shape [].
        maximum: Upper end of the inputs' range, never below 0. Shape [].
        batches: Number of batches observed. Shape [].
    """

    minimum: Tensor
    maximum: Tensor
    batches: Tensor
    # Only there between begin_export and end_export.
    weight_int8: Tensor
    weight_int8_scale: Tensor
    export_scale: Tensor
    export_zero_point: Tensor

    def __init__(self, linear: nn.Linear | nn.Conv2d, momentum: float = 0.9, reduce_range: bool = False) -> None:
        """Wraps a layer.

        Args:
            linear: The layer whose parameters are used.
            momentum: Share of the old range that a batch leaves, 0 to 1 (1 excluded).
            reduce_range: Whether weights take 7 bits, for x86 without VNNI.

        Raises:
            ValueError: The momentum is out of range.
        """
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, not {momentum}")
        self.weight = linear.weight
        self.bias = linear.bias
        self.out_features, self.in_features = linear.weight.flatten(1).shape
        self.momentum = momentum
        self.weight_levels = REDUCED_LEVELS if reduce_range else WEIGHT_LEVELS
        self.observing = True
        self.fake_quant = True
        self._exporting = False
        # In a tuple, so that it is no submodule: its parameters would appear twice in the state dict.
        self._plain = (linear,)
        for name in ("minimum", "maximum"):
            self.register_buffer(name, torch.zeros((), device=linear.weight.device))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64, device=linear.weight.device))
        self.train(linear.training)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, observing={self.observing}, fake_quant={self.fake_quant}"

    def forward(self, inputs: Tensor) -> Tensor:
        """Applies the layer to [..., I], giving [..., O].

        Raises:
            RuntimeError: It should round, but neither has a range nor observes one.
        """
        if self._exporting:
            return self._forward_symbolic(inputs)
        if self.observing:
            self._observe(inputs.detach())
        if not self.fake_quant:
            return F.linear(inputs, self.matrix(), self.bias)
        if not self.observing:
            self.check_observed()
        scale, zero_point = self.activation_parameters()
        inputs = torch.fake_quantize_per_tensor_affine(inputs, scale, zero_point, 0, ACTIVATION_LEVELS)
        weight_scale = self.weight_scale()
        zeros = torch.zeros_like(weight_scale, dtype=torch.int32)
        weight = torch.fake_quantize_per_channel_affine(
            self.matrix(), weight_scale, zeros, 0, -self.weight_levels, self.weight_levels
        )
        return F.linear(inputs, weight, self.bias)

    def matrix(self) -> Tensor:
        """The weights as rows of inputs, shape [O, I]."""
        return self.weight.flatten(1)

    def check_observed(self) -> None:
        """Raises RuntimeError where no batch was observed: a range of no width would round every input to 0."""
        if not int(self.batches):
            raise RuntimeError("a fake-quantized layer has no range: run batches through it while it observes")

    def weight_scale(self) -> Tensor:
        """Scale of each output channel, max|w| / 127 (63 with 7 bits). Shape [O], float32, without gradient."""
        largest = self.matrix().detach().abs().amax(dim=1).float()
        return (largest / self.weight_levels).clamp(min=_SMALLEST_SCALE)

    def activation_parameters(self) -> tuple[Tensor, Tensor]:
        """Scale (max - min) / 255 and zero point round(-min / scale) of the inputs. Jacob et al. 2018, equation 12.

        Returns:
            Scale, shape [], float32; zero point, shape [], int32, 0 to 255.
        """
        scale = ((self.maximum - self.minimum) / ACTIVATION_LEVELS).clamp(min=_SMALLEST_SCALE).float()
        zero_point = torch.round(-self.minimum / scale).clamp(0, ACTIVATION_LEVELS)
        return scale, zero_point.to(torch.int32)

    def _observe(self, inputs: Tensor) -> None:
        """Moves the range: the first batch sets it, later ones are averaged in; it always holds 0."""
        low, high = torch.aminmax(inputs)
        # No branch on a tensor's value: that would wait for the accelerator in every layer.
        kept = torch.where(self.batches == 0, 0.0, self.momentum)
        for end, value in ((self.minimum, low.clamp(max=0)), (self.maximum, high.clamp(min=0))):
            end.copy_(kept * end + (1 - kept) * value)
        self.batches.add_(1)

    def _forward_symbolic(self, inputs: Tensor) -> Tensor:
        """The layer as ONNX's QuantizeLinear, DequantizeLinear and MatMul, for the exporter."""
        scale, zero_point, shape = self.export_scale, self.export_zero_point, list(inputs.shape)
        rounded = torch.onnx.ops.symbolic(
            "QuantizeLinear", (inputs, scale, zero_point), dtype=torch.uint8, shape=shape, version=DEFAULT_OPSET
        )
        inputs = torch.onnx.ops.symbolic(
            "DequantizeLinear", (rounded, scale, zero_point), dtype=torch.float32, shape=shape, version=DEFAULT_OPSET
        )
        weight = torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (self.weight_int8, self.weight_int8_scale),  # a zero point of 0 and axis 1 are what the operator takes by itself
            dtype=torch.float32,
            shape=[self.in_features, self.out_features],
            version=DEFAULT_OPSET,
        )
        outputs = torch.matmul(inputs, weight)
        return outputs if self.bias is None else outputs + self.bias

    def begin_export(self) -> None:
        """Fixes weights and scales as int8 buffers, for the exporter to store. `end_export` drops them.

        Raises:
            RuntimeError: No range was observed.
        """
        self.check_observed()
        scale, zero_point = self.activation_parameters()
        weight_scale = self.weight_scale()
        # Times the reciprocal, as torch's fake quantization rounds: dividing can differ in the last place.
        units = self.matrix().detach().float() * (1 / weight_scale)[:, None]
        weight = units.round().clamp(-self.weight_levels, self.weight_levels)
        # [I, O] with axis 1, so that the graph has a plain MatMul(x, W), which ONNX Runtime fuses.
        self.register_buffer("weight_int8", weight.to(torch.int8).t().contiguous(), persistent=False)
        self.register_buffer("weight_int8_scale", weight_scale, persistent=False)
        self.register_buffer("export_scale", scale, persistent=False)
        self.register_buffer("export_zero_point", zero_point.to(torch.uint8), persistent=False)
        self._exporting = True

    def end_export(self) -> None:
        """Makes the layer trainable again after `begin_export`; harmless without it."""
        self._exporting = False
        for name in _EXPORT_BUFFERS:
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)

    def to_plain(self) -> nn.Module:
        """The layer that was wrapped, with this layer's parameters and mode."""
        (linear,) = self._plain
        # Loading with assign=True or moving to another device may have put other objects here.
        linear.weight = self.weight
        linear.bias = self.bias
        return linear.train(self.training)


class FakeQuantPatches(FakeQuantLinear):
    """A convolution whose kernel is as large as its stride: the same over patches as over rows, as `patches` exports it.

    Attributes:
        patch: P and Q.
    """

    def __init__(self, convolution: nn.Conv2d, momentum: float = 0.9, reduce_range: bool = False) -> None:
        """Wraps a patch embedding.

        Raises:
            ValueError: The momentum is out of range, or patches overlap, have gaps or are padded.
        """
        if not is_patches(convolution):
            raise ValueError(f"{convolution} is no embedding of patches")
        super().__init__(convolution, momentum, reduce_range)
        self.patch = (convolution.kernel_size[0], convolution.kernel_size[1])

    def forward(self, inputs: Tensor) -> Tensor:
        """Applies the layer to [B, C, H, W], giving [B, O, H / P, W / Q]; what patches do not fill is left out."""
        high, wide = self.patch
        rows, columns = inputs.shape[2] // high, inputs.shape[3] // wide
        inputs = inputs[:, :, : rows * high, : columns * wide]
        if not (self.fake_quant or self._exporting):  # the very numbers of the convolution
            if self.observing:
                self._observe(inputs.detach())
            return F.conv2d(inputs, self.weight, self.bias, stride=self.patch)
        patches = inputs.reshape(-1, inputs.shape[1], rows, high, columns, wide).permute(0, 2, 4, 1, 3, 5)
        found = super().forward(patches.reshape(-1, rows * columns, self.in_features))
        return found.transpose(1, 2).reshape(-1, self.out_features, rows, columns)


def is_patches(module: nn.Module) -> bool:
    """Whether a module is a convolution over patches that fill the picture side by side."""
    if type(module) is not nn.Conv2d or module.padding_mode != "zeros":
        return False
    plain = module.groups == 1 and module.dilation == (1, 1) and module.padding in ((0, 0), "valid")
    return plain and module.stride == module.kernel_size


def insert_fake_quant(module: nn.Module, *, exclude: Sequence[str] = (), reduce_range: bool | None = None) -> list[str]:
    """Replaces the Linear layers and patch embeddings inside of a module, in place.

    Subclasses of Linear stay: `nn.MultiheadAttention` reads the weights of its `out_proj` and never calls it. The
    layers start out observing and rounding.

    Args:
        module: Its layers are replaced; it cannot be one itself.
        exclude: Patterns of names to leave alone, see `naming.matches`.
        reduce_range: Whether weights take 7 bits; None where this processor needs it (x86 without VNNI).

    Returns:
        Names of the layers that were replaced.

    Raises:
        ValueError: A pattern means no such layer, or no layer is left to replace.
    """
    layers = {
        name: part
        for name, part in module.named_modules(remove_duplicate=False)
        if (type(part) is nn.Linear or is_patches(part)) and name  # the nameless one is the module itself
    }
    wrong = unmatched(layers, exclude)
    if wrong:
        raise ValueError(f"exclude: no layer to be rounded is called {', '.join(wrong)}; there are {', '.join(layers)}")
    chosen = [name for name in layers if not is_excluded(name, exclude)]
    if not chosen:
        raise ValueError("there is no Linear layer to fake-quantize")
    narrow = int8_saturates() if reduce_range is None else reduce_range
    wrapped: dict[int, FakeQuantLinear] = {}  # a layer used at two places stays one layer
    for name in chosen:
        layer = layers[name]
        if id(layer) not in wrapped:
            kind = FakeQuantPatches if isinstance(layer, nn.Conv2d) else FakeQuantLinear
            wrapped[id(layer)] = kind(layer, reduce_range=narrow)
        module.set_submodule(name, wrapped[id(layer)], strict=True)
    return chosen


def remove_fake_quant(module: nn.Module) -> None:
    """Puts the plain layers back, with the trained float weights. The names are those before insertion."""
    for name, part in list(module.named_modules(remove_duplicate=False)):
        if isinstance(part, FakeQuantLinear):
            module.set_submodule(name, part.to_plain(), strict=True)


def set_observing(module: nn.Module, on: bool) -> None:
    """Lets the ranges move with every batch, or freezes them."""
    for layer in _layers(module):
        layer.observing = on


def set_fake_quant(module: nn.Module, on: bool | float) -> None:
    """Switches the rounding on or off; off, the module computes what it did before insertion.

    Args:
        on: A share, 0 to 1, switches on so many of the layers, from the first one on.
    """
    layers = _layers(module)
    for place, layer in enumerate(layers):
        layer.fake_quant = place < on * len(layers)


@contextmanager
def exporting(module: nn.Module) -> Iterator[None]:
    """Has the fake-quantized layers emit ONNX operators; in here only the exporter can call them.

    Raises:
        ValueError: The module has no fake-quantized layer.
        RuntimeError: A layer has no range.
    """
    layers = _layers(module)
    if not layers:
        raise ValueError("the module has no fake-quantized layers: call insert_fake_quant first")
    try:
        for layer in layers:
            layer.begin_export()
        yield
    finally:
        for layer in layers:
            layer.end_export()


def export_qdq(component: ComponentSpec, example_inputs: Mapping[str, Tensor], path: Path, *, tables: bool = True) -> None:
    """Writes a fake-quantized component as ONNX with int8 weights (QDQ), ready for integer kernels.

    Args:
        component: Its module has been through `insert_fake_quant` and has seen data.
        example_inputs: See `export_component`.
        path: Where to write.
        tables: Whether to store embedding tables in int8, one scale a row, and other constants as `stored` does. Training
            did not see that rounding; it is at most 1/254 of a row's largest number. A table that is a layer's weight as well
            takes that layer's integers (1/126 where they are of 7 bits).

    Raises:
        ValueError: The module has no fake-quantized layer, or see `export_component`.
        RuntimeError: A layer has no range.
    """
    with exporting(component.module):
        export_component(component, example_inputs, path)
    if tables:
        model = onnx.load(path)
        fold_lookups(model)
        floats = 4 * sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
        share_integers(model)
        onnx_graph.quantize_tables(model)
        store_constants(model, float_bytes=floats)
        _name_constants(model)
        del model.graph.value_info[:]
        onnx_graph.save(model, path)


def _name_constants(model: onnx.ModelProto) -> None:
    """Names scales and zero points of activations by their tensor, in place, as ONNX Runtime's quantizer does.

    The exporter names them by the layer, and each name stands there three times, which shows in a small model's size.
    """
    taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
    names: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            for old, word in zip(node.input[1:], ("scale", "zero_point"), strict=True):
                new = f"{node.input[0]}_{word}"
                if old not in names and new not in taken:  # a tensor may be rounded in two ways
                    names[old] = new
                    taken.add(new)
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


def _layers(module: nn.Module) -> list[FakeQuantLinear]:
    return [part for part in module.modules() if isinstance(part, FakeQuantLinear)]
