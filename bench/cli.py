"""The command line: parse, call, print; no logic.

A command imports what it runs itself: the statistics and the figures take seconds to import, which
a question for help or a mistyped option should not wait for.
"""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Column, Table

import algorithms
import datasets
from algorithms import AlgorithmError
from algorithms.models import MODELS
from bench.errors import BenchError, RunError, printable
from bench.naming import names, said, varied
from bench.plugins import load_plugin, trusted
from bench.sweep import OPTIONS, Cell, Sweep, read_sweep
from bench.wording import counted
from datasets import DatasetError

app = typer.Typer(
    help="Compare few-shot meta-learning algorithms: the same training, the same episodes, "
    "intervals and costs.\n\nStart with: python -m bench run --algos maml,fomaml --shots 1,5",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

MOST_SHOWN = 1000
"""Characters of a message."""

AXES, TRAINING, EVALUATION, PLACES, EXECUTION = (
    "Axes, each a comma-separated list",
    "Training; 'list settings' has the defaults",
    "Evaluation; 'list settings' has the defaults",
    "Where things are",
    "Where cells are trained",
)


def _axis(help: str) -> Any:
    return typer.Option(help=help, rich_help_panel=AXES, show_default=False, metavar="LIST")


def _training(help: str) -> Any:
    return typer.Option(help=help, rich_help_panel=TRAINING, show_default=False)


def _evaluation(help: str) -> Any:
    return typer.Option(help=help, rich_help_panel=EVALUATION, show_default=False)


def _place(help: str) -> Any:
    return typer.Option(help=help, rich_help_panel=PLACES, show_default=False)


def _execution(help: str, **limits: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=EXECUTION, show_default=False, **limits)


# Options that commands share.
WAYS = _axis("Classes an episode. Default: 5.")
SHOTS = _axis("Support samples a class. Default: 1.")
DEVICES = _axis("cpu, cuda:0, mps. Default: the best there is.")
DATA_ROOT = _place("Folder of the data sets. Default: $BENCH_DATA, else a cache folder.")
DOWNLOAD = typer.Option("--download", help="Fetch missing data.", rich_help_panel=PLACES)
CONFIG = _place("TOML file with settings; options come before it.")
PLUGIN = _place("Python file that registers algorithms or datasets.")
ACCEPT_CHANGED_CODE = typer.Option(
    "--accept-changed-code",
    help="Put new cells beside such as different source made.",
    rich_help_panel=PLACES,
)
RETRY_FAILED = typer.Option(
    "--retry-failed", help="Do again what failed before; else it is left as it is."
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"fewshot-bench {metadata.version('fewshot-bench')}")
        raise typer.Exit


VERSION = typer.Option(
    "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
)


@app.callback()
def shared(version: Annotated[bool, VERSION] = False) -> None:
    """What all commands share."""


@app.command(
    epilog="Run the same command again and it goes on where it stopped. Every setting can also "
    "stand in a TOML file (--config), with underscores for hyphens; the sweep.toml in a run's "
    "folder is one."
)
def run(
    algos: Annotated[
        str | None, _axis("Algorithms; see 'list algorithms'. Default: maml,fomaml,anil,reptile.")
    ] = None,
    datasets: Annotated[
        str | None, _axis("Datasets; see 'list datasets'. Default: glyphs.")
    ] = None,
    ways: Annotated[str | None, WAYS] = None,
    shots: Annotated[str | None, SHOTS] = None,
    seeds: Annotated[str | None, _axis("Seeds of training. Default: 0.")] = None,
    devices: Annotated[str | None, DEVICES] = None,
    set: Annotated[
        list[str] | None,
        typer.Option(
            help="Any of 'list settings' as an axis, such as inner_lr=0.1,0.2; repeatable.",
            rich_help_panel=AXES,
            metavar="NAME=LIST",
        ),
    ] = None,
    iterations: Annotated[str | None, _training("Meta-training steps.")] = None,
    meta_batch: Annotated[str | None, _training("Tasks a meta-step.")] = None,
    train_shots: Annotated[
        str | None, _training("Support samples a class in training, where they differ.")
    ] = None,
    inner_lr: Annotated[str | None, _training("Step size of the inner loop.")] = None,
    inner_steps: Annotated[str | None, _training("Inner steps of a meta-step.")] = None,
    meta_lr: Annotated[str | None, _training("Step size of the outer loop.")] = None,
    norm: Annotated[
        str | None,
        _training("Whose batch-norm statistics: transductive, support, single or running."),
    ] = None,
    engine: Annotated[str | None, _training("Which inner loop: auto, higher or batched.")] = None,
    tasks_per_pass: Annotated[
        str | None, _training("Tasks adapted at once: fewer take less memory, with one gradient.")
    ] = None,
    checkpoint_inner: Annotated[
        bool,
        typer.Option(
            "--checkpoint-inner",
            help="Compute inner steps again in the backward pass: less memory, more time.",
            rich_help_panel=TRAINING,
        ),
    ] = False,
    verify_gradients: Annotated[
        bool,
        typer.Option(
            "--verify-gradients",
            help="After training too, hold the engine's gradient of a whole meta-batch against "
            "the reference's, in float64; gradient_error in the results. (Before training, two "
            "tasks of each kind of cell are, always.)",
            rich_help_panel=TRAINING,
        ),
    ] = False,
    model: Annotated[str | None, _training(f"Network: {', '.join(MODELS)}.")] = None,
    test_shots: Annotated[str | None, _evaluation("Query samples a class.")] = None,
    eval_steps: Annotated[str | None, _evaluation("Inner steps of an evaluation.")] = None,
    episodes: Annotated[str | None, _evaluation("Test episodes.")] = None,
    eval_seed: Annotated[str | None, _evaluation("Stream of validation and test episodes.")] = None,
    protocol: Annotated[
        str | None,
        _evaluation(
            "independent: test episodes may share samples; disjoint: no two do; "
            "lake: Omniglot's own 20 runs."
        ),
    ] = None,
    data_root: Annotated[Path | None, DATA_ROOT] = None,
    download: Annotated[bool, DOWNLOAD] = False,
    config: Annotated[Path | None, CONFIG] = None,
    plugin: Annotated[Path | None, PLUGIN] = None,
    out: Annotated[
        Path | None, _place("The run's folder. Default: results/ and a hash of what is asked.")
    ] = None,
    accept_changed_code: Annotated[bool, ACCEPT_CHANGED_CODE] = False,
    executor: Annotated[
        Literal["local", "ray", "slurm"] | None,
        _execution(
            "local: processes on this machine; ray, slurm: a cluster. Default: this process, one "
            "cell after another."
        ),
    ] = None,
    jobs: Annotated[
        int | None, _execution("Cells at a time. Default: 1; on a cluster, as many as fit.", min=1)
    ] = None,
    address: Annotated[
        str | None,
        _execution("Of a Ray cluster. Default: $RAY_ADDRESS, else one on this machine alone."),
    ] = None,
    cell_cpus: Annotated[
        int | None,
        _execution(
            "Threads that a cell computes with. Default: a fair share; on a cluster, 1.", min=1
        ),
    ] = None,
    cell_gpus: Annotated[
        float | None, _execution("GPUs of a cell on a cluster; 0.5 for two on one.", min=0)
    ] = None,
    cell_memory: Annotated[
        float | None, _execution("GiB of memory to set aside for a cell on a cluster.", min=0)
    ] = None,
    cell_timeout: Annotated[
        float | None,
        _execution("Seconds after which a cell has failed; in a process of its own.", min=0),
    ] = None,
    costs: Annotated[
        Literal["alone", "beside", "never"],
        typer.Option(
            help="When time and memory are measured: with nothing beside, while other cells are "
            "trained (--jobs), or not at all, which leaves these columns empty for good.",
            rich_help_panel=EXECUTION,
        ),
    ] = "alone",
    retry_failed: Annotated[bool, RETRY_FAILED] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells and roughly how long they take.")
    ] = False,
) -> None:
    """Train and evaluate every combination of the axes, and print a table.

    For example: python -m bench run --algos maml,fomaml --shots 1,5
    """
    given = {name: value for name, value in locals().items() if value not in (None, False)}
    known = (*Sweep.model_fields, *OPTIONS)
    from bench import distributed, runner
    from bench.executors import hire
    from bench.making import Sources
    from bench.progress import Display
    from bench.summary import (
        challenge_notes,
        gradient_notes,
        reuse_notes,
        seeds_table,
        summary_table,
    )

    sweep = read_sweep(config, {name: value for name, value in given.items() if name in known})
    crew = hire(
        executor,
        jobs=jobs,
        address=address,
        cpus=cell_cpus,
        gpus=cell_gpus,
        memory_gib=cell_memory,
        cell_timeout=cell_timeout,
    )
    load_plugin(trusted(sweep.plugin, plugin))
    cells = sweep.cells()
    sources = Sources(sweep.data_root, sweep.download)
    console = _terminal()
    team = distributed.join()
    if team.rank:
        try:
            return runner.follow(sources, team)
        finally:
            team.leave()
    folder = out or runner.default_folder(cells)
    with distributed.led(team):
        with console.status("reading the data and checking gradients"):
            left = runner.left(cells, folder)
            runner.check(left, sources, team.size, crew, costs)
        for note in sweep.notes():
            console.print(note)
        there = len(cells) - len(left)
        if sweep.verify_gradients and there:
            console.print(f"note:  {there} cells are there already, and are not verified")
        if dry_run:
            runner.check_folder(folder, sweep, cells, sources, accept_changed_code)
            with console.status("timing a few steps of each kind of cell"):
                seconds = runner.estimate_seconds(left, sources, costs)
            if there:
                console.print(f"{there} of {len(cells)} cells are there already")
            return _print_plan(left, seconds, console)
        try:
            display = Display(console)
            summary = runner.run(
                *(sweep, cells, sources, folder, display, accept_changed_code, team),
                crew=crew,
                costs=costs,
                threads=cell_cpus,
                retry_failed=retry_failed,
            )
        except KeyboardInterrupt:
            console.print(f"interrupted; the same command goes on from here (results in {folder})")
            raise
    mine = summary[summary["cell_id"].isin([cell.id for cell in cells])]
    swept = varied(cell.row() for cell in cells)
    console.print(summary_table(mine, swept, console.width))
    if (means := seeds_table(mine, swept)) is not None:
        console.print("", means)
    console.print(f"table: {folder / 'summary.csv'}")
    if (plot := folder / "figures" / "accuracy.png").exists():
        console.print(f"plot:  {plot}")
    for note in [*reuse_notes(mine), *challenge_notes(mine), *gradient_notes(mine)]:
        console.print(note)
    if (mine["status"] != "complete").any():
        console.print(f"why cells failed: {folder / 'failures.json'}")
        raise typer.Exit(1)


def _terminal() -> Console:
    """Standard output; what is not a terminal, such as a log, has lines of any length."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else 1000)


def _print_plan(cells: list[Cell], seconds: dict[str, float], console: Console) -> None:
    table = Table("cell", "iterations", "meta-batch", "inner steps", "episodes", "about")
    called = names(cells)
    for cell in cells:
        table.add_row(
            called[cell.id],
            str(cell.iterations),
            str(cell.meta_batch),
            str(cell.hyperparameters.get("inner_steps", "")),
            str(cell.episodes),
            "diverges" if math.isnan(seconds[cell.id]) else f"{seconds[cell.id]:.0f} s",
        )
    console.print(table)
    known = [value for value in seconds.values() if not math.isnan(value)]
    console.print(f"{counted(len(cells), 'cell')}, about {sum(known) / 60:.1f} minutes")


@app.command()
def search(
    space: Annotated[
        str,
        typer.Option(
            help="What is searched: inner_lr=0.01:1:log,inner_steps=1:5,norm=support|single.",
            show_default=False,
        ),
    ],
    algos: Annotated[str, _axis("Algorithms, each searched for itself, with as many trials.")],
    trials: Annotated[int, typer.Option(min=1, help="Trials of each algorithm.")] = 20,
    datasets: Annotated[str | None, _axis("The dataset. Default: glyphs.")] = None,
    ways: Annotated[str | None, WAYS] = None,
    shots: Annotated[str | None, SHOTS] = None,
    seeds: Annotated[str | None, _axis("The seed of training and search. Default: 0.")] = None,
    devices: Annotated[str | None, DEVICES] = None,
    set: Annotated[
        list[str] | None,
        typer.Option(
            help="One of 'list settings' that is held fixed; repeatable.", metavar="NAME=VALUE"
        ),
    ] = None,
    data_root: Annotated[Path | None, DATA_ROOT] = None,
    download: Annotated[bool, DOWNLOAD] = False,
    config: Annotated[Path | None, CONFIG] = None,
    plugin: Annotated[Path | None, PLUGIN] = None,
    out: Annotated[
        Path | None, _place("The search's folder. Default: results/ and a hash of what is asked.")
    ] = None,
) -> None:
    """Search for hyperparameters by validation episodes alone; the test split is not read.

    For example: python -m bench search --algos maml --space inner_lr=0.01:1:log --trials 20
    """
    given = {name: value for name, value in locals().items() if value not in (None, False)}
    from bench import search as searches
    from bench.making import Sources

    asked = {name: value for name, value in given.items() if name in Sweep.model_fields}
    sweep = read_sweep(config, asked)
    load_plugin(trusted(sweep.plugin, plugin))
    sources = Sources(sweep.data_root, sweep.download)
    found = searches.prepare(sweep, space, sources)
    folder = out or found.default_folder
    written = searches.run(found, trials, sources, folder, print)
    print(f"table: {folder / 'trials.csv'}")
    code = f" --plugin {sweep.plugin}" if sweep.plugin else ""
    for path, trial in written:
        print(f"best:  {trial}\n       python -m bench run --config {path}{code} tests it")
    if len(written) < len(found.cells):
        print("no trial of an algorithm was complete")
        raise typer.Exit(1)


@app.command(
    epilog="Exit status: 0 all cells are complete, 1 all are made but some failed, 2 bad input, "
    "3 a process is at work, 4 it was stopped with cells to come."
)
def status(
    run: Annotated[
        Path, typer.Argument(help="The run's folder.", metavar="RUN", show_default=False)
    ],
    plugin: Annotated[
        Path | None, _place("The run's plug-in; without it, its cells cannot all be told.")
    ] = None,
) -> None:
    """Say what of a run is done, failed, running and left, and when it will end.

    For example: python -m bench status results/demo

    It only reads, and may be asked while the run is at work. When the run ends is estimated from
    its finished cells; where no finished cell is like those to come, it says so instead.
    """
    from bench import status as statuses

    load_plugin(plugin)
    found = statuses.read(run)
    print("\n".join(found.lines()))
    raise typer.Exit(found.exit_status)


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of runs.", metavar="RUN...", show_default=False)
    ],
    accept_changed_code: Annotated[
        bool,
        typer.Option("--accept-changed-code", help="Compare cells that different source made."),
    ] = False,
) -> None:
    """Say which differences between algorithms are significant, and what each costs.

    Every pair that met the same test episodes; the table is comparison.csv in the first run.
    """
    from bench import comparison

    found = comparison.compare(runs, accept_changed_code)
    print("\n".join(found.lines()), flush=True)  # also where the folder cannot be written
    for path in found.write(runs[0]):
        print(f"written: {path}")


@app.command()
def check(
    run: Annotated[Path, typer.Argument(help="Folder of the run.", show_default=False)],
    baseline: Annotated[Path, typer.Option(help="Folder of the run it is held against.")],
    margin: Annotated[
        float,
        typer.Option(help="Loss to be ruled out: points of accuracy, per cent of an error."),
    ] = 1.0,
    slowdown: Annotated[
        float, typer.Option(help="Growth of time or memory that is tolerated, in per cent.")
    ] = 15.0,
    allow_missing: Annotated[
        bool,
        typer.Option(
            "--allow-missing",
            help="The run may lack cells of the baseline; else that is a regression, too.",
        ),
    ] = False,
    format: Annotated[
        Literal["text", "github"], typer.Option(help="github: Markdown for a job summary.")
    ] = "text",
) -> None:
    """Exit with status 1 if a run is worse than a baseline: in accuracy, time or memory.

    For example: python -m bench check results/head --baseline results/base

    Cells of the baseline that failed in the run, or are not there, are regressions too.
    """
    from bench import regression

    found = regression.check(run, baseline, margin, slowdown, allow_missing)
    if format == "github":
        print(found.markdown())
    else:
        _terminal().print(found.table())
        print("\n".join([*found.notes, found.rule, found.conclusion]))
    if found.regressed:
        raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The run's folder.", metavar="RUN")],
) -> None:
    """Write a run's report: a page (report.html), a pull request comment, a LaTeX table, figures.

    For example: python -m bench report results/demo
    """
    from bench import report as reports

    with Console(stderr=True).status("reading the run"):
        written = reports.write(folder)
    for path in written:
        print(path)


@app.command(
    epilog="Run the same command again and it goes on where it stopped; see 'list recipes'."
)
def reproduce(
    recipe: Annotated[str, typer.Argument(help="A recipe's name.", show_default=False)],
    scale: Annotated[
        float, typer.Option(help="Share of the published iterations; the verdict says it.")
    ] = 1.0,
    seeds: Annotated[str | None, _axis("Seeds of training. Default: the recipe's.")] = None,
    devices: Annotated[str | None, _axis("Default: the best there is.")] = None,
    data_root: Annotated[Path | None, DATA_ROOT] = None,
    download: Annotated[bool, DOWNLOAD] = False,
    out: Annotated[
        Path | None, _place("The run's folder. Default: results/ and the recipe's name.")
    ] = None,
    keep: Annotated[
        Path | None, _place("Folder to note the outcome in; this project's: results/reference.")
    ] = None,
    accept_changed_code: Annotated[bool, ACCEPT_CHANGED_CODE] = False,
    retry_failed: Annotated[bool, RETRY_FAILED] = False,
) -> None:
    """Obtain a published result: train as its paper did, and hold ours against theirs.

    For example: python -m bench reproduce maml-omniglot-5w1s --scale 0.03
    """
    from bench import reproduction, runner
    from bench.making import Sources
    from bench.progress import Display

    found = reproduction.read(recipe)
    if keep is not None and keep.exists() and not keep.is_dir():
        raise BenchError(f"--keep: {keep} is not a folder")
    places = {"data_root": data_root, "download": download}
    sweeps = found.sweeps(scale, seeds=seeds, devices=devices, **places)
    sources = Sources(data_root, download)
    console = _terminal()
    folder = out or Path("results") / found.name
    with console.status("reading the data and checking gradients"):
        cells = {name: sweep.cells() for name, sweep in sweeps.items()}
        for name in sweeps:
            runner.check(cells[name], sources)
    try:
        for name, sweep in sweeps.items():
            place, display = folder / name, Display(console)
            runner.run(
                *(sweep, cells[name], sources, place, display, accept_changed_code),
                retry_failed=retry_failed,
            )
    except KeyboardInterrupt:
        console.print(f"interrupted; the same command goes on from here (results in {folder})")
        raise
    outcome = reproduction.outcome(found, scale, cells, folder)
    if outcome is None:
        console.print(
            f"cells failed, so there is no verdict; why: failures.json in {folder}; "
            "--retry-failed does them again"
        )
        raise typer.Exit(1)
    written = outcome.write(keep)
    for line in [*outcome.lines(), *(f"written:    {path}" for path in written)]:
        print(line)


@app.command(epilog="Exit status: 1 where something that the main job needs is wrong, else 0.")
def doctor(
    data_root: Annotated[Path | None, DATA_ROOT] = None,
) -> None:
    """Say what this machine has, which data sets are there, and whether the engines agree on it.

    Each line is ok, a warning or a fault, with what to do.
    """
    from bench.doctor import examine

    levels = []
    for finding in examine(data_root):
        print(finding.line, flush=True)
        levels.append(finding.level)
    faults, warnings = (levels.count(level) for level in ("fault", "warning"))
    print(f"faults: {faults}, warnings: {warnings}")
    if faults:
        raise typer.Exit(1)


list_app = typer.Typer(
    help="What there is: algorithms, datasets, settings, recipes.", no_args_is_help=True
)
app.add_typer(list_app, name="list")


@list_app.command("algorithms")
def list_algorithms(plugin: Annotated[Path | None, PLUGIN] = None) -> None:
    """The algorithms, and what each does."""
    load_plugin(plugin)
    table = Table("algorithm", "what it does")
    for name in algorithms.names():
        table.add_row(name, algorithms.get(name).summary)
    _terminal().print(table)


@list_app.command("datasets")
def list_datasets(plugin: Annotated[Path | None, PLUGIN] = None) -> None:
    """The datasets, and their splits."""
    load_plugin(plugin)
    table = Table("dataset", "what it is", "splits")
    for name in datasets.names():
        kind = datasets.get(name)
        table.add_row(name, kind.summary, ", ".join(kind.splits))
    _terminal().print(table)


@list_app.command("settings")
def list_settings(
    algos: Annotated[
        str | None, _axis("Algorithms; see 'list algorithms'. Default: maml,fomaml,anil,reptile.")
    ] = None,
    dataset: Annotated[
        str, typer.Option(help="The dataset; an algorithm has settings that suit each.")
    ] = "glyphs",
    plugin: Annotated[Path | None, PLUGIN] = None,
) -> None:
    """Every setting of algorithms, and what it is unless it is said otherwise.

    For example: python -m bench list settings --algos maml,protonet --dataset omniglot

    Any of them goes into --set and into a TOML file; those of most use have options of their own.
    """
    load_plugin(plugin)
    given = {"datasets": [dataset]} | ({"algos": algos} if algos is not None else {})
    rows = {cell.algorithm: cell.settings() for cell in read_sweep(None, given).cells()}
    name = Column("setting", no_wrap=True)  # it is there to be typed
    table = Table(name, *rows, box=None, padding=(0, 1, 0, 0))
    for setting in dict.fromkeys(setting for row in rows.values() for setting in row):
        values = (said(row[setting]) if setting in row else "" for row in rows.values())
        table.add_row(setting, *values)
    _terminal().print(table)


@list_app.command("recipes")
def list_recipes() -> None:
    """The published results that can be obtained again, and what they came to here."""
    from bench import reproduction

    name = Column("recipe", no_wrap=True)  # it is there to be typed
    figure = Column("published", no_wrap=True)
    table = Table(name, figure, "ours", "seed on CPU", "on GPU", box=None, padding=(0, 1, 0, 0))
    for row in reproduction.listing():
        table.add_row(*row.values())
    _terminal().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status.

    0 for success, 1 where a cell failed or the run had to end (a full disk, changed source), 2 for
    bad input, 130 for Ctrl-C; what ends a run and bad input get one line on stderr.
    """
    status = 2
    if isinstance(sys.stdout, io.TextIOWrapper):  # which may be one for ASCII alone
        sys.stdout.reconfigure(errors="replace")
    try:
        ended = app(args=None if arguments is None else list(arguments), standalone_mode=False)
        return int(ended or 0)
    except (BenchError, AlgorithmError, DatasetError) as error:
        message = str(error)
    except RunError as error:
        status, message = 1, str(error)
    except typer.TyperException as error:
        message = error.format_message()
    except OSError as error:  # a folder that cannot be read, a name that is too long
        message = f"{error.filename or 'a file'}: {error.strerror or error}"
    except typer.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return 130
    from bench.distributed import leads

    if message and leads():  # a command without arguments has printed its help
        line = printable(message)
        shown = line if len(line) <= MOST_SHOWN else f"{line[:MOST_SHOWN]}..."
        print(f"bench: {shown}", file=sys.stderr)
    return status
