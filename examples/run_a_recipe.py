"""Runs a small recipe from Python and reads the report: prune, distill and quantize the bundled CLIP, on few examples.

python examples/run_a_recipe.py --out run
"""

import argparse
from pathlib import Path

import mmcompress as mm

RECIPE = {
    "name": "small",
    "model": "bundled:shapes-clip",
    "task": {"type": "zero-shot-image-classification", "templates": ["a photo of a {}."]},
    "data": {
        "train": {"path": "bundled:shapes", "samples": 512},
        "calibration": {"from": "train", "samples": 64},
        "eval": {"path": "bundled:shapes", "samples": 200},
    },
    "passes": [
        {"pass": "prune", "axis": "ffn", "ratio": 0.5, "criterion": "magnitude"},
        {"pass": "distill", "max_steps": 4, "batch_size": 64, "learning_rate": 3e-4},
        {"pass": "quantize", "scheme": "int8-static", "samples": 64},
        {"pass": "export"},
    ],
    "gates": [{"metric": "accuracy", "max_drop": 5.0}],
    "report": {"batch_sizes": [1], "threads": 1, "seconds": 0.1, "runtimes": ["onnxruntime"], "side_by_side": False},
}


def main(out: Path) -> None:
    """Runs the recipe; a second call with the same folder only reads what is there."""
    result = mm.run(RECIPE, out)
    print(result.report.totals.headline)
    columns = ["step", "runtime", "precision", "parameters", "disk_bytes", "quality.accuracy"]
    print(result.report.to_frame()[columns].to_string(index=False))
    print(f"gates met: {result.met}")  # few steps on few examples: the report says whether that was enough
    print(f"report: {result.folder / 'report.html'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    main(parser.parse_args().out)
