"""What the passes that write int8 share. Importable without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmcompress.environment import int8_saturates

ReduceRange = Annotated[
    Literal["auto"] | bool,
    Field(
        description="Whether int8 weights take 7 bits: x86 processors without VNNI add products in 16 bits, which overflow. auto "
        "asks the processor that runs the pass; say true where the files will be run on older ones."
    ),
]


def reduced(wanted: Literal["auto"] | bool) -> bool:
    """Whether weights take 7 bits."""
    return int8_saturates() if wanted == "auto" else wanted
