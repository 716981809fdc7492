"""One file a pass. ``mmcompress.passes.Prune`` and the others are found by name on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmcompress import registry

if TYPE_CHECKING:
    from mmcompress.passes.distill import Distill as Distill
    from mmcompress.passes.export import Export as Export
    from mmcompress.passes.finetune import Finetune as Finetune
    from mmcompress.passes.prune import Prune as Prune
    from mmcompress.passes.qat import Qat as Qat
    from mmcompress.passes.quantize import Quantize as Quantize


def __getattr__(name: str) -> Any:
    # Class names are the CamelCase of file names; a lookup by file name keeps a new pass to one file.
    for known in registry.names("passes"):
        if "".join(part.capitalize() for part in known.split("-")) == name:
            return registry.find("passes", known).PASS
    raise AttributeError(f"module 'mmcompress.passes' has no attribute {name!r}")
