"""What quantizing a file did to it."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class QuantizationResult:
    """What a quantizer did to a file.

    Attributes:
        bytes_before: Size of the source with its external data.
        bytes_after: The same of the target.
        quantized: Names of the MatMul, Gemm and Conv nodes that now have integer weights.
        left_float: Names of those that have a weight and stayed float.
        float_products: Number of float products of two activations (attention).
        tables: Names of the embedding tables and other constants that are stored as integers and read as floats.
        unmatched_exclude: Exclude and include patterns that mean no layer of this file.
        op_counts: Nodes of the target by operator.
    """

    bytes_before: int
    bytes_after: int
    quantized: tuple[str, ...]
    left_float: tuple[str, ...]
    float_products: int
    tables: tuple[str, ...] = ()
    unmatched_exclude: tuple[str, ...] = ()
    op_counts: dict[str, int] = field(default_factory=dict)

    @property
    def shrank(self) -> bool:
        """Whether the target is smaller than the source: not so where float tables are most of the file."""
        return self.bytes_after < self.bytes_before
