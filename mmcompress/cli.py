"""The command line: parse, call, print. No logic; heavy modules are imported by the command that needs them."""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from mmcompress import __version__
from mmcompress.errors import ProcessError, UserError
from mmcompress.politeness import be_polite
from mmcompress.processes import rank

app = typer.Typer(
    name="mmcompress",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Compress pretrained multimodal models by recipe, and report honestly what was gained and lost.",
)
_debug = False
_streams: tuple[TextIO, TextIO] | None = None

RecipeFile = Annotated[Path, typer.Argument(help="A recipe (YAML).", show_default=False)]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a value of the recipe.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _version(show: bool) -> None:
    if show:
        typer.echo(f"mmcompress {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    global _debug
    _debug = debug


@contextmanager
def _quiet() -> Iterator[None]:
    """Everything that libraries print goes to a scratch file while the block runs; ``_print`` still reaches the reader."""
    global _streams
    from mmcompress.logs import streams_to

    with tempfile.TemporaryDirectory(prefix="mmcompress-") as scratch, streams_to(Path(scratch) / "output.txt") as streams:
        _streams = streams
        try:
            yield
        finally:
            _streams = None


def _print(text: str, *, error: bool = False) -> None:
    stream = _streams[1 if error else 0] if _streams else sys.stderr if error else sys.stdout
    stream.write(text + "\n")
    stream.flush()


def _print_json(value: Any) -> None:
    _print(json.dumps(value, indent=1))


@app.command()
def run(
    recipe: RecipeFile,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The run's folder; runs/<name> where left out.")] = None,
    sets: Sets = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away what an earlier run left in the folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the plan and stop.")] = False,
) -> None:
    """Run a recipe. The same call again resumes. Exit code 3: a gate was not met."""
    from mmcompress.recipe import load_recipe

    plan = load_recipe(recipe, sets or [])
    follower = rank() > 0  # of a data-parallel run; the main process speaks for all
    if dry_run:
        _show_plan(plan)
        return
    with _quiet():
        from rich.console import Console

        from mmcompress import run as chain
        from mmcompress.progress import TerminalReporter
        from mmcompress.report.text import render_text

        reporter = TerminalReporter(Console(file=_streams[1] if _streams else sys.stderr, quiet=follower))
        with reporter.live():
            result = chain(plan, output, fresh=fresh, reporter=reporter)
        if not follower:
            _print(render_text(result.report, folder=result.folder))
            _print(f"\nreport: {(result.folder / 'report.html').resolve()}")
            _print(f"model:  {(result.folder / 'model').resolve()}")
    if not result.met:
        raise typer.Exit(3)


@app.command()
def check(recipe: RecipeFile, sets: Sets = None) -> None:
    """Validate a recipe without loading weights, and print the plan with estimated cost per step."""
    from mmcompress.recipe import load_recipe

    _show_plan(load_recipe(recipe, sets or []))


def _show_plan(recipe: Any) -> None:
    with _quiet():
        from mmcompress.plan_text import render_plan

        _print(render_plan(recipe))


@app.command()
def build(
    vision: Annotated[str, typer.Argument(help="Hub id or folder of a vision encoder (ViT, DeiT, ResNet).", show_default=False)],
    text: Annotated[str, typer.Argument(help="Hub id or folder of a text encoder (BERT, RoBERTa).", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="The model's folder.", show_default=False)],
    projection_dim: Annotated[int, typer.Option("--projection-dim", help="Width of the embeddings.")] = 512,
    seed: Annotated[int, typer.Option("--seed", help="Of the projections' first weights.")] = 0,
) -> None:
    """Put a vision and a text encoder side by side as a dual encoder, to be fine-tuned together by a recipe."""
    with _quiet():
        from mmcompress.build import build_dual_encoder

        model = build_dual_encoder(vision, text, output, projection_dim=projection_dim, seed=seed)
        _print(f"model:  {output.resolve()} ({model.parameters():,} parameters); its projections are new: fine-tune it")


@app.command()
def inspect(
    model: Annotated[str | None, typer.Argument(help="Hub id, folder, or bundled:<name>.")] = None,
    as_json: AsJson = False,
    sensitivity: Annotated[
        Path | None,
        typer.Option(
            metavar="RECIPE",
            help="Instead, measure what cutting costs: per tower and axis, each ratio's loss in the task's headline metric right "
            "after the cut, with its 95% interval. On training (or calibration) examples, never on the evaluation data: ratios "
            "that are chosen on it would make the report's quality a leak.",
        ),
    ] = None,
    sets: Sets = None,
    ratio: Annotated[list[float] | None, typer.Option(help="A share to cut; may repeat. Default 0.125 to 0.875.")] = None,
    axis: Annotated[list[str] | None, typer.Option(help="An axis; may repeat. Default: all that stock configs say.")] = None,
    criterion: Annotated[
        str | None, typer.Option(help="How units are ranked; that of the recipe's first prune pass, else activation.")
    ] = None,
    samples: Annotated[int, typer.Option(min=16, help="Examples that are scored; at most half of the training examples.")] = 512,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the picture here, as an HTML page.")] = None,
) -> None:
    """Show a model's towers, components, parameters and bytes, and which axes can be pruned; or what cutting them costs."""
    from mmcompress.errors import RecipeError

    if (model is None) == (sensitivity is None):
        raise RecipeError("inspect: allowed: a MODEL, or --sensitivity RECIPE, whose model is measured")
    if sensitivity is not None:
        _sensitivity(sensitivity, sets or [], as_json, output, {"ratios": ratio, "axes": axis}, criterion, samples)
        return
    if model is None or output is not None or sets or ratio or axis or criterion:
        raise RecipeError("inspect: -o, --set, --ratio, --axis and --criterion go with --sensitivity RECIPE")
    with _quiet():
        from mmcompress.inspect import inspect_model, render_inspection

        found = inspect_model(model)
        if as_json:
            _print_json(found)
        else:
            _print(render_inspection(found))


def _sensitivity(
    path: Path,
    sets: list[str],
    as_json: bool,
    output: Path | None,
    where: dict[str, Any],
    criterion: str | None,
    samples: int,
) -> None:
    from mmcompress.recipe import load_recipe

    plan = load_recipe(path, sets)
    with _quiet():
        from rich.console import Console

        from mmcompress.curves import render_sensitivity, sensitivity
        from mmcompress.files import write_text
        from mmcompress.progress import TerminalReporter
        from mmcompress.report.sensitivity import render_sensitivity_html

        reporter = TerminalReporter(Console(file=_streams[1] if _streams else sys.stderr))
        with reporter.live():
            found = sensitivity(
                plan, ratios=where["ratios"], axes=where["axes"], criterion=criterion, samples=samples, reporter=reporter
            )
        if output is not None:
            write_text(output, render_sensitivity_html(found))
        if as_json:
            _print_json(found)
        else:
            _print(render_sensitivity(found))
            if output is not None:
                _print(f"\npage: {output.resolve()}")


@app.command(name="eval")
def evaluate(
    recipe: RecipeFile,
    model: Annotated[str, typer.Argument(help="A model folder, hub id, or folder with ONNX components.", show_default=False)],
    sets: Sets = None,
    robustness: Annotated[
        bool, typer.Option("--robustness", help="Score it on damaged inputs too, as report.robustness says, or by default.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Score any model on a recipe's task and evaluation data."""
    from mmcompress.recipe import load_recipe

    plan = load_recipe(recipe, sets or [])
    with _quiet():
        from rich.console import Console

        from mmcompress.evaluate import evaluate_model, render_evaluation
        from mmcompress.progress import TerminalReporter

        reporter = TerminalReporter(Console(file=_streams[1] if _streams else sys.stderr))
        with reporter.live():
            found = evaluate_model(plan, model, robustness=robustness, reporter=reporter)
        if as_json:
            _print_json(found)
        else:
            _print(render_evaluation(found))


@app.command()
def bench(
    models: Annotated[
        list[str], typer.Argument(help="Model folders, bundled:<name> or folders with ONNX components.", show_default=False)
    ],
    batch_size: Annotated[
        list[int] | None, typer.Option("--batch-size", min=1, help="Batch size; may repeat. Default 1.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each measurement.")] = 2,
    seconds: Annotated[float, typer.Option(min=0.05, help="Seconds for each figure.")] = 2.0,
    as_json: AsJson = False,
) -> None:
    """Time models side by side, each in a process of its own."""
    with _quiet():
        from mmcompress.bench import bench_models, render_bench

        found = bench_models(models, batch_size or [1], threads, seconds)
        if as_json:
            _print_json(found)
        else:
            _print(render_bench(found))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.", show_default=False)],
    form: Annotated[str, typer.Option("--format", help="html, md, json or text.")] = "text",
) -> None:
    """Print the report of a finished or half-finished run."""
    from mmcompress.errors import RecipeError, one_of

    if form not in ("html", "md", "json", "text"):
        raise RecipeError("--format: " + one_of("format", form, ["html", "md", "json", "text"]))
    with _quiet():
        from mmcompress.report import html, markdown, text
        from mmcompress.report.read import open_run

        found = open_run(folder)
        makers: dict[str, Callable[[Any], str]] = {
            "html": lambda r: html.render_html(r, folder),
            "md": lambda r: markdown.render_markdown(r, folder),
            "text": lambda r: text.render_text(r, folder=folder),
            "json": lambda r: str(r.model_dump_json(indent=1)),
        }
        _print(makers[form](found))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.", show_default=False)],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write an HTML page here.")] = None,
) -> None:
    """Put several runs side by side."""
    with _quiet():
        from mmcompress.files import write_text
        from mmcompress.report.compare import compare_reports, render_compare_text, short_names
        from mmcompress.report.compare_page import render_compare_html
        from mmcompress.report.read import open_run

        found = compare_reports([(name, open_run(folder)) for name, folder in zip(short_names(runs), runs, strict=True)], runs)
        _print(render_compare_text(found))
        if output is not None:
            write_text(output, render_compare_html(found))
            _print(f"\npage: {output.resolve()}")


@app.command(name="list")
def list_(
    kind: Annotated[str, typer.Argument(help="passes, families, tasks, criteria, losses or recipes.", show_default=False)],
    name: Annotated[str | None, typer.Argument(help="Explain one: its fields with description, unit and range.")] = None,
) -> None:
    """List what there is, a line each; with a name, explain one."""
    from mmcompress.listing import explain_one, list_kind

    _print(explain_one(kind, name) if name else list_kind(kind))


@app.command()
def schema(report: Annotated[bool, typer.Option("--report", help="The schema of report.json instead.")] = False) -> None:
    """Print the JSON Schema of a recipe."""
    if report:
        from mmcompress.report.schema import report_schema

        _print_json(report_schema())
    else:
        from mmcompress.recipe import json_schema

        _print_json(json_schema())


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show versions and CPU features, and what is missing or will not work together."""
    with _quiet():
        from mmcompress.doctor import diagnose, render_diagnosis

        found = diagnose()
        if as_json:
            _print_json(found)
        else:
            _print(render_diagnosis(found))
    if found["problems"]:
        raise typer.Exit(1)


def main() -> None:
    """The entry point: one clear message for what a user can mend, and the exit codes 0, 1, 2 and 3."""
    be_polite()
    try:
        sys.exit(app(standalone_mode=False))
    except ProcessError as e:
        if rank():  # the main process says why
            sys.exit(e.exit_code)
        _fail(str(e), e.exit_code)
    except UserError as e:
        _fail(str(e), e.exit_code)
    except KeyboardInterrupt:
        if rank():
            sys.exit(130)
        _fail("stopped; the same command goes on from what was saved last", 130)
    except BrokenPipeError:
        with suppress(OSError):
            sys.stdout.close()
        sys.exit(0)
    except (typer.Exit, SystemExit) as e:
        sys.exit(getattr(e, "exit_code", getattr(e, "code", 0)))
    except typer.Abort:
        _fail("stopped", 130)
    except Exception as e:  # noqa: BLE001  (the last resort: a bug is reported as one, in one line)
        if type(e).__module__.startswith(("click", "typer")) and hasattr(e, "format_message"):
            _fail(e.format_message(), 2)
        _fail(
            f"this is a bug in mmcompress: {type(e).__name__}: {e}\nrun again with --debug (mmcompress --debug ...) to see where",
            1,
        )


def _fail(message: str, code: int) -> None:
    if _debug:
        traceback.print_exc()
    who = f"process {rank()}: " if rank() else ""
    sys.stderr.write(f"error: {who}{message}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
