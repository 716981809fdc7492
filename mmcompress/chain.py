"""The chain: baseline, then for each pass apply, check, save, measure, gate; resumable at every whole step."""

from __future__ import annotations

import filecmp
import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from mmcompress import __version__, processes
from mmcompress.config import resolve
from mmcompress.data.examples import Examples
from mmcompress.data.leaks import find_leaks, refuse
from mmcompress.environment import environment
from mmcompress.errors import UserError
from mmcompress.files import disk_error, folder_bytes, is_full_disk, write_json, write_text, writing_folder
from mmcompress.fingerprints import differences, fingerprints
from mmcompress.logs import logging_to
from mmcompress.measure.gallery import keep_media
from mmcompress.measure.headline import applied, compared, float_onnx, time_headline
from mmcompress.measure.quality import load_scores, save_scores
from mmcompress.measure.rows import Meter
from mmcompress.measure.slicing import check_columns
from mmcompress.model import CompressedModel, load
from mmcompress.origins import origins
from mmcompress.passes.base import Pass
from mmcompress.plan import fit
from mmcompress.progress import SILENT, Reporter
from mmcompress.recipe import Recipe, load_recipe, make_recipe, margins, resolved
from mmcompress.report.build import add_notes, judge, shipping_row, totals
from mmcompress.report.read import open_run
from mmcompress.report.schema import GateResult, Report, Row, Warning_
from mmcompress.report.schema_data import Leaks
from mmcompress.report.schema_robustness import Robustness
from mmcompress.report.schema_speed import Headline
from mmcompress.report.words import leak_words
from mmcompress.report.write import write_report
from mmcompress.robust import robustness_of_run
from mmcompress.run_folder import LEAKS_FILE, STATE_FILE, STEP_FILE, TIMING, TRAINING, clear, exclusive, write_final
from mmcompress.runtimes.onnx_predict import component_files
from mmcompress.runtimes.precision import precision_of
from mmcompress.steps import apply_step, follow, load_examples, step_names

log = logging.getLogger(__name__)


@dataclass
class RunResult:
    """What a run leaves.

    Attributes:
        folder: the run's folder.
        report: also in ``report.json``.
        met: False when a gate was not met (missed, or not shown).
    """

    folder: Path
    report: Report
    met: bool

    @property
    def model(self) -> CompressedModel:
        """The final model, loaded from ``model/``."""
        return load(self.folder / "model")


def run(
    recipe: str | Path | Recipe | Mapping[str, Any],
    output: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    fresh: bool = False,
    reporter: Reporter = SILENT,
) -> RunResult:
    """Runs a recipe, or goes on with it from what was saved last.

    Args:
        recipe: a YAML file, a recipe, or a recipe as plain data.
        output: the run's folder; ``runs/<name>`` where left out.
        overrides: ``key.path=value`` each; only with a file.
        fresh: throws away what an earlier run left in the folder.

    Raises:
        RecipeError: the recipe is wrong; nothing was loaded or written.
        UserError: something the user can mend; what was finished stays usable.
    """
    if isinstance(recipe, Recipe):
        plan = recipe
    elif isinstance(recipe, Mapping):
        plan = make_recipe(recipe)
    else:
        plan = load_recipe(recipe, overrides)
    folder = Path(output) if output is not None else Path("runs") / plan.name
    with processes.joined():
        if processes.rank():
            met = follow(plan, folder)
            return RunResult(folder, open_run(folder), met)
        result = _lead(plan, folder, fresh, reporter)
        processes.tell(result.met)
        return result


def _lead(plan: Recipe, folder: Path, fresh: bool, reporter: Reporter) -> RunResult:
    """What the main process does, which mostly is the only one."""
    new = not folder.exists()
    try:
        with exclusive(folder), logging_to(folder / "log.txt"):
            try:
                return Chain(plan, folder, reporter, fresh).go()
            finally:
                shutil.rmtree(folder / ".work", ignore_errors=True)
    except UserError:
        if new and not (folder / "steps").exists():
            shutil.rmtree(folder, ignore_errors=True)  # nothing but our own bookkeeping: leave no half-made run behind
        raise
    except (OSError, RuntimeError, SafetensorError) as e:
        if is_full_disk(e):
            raise disk_error(e, folder) from e
        raise


class Chain:
    """One run over one folder."""

    def __init__(self, recipe: Recipe, folder: Path, reporter: Reporter, fresh: bool) -> None:
        self.recipe = recipe
        self.folder = folder
        self.reporter = reporter
        self.rows: list[Row] = []
        self.gates: list[GateResult] = []
        self.warnings: list[Warning_] = []
        self.model_class = ""
        self.robustness: Robustness | None = None
        self.headline: Headline | None = None
        self.names = step_names(recipe)
        if fresh:
            clear(folder)

    def go(self) -> RunResult:
        """All steps, the final folders and the report."""
        self._open()
        if not all(self._whole(self.folder / "steps" / name) for name in self.names):
            fit(self.recipe)  # what could only end with an error hours from now is told at once
        data = load_examples(self.recipe)
        for which, examples in data.items():
            log.info("%s: %d examples", which, len(examples))
        check_columns(data["eval"], self.recipe.report.slices or [])
        self.meter = Meter(self.recipe.task, data["eval"], self.recipe.report, self.reporter, margins=margins(self.recipe))
        self._look_for_leaks(data)
        self.origins = origins(self.recipe, data)
        self._look_for_numbers(data)
        self.data = data
        self._baseline()
        last, final, stopped = 0, self.rows[0], False
        for i, step in enumerate(self.recipe.passes, 1):
            self._step(i, step, last)
            row = shipping_row(self.rows, f"{i}-{step.name}", step.makes_files)
            if self._kept(row):
                last, final = i, row
            elif self._on_miss(row) == "stop":
                stopped = True
                break
            self._write_report(final, finished=False)
        return self._finish(last, final, stopped)

    def _open(self) -> None:
        """Writes down what this run is, or checks that the folder's run is the same one."""
        state = {
            "format_version": 1,
            "mmcompress": __version__,
            "recipe": resolved(self.recipe),
            "inputs": fingerprints(self.recipe),
        }
        path = self.folder / STATE_FILE
        if path.exists():
            try:
                old = json.loads(path.read_text())
            except json.JSONDecodeError as e:
                raise UserError(f"{path}: damaged; run with --fresh to begin again") from e
            differing = differences(old, state)
            if differing:
                raise UserError(
                    f"{self.folder}: holds a run that differs in {', '.join(differing[:4])}; choose another folder with -o, "
                    f"or throw that run away with --fresh"
                )
        else:
            write_json(path, state)
        text = yaml.safe_dump(state["recipe"], sort_keys=False, allow_unicode=True)
        write_text(self.folder / "recipe.yaml", text)
        shutil.rmtree(self.folder / ".work", ignore_errors=True)

    def _look_for_numbers(self, data: dict[str, Examples]) -> None:
        """Labels that are numbers without names make prompts such as "a photo of a 3."; that is hardly what was meant."""
        classes = data["eval"].classes or []
        if "label" in self.recipe.task.roles and len(classes) > 1 and all(name.isdigit() for name in classes):
            text = f"The classes are called {classes[0]}, {classes[1]}, ...; prompts read so. Name them with classes: [...]"
            self.warnings.append(Warning_(step="baseline", text=text))
            self.reporter.say(f"warning: {text}")

    def _look_for_leaks(self, data: dict[str, Examples]) -> None:
        """Looks once: the inputs of a run that goes on are those of its beginning.

        Raises:
            DataError: evaluation examples are in training or calibration data, and the recipe does not allow it.
        """
        kept = self.folder / "measurements" / LEAKS_FILE
        if kept.exists():
            self.leaks = Leaks.model_validate_json(kept.read_text())
            return
        drawn = {which: source.from_ for which in data if (source := getattr(self.recipe.data, which)) and source.from_}
        self.leaks = find_leaks(data, drawn=drawn, reporter=self.reporter)
        self.leaks.allowed = self.recipe.data.allow_leaks
        if not self.leaks.allowed:
            refuse(self.leaks, {which: examples.name for which, examples in data.items()})
        kept.parent.mkdir(exist_ok=True)
        write_json(kept, self.leaks.model_dump(mode="json"))

    # The steps.

    def _baseline(self) -> None:
        place = self.folder / "steps" / self.names[0]
        if not self._whole(place):
            self.reporter.say(f"baseline: loading {self.recipe.model}")
            start = time.monotonic()
            source = load(self.recipe.model, trust_remote_code=self.recipe.trust_remote_code)
            self.recipe.task.fits(source.family.abilities, source.family.name)
            source.onnx = None
            warnings = []
            if source.stored_dtype != "float32":
                where = resolve(self.recipe.model)
                own = f" in {folder_bytes(where, '*.safetensors') / 1e6:.1f} MB" if isinstance(where, Path) else ""
                warnings.append(
                    f"The model's own file stores {source.stored_dtype} weights{own}; every step is run and saved as float32; "
                    "the baseline's size here is that of its float32 form."
                )
            self._save(source, place, {"seconds": time.monotonic() - start, "warnings": warnings, "facts": {}})
        config = json.loads((place / "config.json").read_text())
        self.model_class = str((config.get("architectures") or [""])[0])
        self._measure(0, "baseline", None)

    def _step(self, i: int, step: Pass, last: int) -> None:
        place = self.folder / "steps" / self.names[i]
        if not self._whole(place):
            self.reporter.say(f"{i}-{step.name}: {_short(step)}")
            if step.trains():
                processes.tell([i, last])
            work = self.folder / ".work"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            after, facts = apply_step(self.recipe, self.folder, self.data, i, last, work, self.reporter)
            self._save(after, place, facts)
            shutil.rmtree(work, ignore_errors=True)
            shutil.rmtree(self.folder / TRAINING, ignore_errors=True)
        self._measure(i, f"{i}-{step.name}", step)

    def _save(self, model: CompressedModel, place: Path, facts: dict[str, Any]) -> None:
        with writing_folder(place) as beside:
            model.write(beside)
            write_json(beside / STEP_FILE, facts)

    def _whole(self, place: Path) -> bool:
        """Folders are renamed into place, so that one that is there is whole; what a killed run left beside is removed."""
        return (place / STEP_FILE).exists()

    def _measure(self, i: int, step: str, made_by: Pass | None) -> None:
        """Measures a saved step, or reads what an earlier call measured; then adds notes and warnings."""
        place = self.folder / "steps" / self.names[i]
        kept = self.folder / "measurements" / self.names[i]
        facts = json.loads((place / STEP_FILE).read_text())
        if not kept.exists():
            model = load(place)
            rows = self._rows(model, place, step, made_by)
            for row in rows:
                row.seconds, row.facts = facts["seconds"], facts["facts"]
                row.folder = f"steps/{self.names[i]}"
                if made_by is not None:
                    row.settings = made_by.model_dump(mode="json", by_alias=True)
                    row.result = model.history[-1]["result"]
            with writing_folder(kept) as beside:
                write_json(beside / "rows.json", [row.model_dump(mode="json") for row in rows])
                for row in rows:
                    save_scores(self.meter.scores[f"{step}.{row.runtime}"], beside / f"scores-{row.runtime}.safetensors")
        rows = [Row.model_validate(r) for r in json.loads((kept / "rows.json").read_text())]
        if i == 0:
            self.meter.baseline = load_scores(kept / f"scores-{rows[0].runtime}.safetensors")
        for row in rows:
            before = [r for r in self.rows if r.runtime == row.runtime and not r.rolled_back]
            add_notes(row, before[-1] if before else None, made_by is not None and made_by.name in ("prune", "quantize", "qat"))
            if row.disturbed:
                text = (
                    f"Other programs used {row.busy_cores:.1f} cores while this was timed in {row.runtime}: those times are "
                    f"not to be trusted. Delete measurements/{kept.name} in the run's folder and run again to measure anew."
                )
                self.warnings.append(Warning_(step=step, text=text))
        self.rows += rows
        self.warnings += [Warning_(step=step, text=text) for text in facts["warnings"]]
        self._say_row(rows)

    def _rows(self, model: CompressedModel, place: Path, step: str, made_by: Pass | None) -> list[Row]:
        """A row for each runtime that is asked for and that the step changed."""
        wanted = self.recipe.report.runtimes
        rows = []
        makes_files = made_by is not None and made_by.makes_files
        changed = made_by is None or made_by.changes == "weights"
        if changed and ("torch" in wanted or made_by is None):
            rows.append(self.meter.torch_row(model, place, step))
            if made_by is None:
                self.meter.baseline = self.meter.scores[f"{step}.torch"]
        if makes_files and model.onnx is not None:
            twin = self._same_files(model.onnx)
            if twin is not None:
                note = f"The same components as {twin.step}, byte for byte: measured once."
                for one in [r for r in self.rows if r.step == twin.step and r.runtime != "torch"]:
                    self.meter.scores[f"{step}.{one.runtime}"] = load_scores(
                        self.folder / "measurements" / Path(twin.folder).name / f"scores-{one.runtime}.safetensors"
                    )
                    rows.append(one.model_copy(update={"step": step, "notes": [note], "same_files_as": twin.step}, deep=True))
                return rows
            precision = precision_of(component_files(model.onnx).values())
            rows.append(self.meter.onnx_row(model, place, step, precision))
            if "openvino" in wanted:
                rows.append(self.meter.onnx_row(model, place, step, precision, "openvino"))
        elif changed and {"onnxruntime", "openvino"} & set(wanted):
            onnx = float_onnx(model, self.folder / TIMING / place.name, self.reporter, keep=self.names[0])
            rows += [self.meter.onnx_row(model, onnx, step, "float32", r) for r in wanted if r != "torch"]
        return rows

    def _same_files(self, onnx: Path) -> Row | None:
        """The row of an earlier step whose ONNX components are the same files; timing them again would only add noise."""
        files = component_files(onnx)
        for row in reversed(self.rows):
            place = self.folder / row.folder
            if row.runtime != "onnxruntime" or not (place / "onnx").is_dir():
                continue
            theirs = component_files(place)
            if theirs.keys() == files.keys() and all(filecmp.cmp(files[n], theirs[n], shallow=False) for n in files):
                return row
        return None

    def _say_row(self, rows: list[Row]) -> None:
        for row in rows:
            quality = ", ".join(f"{k} {100 * v.value:.1f}" for k, v in list(row.quality.items())[:2])
            batch, latency = next(iter(row.latency_ms.items()))
            self.reporter.say(
                f"  {row.runtime} {row.precision}: {row.parameters / 1e6:.2f} M parameters, {row.disk_bytes / 1e6:.1f} MB, "
                f"{latency.p50:.2f} ms at batch {batch}, {quality}"
            )

    # Gates and the end.

    def _kept(self, row: Row) -> bool:
        """Judges the gates that are judged at every step; a rolled-back step's rows are marked."""
        own = [judge(gate, row, self.recipe.task.lower_is_better) for gate in self.recipe.gates if gate.on_miss != "report"]
        self.gates += own
        missed = [g for g in own if g.verdict != "met"]
        for gate in missed:
            self.reporter.say(f"  gate {gate.verdict}: {gate.words}; {gate.on_miss}")
        if missed:
            for other in self.rows:
                if other.step == row.step:
                    other.rolled_back = True
        return not missed

    def _on_miss(self, row: Row) -> str:
        missed = [g.on_miss for g in self.gates if g.step == row.step and g.verdict != "met"]
        return "stop" if "stop" in missed else "rollback"

    def _finish(self, last: int, final: Row, stopped: bool) -> RunResult:
        at_end = [judge(gate, final, self.recipe.task.lower_is_better) for gate in self.recipe.gates if gate.on_miss == "report"]
        self.gates += at_end
        write_final(self.folder, self.folder / "steps" / self.names[last])
        if self.recipe.report.side_by_side:
            self.reporter.note("timing side by side")
            which = compared(self.rows, final)
            self.headline = time_headline(which, self.recipe.report, self.data["eval"], self.folder, self._onnx_of)
            applied(self.headline, self.rows)
        shutil.rmtree(self.folder / TIMING, ignore_errors=True)
        self.robustness = robustness_of_run(self.recipe, self.folder, self.data, self.rows[0], final, self.reporter)
        report = self._write_report(final, finished=True)
        met = not stopped and all(g.verdict == "met" for g in at_end) and not any(row.rolled_back for row in self.rows)
        return RunResult(self.folder, report, met)

    def _onnx_of(self, row: Row) -> Path:
        place = self.folder / row.folder
        return place if (place / "onnx").is_dir() else float_onnx(load(place), self.folder / TIMING / place.name, self.reporter)

    def _write_report(self, final: Row, *, finished: bool) -> Report:
        metric = next(iter(self.recipe.task.metrics))
        synthetic = self.data["eval"].synthetic or self.recipe.model.startswith("bundled:")
        report = Report(
            name=self.recipe.name,
            model_class=self.model_class,
            recipe=resolved(self.recipe),
            environment=environment() | {"threads": self.recipe.report.threads},
            metrics=dict(self.recipe.task.metrics),
            lower_is_better=sorted(self.recipe.task.lower_is_better),
            units={m: self.recipe.task.units.get(m, "percent") for m in self.recipe.task.metrics},
            rows=self.rows,
            gates=self.gates,
            warnings=self.warnings,
            robustness=self.robustness,
            leaks=self.leaks,
            origins=self.origins,
            totals=totals(
                self.rows,
                name=self.recipe.name,
                metric=metric,
                final=final if final.step != "baseline" else None,
                finished=finished,
                synthetic=synthetic,
                lower_is_better=self.recipe.task.lower_is_better,
                caveat=leak_words(self.leaks),
                timed=self.headline,
            ),
            noise=self.headline.noise if self.headline else {},
            timing=self.headline.timing if self.headline else None,
        )
        keep_media(final.behaviour, self.data["eval"], self.folder)
        write_report(report, self.folder)
        return report


def _short(step: Pass) -> str:
    """The pass's settings that differ from their defaults, on one line."""
    settings = step.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude={"name"})
    return ", ".join(f"{k} {v}" for k, v in settings.items()) or "default settings"
