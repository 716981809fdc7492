"""Int8 files by other tools' defaults, each made in that tool's own environment, for ``int8.py``.

    PYTHON benchmarks/int8_others.py TOOL FLOAT.onnx CALIBRATION.npz TARGET

TOOL is ``olive-static``, ``olive-dynamic`` or ``nncf``. CALIBRATION holds each input of the model with one example a row.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np


class Rows:
    """The calibration data as Olive wants it: an indexable of (inputs, label)."""

    def __init__(self, path: str) -> None:
        self.values = dict(np.load(path))

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def __getitem__(self, i: int) -> tuple[dict[str, np.ndarray], int]:
        return {name: values[i] for name, values in self.values.items()}, 0


def olive(kind: str, source: str, calibration: str, target: str) -> None:
    """Olive's pass with its default settings."""
    from olive.data.registry import Registry
    from olive.workflows import run

    @Registry.register_dataset("int8_benchmark_rows")  # type: ignore[untyped-decorator]
    def rows(**_: Any) -> Rows:
        return Rows(calibration)

    settings: dict[str, Any] = {"type": "OnnxStaticQuantization" if kind == "olive-static" else "OnnxDynamicQuantization"}
    if kind == "olive-static":
        settings["data_config"] = {
            "name": "rows",
            "type": "DataContainer",
            "load_dataset_config": {"type": "int8_benchmark_rows"},
            "pre_process_data_config": {"type": "skip_pre_process"},
            "post_process_data_config": {"type": "skip_post_process"},
            "dataloader_config": {"type": "default_dataloader", "batch_size": 1},
        }
    folder = Path(target).with_suffix("")
    run(
        {
            "input_model": {"type": "ONNXModel", "model_path": source},
            "systems": {"here": {"type": "LocalSystem", "accelerators": [{"device": "cpu"}]}},
            "passes": {"quantize": settings},
            "host": "here",
            "target": "here",
            "output_dir": str(folder),
            "cache_dir": str(folder) + "-cache",
        }
    )
    found = next(folder.rglob("*.onnx"))
    for path in found.parent.glob(f"{found.name}*"):
        shutil.copy2(path, Path(target).with_name(path.name) if path != found else target)


def nncf_default(source: str, calibration: str, target: str) -> None:
    """NNCF's ``quantize`` for transformers, as an OpenVINO model."""
    import nncf
    import openvino

    rows = Rows(calibration)
    items = [{name: values[None] for name, values in rows[i][0].items()} for i in range(len(rows))]
    model = openvino.Core().read_model(source)
    found = nncf.quantize(
        model,
        nncf.Dataset(items),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(items),
        preset=nncf.QuantizationPreset.MIXED,
    )
    openvino.save_model(found, target, compress_to_fp16=False)


if __name__ == "__main__":
    tool, *arguments = sys.argv[1:]
    if tool == "nncf":
        nncf_default(*arguments)
    else:
        olive(tool, *arguments)
