"""The rows that a run's headline compares, timed side by side when it ends; see ``side_by_side.py``."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from mmcompress.data.examples import Examples
from mmcompress.files import write_text, writing_folder
from mmcompress.measure.rows import export_float
from mmcompress.measure.side_by_side import Entry, Result, Settings, cost, fitting, side_by_side, sizes
from mmcompress.model import CompressedModel, load
from mmcompress.progress import Reporter
from mmcompress.recipe import ReportSettings
from mmcompress.report.schema import Row
from mmcompress.report.schema_speed import Headline, Served, Timing

KEPT = "side-by-side.json"
AGAIN = "the baseline a second time"


def key(row: Row) -> str:
    """``baseline.torch``."""
    return f"{row.step}.{row.runtime}"


@dataclass(frozen=True)
class Compared:
    """The rows that the headline speaks of.

    Attributes:
        baseline: in torch.
        final: the model that the run ends with, in the runtime that it is shipped for.
        rows: all of them, those that matter most first.
    """

    baseline: Row
    final: Row
    rows: list[Row]

    def pairs(self) -> list[tuple[str, str]]:
        """The ratios that the gain is made of, (above, below)."""
        named = {key(row): row for row in self.rows}
        first, onnx = key(self.baseline), "baseline.onnxruntime"
        found = [(first, name) for name in named if name != first]
        last = f"{self.final.step}.onnxruntime"
        if onnx in named and last in named and last != onnx:
            found.append((onnx, last))
        return found


def compared(rows: Sequence[Row], final: Row) -> Compared:
    """Picks them from all rows: the baseline and the final step in both runtimes, and the last torch model before it."""
    kept = [row for row in rows if not row.rolled_back]
    torch = [row for row in kept if row.runtime == "torch"]
    baseline = next((row for row in torch if row.step == "baseline"), kept[0])
    wanted = [
        baseline,
        final,
        *(row for row in kept if row.step == "baseline"),
        *(row for row in kept if row.step == final.step),
        *torch[-1:],
    ]
    return Compared(baseline, final, list({key(row): row for row in wanted}.values()))


def time_headline(
    which: Compared,
    settings: ReportSettings,
    examples: Examples,
    run: Path,
    onnx_folder: Callable[[Row], Path],
) -> Headline:
    """Times the rows that the headline compares, or reads what was timed of the same ones before.

    Args:
        run: the run's folder.
        onnx_folder: where a row's ONNX components are.

    Raises:
        UnavailableError: a process failed.
    """
    of, kept = _hash(which, run), run / "measurements" / KEPT
    if kept.exists():
        try:
            found = Headline.model_validate_json(kept.read_text())
        except ValidationError:
            pass  # written by another version: timed anew
        else:
            if found.of == of:
                return found
    memory = {key(which.baseline): which.baseline.peak_memory_bytes, AGAIN: which.baseline.peak_memory_bytes}
    fit, out = fitting(memory | {key(row): row.peak_memory_bytes for row in which.rows})
    rows = [row for row in which.rows if key(row) in fit]
    entries = [_entry(row, which, settings, run, onnx_folder) for row in rows]
    names = {key(row) for row in rows}
    pairs = [pair for pair in which.pairs() if names.issuperset(pair)]
    how = Settings(settings.batch_sizes, settings.threads, settings.seconds)
    result = side_by_side(entries, pairs, how, examples, twin=AGAIN in fit)
    headline = _headline(
        of, result, rows, settings, [f"{name}: not enough memory is free for all models at once" for name in out]
    )
    write_text(kept, headline.model_dump_json(indent=1))
    return headline


def float_onnx(model: CompressedModel, place: Path, reporter: Reporter, keep: str = "") -> Path:
    """The model's components as float32 ONNX files, exported where they are not there yet.

    Args:
        keep: where given, all folders beside it but that one are removed: one export is as large as the model.
    """
    if keep and place.parent.is_dir():
        for other in place.parent.iterdir():
            if other.name not in (keep, place.name):
                shutil.rmtree(other, ignore_errors=True)
    if not place.is_dir():
        with writing_folder(place) as beside:
            export_float(model, beside, reporter)
    return place


def _hash(which: Compared, run: Path) -> str:
    """Of what was measured of these rows: when a step is measured anew, so are the ratios."""
    digest = hashlib.sha256()
    for row in which.rows:
        digest.update(f"{key(row)} {row.runtime == which.final.runtime}".encode())
        digest.update((run / "measurements" / Path(row.folder).name / "rows.json").read_bytes())
    return digest.hexdigest()


def _entry(row: Row, which: Compared, settings: ReportSettings, run: Path, onnx_folder: Callable[[Row], Path]) -> Entry:
    place, scenarios = run / row.folder, row is which.baseline or row is which.final
    model = load(place)
    return Entry(
        name=key(row),
        folder=onnx_folder(row) if row.runtime == "onnxruntime" else place,
        runtime=row.runtime,
        calls={size: model.family.calls(model.module, size) for size in sizes(settings.batch_sizes, scenarios)},
        model_folder=place,
        device=settings.device if row.runtime == "torch" else "cpu",
        scenarios=scenarios,
    )


def _headline(of: str, result: Result, rows: Sequence[Row], settings: ReportSettings, left_out: list[str]) -> Headline:
    names = [key(row) for row in rows]
    served = {}
    for name in names:
        offline, price = result.offline.get(name), settings.price_per_hour
        served[name] = Served(
            ratio=result.ratios.get((names[0], name), {}),
            offline=offline,
            end_to_end=result.end_to_end.get(name),
            joules=result.joules[name],
            cost_per_million=None if price is None else cost(result.latency[name], offline, price),
        )
    return Headline(
        of=of,
        latency_ms={name: result.latency[name] for name in names},
        served=served,
        ratios={f"{above}/{below}": found for (above, below), found in result.ratios.items()},
        noise=result.noise,
        timing=Timing(
            models=names,
            rounds=result.rounds,
            seconds=result.seconds,
            busy_cores=result.busy_cores,
            idle_cores=result.idle_cores,
            threads=settings.threads,
            affinity=result.affinity,
            energy=result.energy,
            currency=settings.currency,
            price_per_hour=settings.price_per_hour,
            left_out=left_out,
        ),
    )


def applied(headline: Headline, rows: Sequence[Row]) -> None:
    """Puts what was timed side by side into the rows; those of the very files of one of them get its times too."""
    for row in rows:
        twin = f"{row.same_files_as}.{row.runtime}"
        if row.same_files_as is not None and key(row) in headline.latency_ms and twin not in headline.latency_ms:
            for other in rows:
                if key(other) == twin:
                    other.latency_ms = dict(headline.latency_ms[key(row)])
                    other.busy_cores = max(headline.timing.busy_cores, headline.timing.idle_cores)
    for row in rows:
        name = key(row)
        if name in headline.latency_ms and not row.rolled_back:
            row.latency_ms = dict(headline.latency_ms[name])
            row.served = headline.served[name]
            row.busy_cores = max(headline.timing.busy_cores, headline.timing.idle_cores)
