"""What a model consists of, by tower: for ``mmcompress inspect``."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

from mmcompress.measure.size import flops_by_component, parameters_by_tower, torch_bytes_by_tower
from mmcompress.model import CompressedModel, load


def inspect_model(source: str | CompressedModel) -> dict[str, Any]:
    """Towers with parameters, bytes, FLOPs and sizes; for each axis how far it can be cut.

    Returns:
        Plain data: ``model``, ``family``, ``parameters``, ``towers``, ``axes``, ``history``.
    """
    model = load(source) if isinstance(source, str) else source
    parameters, disk, flops = parameters_by_tower(model), torch_bytes_by_tower(model), flops_by_component(model)
    sizes = model.family.config_sizes(model.module.config)
    parts = model.family.components(model.module)
    towers: dict[str, Any] = {}
    for tower in parameters:
        own = [part for part in parts.values() if part.tower == tower]
        axes = {}
        for axis in model.family.tower_axes(tower) if tower in sizes else ():
            size = sizes[tower][axis]
            least = sizes[tower]["width"] // sizes[tower]["heads"] if axis == "width" and "heads" in sizes[tower] else 1
            axes[axis] = {"size": size, "max_ratio": round(1 - least / size, 4), "stock": axis in model.family.stock_axes}
        towers[tower] = {
            "parameters": parameters[tower],
            "bytes": disk[tower],
            "components": {
                p.name: {"inputs": list(p.inputs), "outputs": list(p.outputs), "flops": flops.get(p.name)} for p in own
            },
            "axes": axes,
        }
    return {
        "model": model.source,
        "family": model.family.name,
        "class": type(model.module).__name__,
        "parameters": model.parameters(),
        "bytes": sum(disk.values()),
        "stored_dtype": model.stored_dtype,
        "custom": model.custom,
        "towers": towers,
        "axes": dict(model.family.axes),
        "history": [{"pass": h["pass"], "settings": h["settings"]} for h in model.history],
    }


def render_inspection(found: dict[str, Any]) -> str:
    """The same as text."""
    lines = [
        f"{found['model']}: {found['class']}, family {found['family']}, {found['parameters']:,} parameters, "
        f"stored as {found['stored_dtype']}"
    ]
    if found["custom"]:
        lines.append("custom shapes: loads with mmcompress or ONNX only")
    rows = []
    for tower, t in found["towers"].items():
        flops = sum(c["flops"] or 0 for c in t["components"].values())
        share = t["parameters"] / found["parameters"]
        rows.append(
            [
                tower,
                ", ".join(t["components"]) or "-",
                f"{t['parameters']:,}",
                f"{100 * share:.1f}%",
                f"{t['bytes'] / 1e6:.2f} MB",
                f"{flops / 1e9:.3f} G" if flops else "-",
            ]
        )
    headers = ["tower", "components", "parameters", "share", "bytes (float32)", "FLOPs (1 example)"]
    lines += ["", tabulate(rows, headers=headers, disable_numparse=True)]
    cuts = [
        [tower, axis, a["size"], f"up to {a['max_ratio']:.3f}", "stock transformers" if a["stock"] else "needs allow_custom"]
        for tower, t in found["towers"].items()
        for axis, a in t["axes"].items()
    ]
    lines += ["", tabulate(cuts, headers=["tower", "axis", "size", "ratio", "reloads with"], disable_numparse=True), ""]
    lines += [f"{axis}: {what}" for axis, what in found["axes"].items()]
    if found["history"]:
        lines += ["", "history: " + " -> ".join(h["pass"] for h in found["history"])]
    return "\n".join(lines)
