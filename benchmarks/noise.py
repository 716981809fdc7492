"""A model against itself: how far the ratio of two processes of one file lies from 1, ten times over.

    python benchmarks/noise.py --out benchmarks/results/noise.json

Each ratio is taken as a run's report takes it (``mmcompress.measure.side_by_side``), with processes that are started anew. Run it
on an idle machine: what other programs used meanwhile is printed beside each.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from mmcompress.environment import environment
from mmcompress.logs import silence_libraries
from mmcompress.measure.headline import float_onnx
from mmcompress.measure.side_by_side import TWIN, Entry, Settings, side_by_side, sizes
from mmcompress.model import load
from mmcompress.progress import SILENT

LOW, HIGH = 0.97, 1.03
ENOUGH = 0.9


def main() -> int:
    """Prints the ratios; 1 where fewer than nine of ten lie between 0.97 and 1.03."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:shapes-clip")
    parser.add_argument("--runtime", choices=["torch", "onnxruntime"], default="torch")
    parser.add_argument("--batch-size", type=int, action="append")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="as the recipe's report.seconds")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    silence_libraries()
    batches = args.batch_size or [1, 8]
    model = load(args.model)
    calls = {size: model.family.calls(model.module, size) for size in sizes(batches, False)}
    found = []
    with TemporaryDirectory(prefix="mmcompress-") as scratch:
        folder = Path(scratch) / "model"
        if args.runtime == "torch":
            model.save(folder)
        else:
            float_onnx(model, folder, SILENT)
        for i in range(args.times):
            result = side_by_side([Entry("A", folder, args.runtime, calls)], [], Settings(batches, args.threads, args.seconds))
            noise = {batch: ratio.model_dump() for batch, ratio in result.noise.items()}
            ms = {batch: result.latency["A"][batch].p50 for batch in noise}
            again = {batch: result.latency["A" + TWIN][batch].p50 for batch in noise}
            found.append(
                {"noise": noise, "p50_ms": ms, "again_ms": again, "busy_cores": result.busy_cores, "seconds": result.seconds}
            )
            shown = "   ".join(
                f"batch {b}: {n['ratio']:.3f} [{n['low']:.3f}, {n['high']:.3f}] of {n['rounds']} rounds" for b, n in noise.items()
            )
            print(f"{i + 1:2}  {shown}   others {result.busy_cores:.2f} cores, {result.seconds:.0f} s", flush=True)
    inside = {b: sum(LOW <= f["noise"][b]["ratio"] <= HIGH for f in found) for b in map(str, batches)}
    print("; ".join(f"batch {b}: {count} of {args.times} between {LOW} and {HIGH}" for b, count in inside.items()))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            json.dumps({"environment": environment(), "settings": vars(args), "reports": found}, indent=1, default=str)
        )
    return 0 if all(count >= ENOUGH * args.times for count in inside.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
