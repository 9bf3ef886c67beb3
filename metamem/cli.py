"""The command line: `metamem train`, `adapt`, `ablate`, `report`, `check`, `schema`."""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from metamem.config import AdaptConfig, Config, RunConfig, UserError, load_config, ownership, resolve_objectives
from metamem.episodes.schema import is_episodes, load_episodes
from metamem.launch import first, refuse_many, wait_to_be_ended
from metamem.out_of_memory import told_in_a_line
from metamem.registry import check_options

app = typer.Typer(
    help="Declare what learns, from which loss, how fast; then meta-train it, adapt with it, measure it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # an error that is not the user's shows a plain traceback
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides: training.steps=20")]

FAILED, USER_ERROR = 1, 2  # exit codes
INTERRUPTED = 130
DRAWINGS = (".svg", ".png", ".pdf")


def user_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a `UserError` (and so a `ConfigError`), and memory that could not be had, into one line on stderr and exit
    code 2."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> Any:
        try:
            with told_in_a_line():
                return command(*arguments, **options)
        except UserError as error:
            wait_to_be_ended(error)
            typer.echo(str(error), err=True)
            raise typer.Exit(USER_ERROR) from None

    return run


def one_process(command: Callable[..., Any]) -> Callable[..., Any]:
    """`user_errors` for a command that several processes have no shares in."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> Any:
        refuse_many(command.__name__)
        return command(*arguments, **options)

    return user_errors(run)


@app.callback()
def main() -> None:
    """Make the user's own objectives and modules in the current folder importable."""
    # Last on the path: a `losses/` there must not shadow ours.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def register_shipped() -> None:
    """Fill the registries with what ships."""
    for module in ("metamem.network", "metamem.tasks", "metamem.training.tracking"):
        importlib.import_module(module)


def check_writable(path: Path) -> None:
    """Raise a `UserError` before the work where its result could not be written after it."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file in it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{path}: cannot be written: {folder} is no folder that can be written to")


def check_gpu() -> None:
    """Raise a `UserError` where torch finds no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU; leave it out to run on the CPU")


def check_drawable(path: Path) -> None:
    """Raise a `UserError` for a drawing that could not be written, or not as its suffix says."""
    check_writable(path)
    if path.suffix not in DRAWINGS:
        raise UserError(f"{path}: a diagram is {', '.join(DRAWINGS[:-1])} or {DRAWINGS[-1]}")
    path.parent.mkdir(parents=True, exist_ok=True)


def load_checked(path: Path, overrides: list[str] | None) -> Config:
    """A config whose options and objectives exist too: all that can be known before anything is built."""
    config = load_config(path, overrides or [])
    register_shipped()
    check_options(config)
    resolve_objectives(config)
    importlib.import_module("metamem.training.tracking").check_trackers(config)
    return config


@app.command()
@user_errors
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config; with --resume, a run's folder.")],
    overrides: Overrides = None,
    runs: Annotated[Path, typer.Option(help="Where the run's folder is made.")] = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run where its checkpoint left it.")] = False,
    step: Annotated[int | None, typer.Option(min=1, help="With --resume: the step of an earlier checkpoint.")] = None,
) -> None:
    """Meta-train a config's model, or go on with it. Ctrl-C, or SIGTERM, ends it after the step it falls in, with a
    checkpoint of that step."""
    if step is not None and not resume:
        raise UserError("--step chooses the checkpoint that --resume goes on from; give both")
    if resume:
        from metamem.training.run_folder import CONFIG, check_run_folder

        check_run_folder(config)
    run = _train_episodes if is_episodes(config / CONFIG if resume else config) else _train
    run(config, overrides or [], runs, {"step": step, "say": _say} if resume else None)


def _tell(text: str) -> None:
    """What one process says of a training that several may be in."""
    if first():
        typer.echo(text)


def _say(text: str) -> None:
    if first():
        typer.echo(text, err=True)


def _train(path: Path, overrides: list[str], runs: Path, resumed: dict[str, Any] | None) -> None:
    resolved = load_checked(path, overrides) if resumed is None else None
    register_shipped()
    from metamem.progress import training_bar
    from metamem.training import resume
    from metamem.training import train as run_training

    with training_bar() as show:
        if resolved is None:
            trained = resume(path, overrides, progress=show, **resumed or {})
        else:
            trained = run_training(resolved, runs, progress=show)
    if trained.interrupted:
        _say(
            f"interrupted: {trained.folder} holds the checkpoint of step {trained.step}; go on with: "
            f"metamem train --resume {trained.folder}"
        )
        raise typer.Exit(INTERRUPTED)
    _tell(
        f"{trained.folder}: {trained.step} steps in {trained.seconds:.0f} s; adapt it with: "
        f"metamem adapt {trained.folder} --input FILE"
    )


def _train_episodes(path: Path, overrides: list[str], runs: Path, resumed: dict[str, Any] | None) -> None:
    from metamem.episodes.training import resume_episodes, train_episodes
    from metamem.progress import episodes_bar

    with episodes_bar() as show:
        if resumed is None:
            trained = train_episodes(load_episodes(path, overrides), runs, progress=show)
        else:
            trained = resume_episodes(path, overrides, progress=show, **resumed)
    for count, found in trained.evaluation.items():
        figures = ", ".join(f"{name} {estimate}" for name, estimate in {"loss": found.loss, **found.figures}.items())
        diverged = f", {found.diverged} of {found.loss.tasks} tasks diverged" if found.diverged else ""
        _tell(f"after {count} updates: {figures}{diverged}")
    if trained.interrupted:
        _say(
            f"interrupted at step {trained.step}: {trained.folder} holds the best checkpoint, of step {trained.best}; "
            f"go on with: metamem train --resume {trained.folder}"
        )
        raise typer.Exit(INTERRUPTED)
    _tell(f"{trained.folder}: {trained.step} steps in {trained.seconds:.0f} s; the best is of step {trained.best}")


@app.command()
@one_process
def adapt(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A run's folder, or one of a transformers causal language model.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of its config: adaptation.guards.drift=0.5"),
    ] = None,
    text: Annotated[
        Path, typer.Option("--input", metavar="PATH", help="A UTF-8 file, a folder of them, or - for standard input.")
    ] = Path("-"),
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="How a transformers model adapts (configs/adapt/).")
    ] = None,
    frozen: Annotated[bool, typer.Option("--frozen", help="Nothing learns: no memory is written.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Run the frozen model beside, on every byte.")] = False,
    jsonl: Annotated[Path | None, typer.Option(metavar="FILE", help="Append a row of JSON for every piece.")] = None,
    load_state: Annotated[Path | None, typer.Option(metavar="FILE", help="Go on from a saved session.")] = None,
    save_state: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save the session at the end, or at Ctrl-C.")
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where the model runs.")] = "cpu",
) -> None:
    """Stream text through a model that goes on learning from it, as it arrives; prints bits per byte along the way."""
    from metamem.adaptation.live import watch
    from metamem.adaptation.opening import open_model
    from metamem.adaptation.session import Session
    from metamem.adaptation.stream import Source

    register_shipped()
    for path in filter(None, (save_state, jsonl)):
        check_writable(path)
    if device == "cuda":
        check_gpu()
    model, resolved, tokens = open_model(folder, config, overrides or [])
    model.to(device)
    session = Session(model, resolved, inner=not frozen, writing=not frozen)
    source = Source(text, session.loop.piece or 512)
    if load_state is not None:
        session.load(load_state)
    beside = Session(model, resolved, inner=False) if compare else None
    stopped = watch(session, source, tokens, "frozen" if frozen else "adapting", source.total, jsonl, beside)
    typer.echo(f"state: {session.state_bytes:,} bytes")
    if save_state is not None:
        session.save(save_state)
        typer.echo(f"the session is saved in {save_state}")
    if stopped:
        raise typer.Exit(INTERRUPTED)


@app.command()
@one_process
def ablate(
    ablation: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML ablation: a grid over a config.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of every cell, or of the ablation: seeds=[0]"),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Cells at once (default: as many as there are CPUs for).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in the last folder of this name.")] = False,
    runs: Annotated[Path, typer.Option(help="Where the ablation's folder is made.")] = Path("runs"),
    launcher: Annotated[str, typer.Option(metavar="local|ray", help="Where the cells run.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="The Ray cluster to join, host:port or auto (default: one of this machine).")
    ] = None,
) -> None:
    """Run every cell of an ablation in a process of its own; one row of results a cell, as soon as it is finished."""
    from metamem.analysis import launchers
    from metamem.analysis.ablation import ablation_folder, run_ablation
    from metamem.analysis.plan import plan_ablation
    from metamem.analysis.search import best
    from metamem.progress import ablation_bar

    where = launchers.launcher(launcher, address)
    plan = plan_ablation(ablation, overrides or [])
    folder = ablation_folder(plan.name, runs, resume)
    try:
        with ablation_bar() as show:
            rows = run_ablation(plan, folder, workers, show, where)
    except KeyboardInterrupt:
        typer.echo(f"interrupted: finished cells are kept in {folder}; go on with --resume", err=True)
        raise typer.Exit(INTERRUPTED) from None
    for row in rows:
        if row.status != "done":
            at = f" at step {row.step}" if row.step is not None else ""
            typer.echo(f"{row.status}{at}: {row.cell}, seed {row.seed}: {row.message}", err=True)
    if plan.search is not None and (found := best(plan.search, rows)):
        typer.echo(f"best {plan.search.settings.metric}: {found[1]:.4g}, {found[0]}")
    done = sum(row.status == "done" for row in rows)
    typer.echo(f"{folder}: {done} of {len(rows)} cells done; see them with: metamem report {folder}")
    if any(row.status == "failed" for row in rows):
        raise typer.Exit(FAILED)


@app.command()
@one_process
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of ablations or of trainings.")],
    to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where it is written (default: RUN/report).")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="A metric to show; several times for several.")] = None,
) -> None:
    """Write one HTML page on ablations and trainings, with a PNG and a CSV of each figure beside it."""
    from metamem.analysis.report import write_report

    typer.echo(f"{write_report(runs, to, metric or ())}")


@app.command()
@one_process
def check(
    config: ConfigFile,
    overrides: Overrides = None,
    diagram: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw when each level fires, as .svg, .png or .pdf.")
    ] = None,
    graph: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the network, as .svg, .png or .pdf.")] = None,
) -> None:
    """Print the network, the hierarchy and the schedule that a config resolves to. Writes nothing but drawings."""
    for drawing in filter(None, (diagram, graph)):
        check_drawable(drawing)
    if is_episodes(config):
        if diagram is not None or graph is not None:
            raise UserError(f"{config}: no drawing is made of a meta-training over tasks")
        return _check_episodes(config, overrides)
    resolved = load_checked(config, overrides)
    from metamem.config import tables
    from metamem.hierarchy import calendar_of, inner_loop
    from metamem.hierarchy.timing import timing, timing_text
    from metamem.routing import Router
    from metamem.training import build_task

    model = importlib.import_module("metamem.network").build(resolved)
    task = build_task(resolved)
    owned = ownership(dict(model.named_parameters()), resolved.hierarchy)
    calendar = calendar_of(resolved, task)
    inner_loop(resolved, model)
    console = _show_model(model, resolved, owned)
    if resolved.hierarchy.router is not None:
        routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
        console.print(tables.router_table(resolved.hierarchy.router, routers))
    console.print(tables.schedule_table(resolved, calendar))
    console.print(timing_text(timing(resolved, calendar)), highlight=False)
    console.print(task.describe(), highlight=False)
    if diagram is not None:
        from metamem.analysis.diagram import timing_diagram

        timing_diagram(resolved, calendar, owned, diagram)
        typer.echo(f"the diagram is in {diagram}")
    if graph is not None:
        from metamem.analysis.graph_drawing import draw_network

        draw_network(model, resolved.name, graph)
        typer.echo(f"the network is drawn in {graph}")


def _show_model(model: Any, config: RunConfig, owned: dict[str, list[str]]) -> Console:
    """Prints the modules and the hierarchy over their weights; gives where to print on."""
    from metamem.config import tables

    # Piped, the width is unknown, and 80 columns would break the names that one greps for.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(tables.network_tree(model, config.name))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    console.print(tables.hierarchy_table(config, owned, sizes))
    return console


def _check_episodes(path: Path, overrides: list[str] | None) -> None:
    from metamem.episodes.training import build_episodes, build_learner, outer_levels

    resolved = load_episodes(path, overrides or [])
    learner = build_learner(resolved)
    outer_levels(resolved, learner)
    owned = ownership(dict(learner.named_parameters()), resolved.hierarchy)
    console = _show_model(learner, resolved, owned)
    inner, training = resolved.inner, resolved.training
    console.print(f"{inner.steps} inner updates by the engine {inner.engine!r}; {training.steps:,} outer steps over")
    console.print(f"{training.batch} tasks each: {build_episodes(resolved).describe()}", highlight=False)


@app.command()
@one_process
def trace(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the PNGs go; the run's if not said.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the sequence; those of training if not said.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sequence that the task draws.")] = 0,
) -> None:
    """Draw what a trained model's slot memories do with one sequence of its task, a PNG of heat maps a memory."""
    register_shipped()
    import torch

    from metamem.analysis.slot_trace import trace_figure, traces
    from metamem.training import build_task, load_run

    folder = run if output is None else output
    check_writable(folder / "trace.png")
    model, config = load_run(run)
    generator = torch.Generator().manual_seed(seed)
    inputs, _ = build_task(config).sample(generator, 1, length or config.training.length)
    found = traces(model.eval(), inputs)
    folder.mkdir(parents=True, exist_ok=True)
    for memory, values in found.items():
        path = folder / f"trace-{memory}.png"
        trace_figure(values, path, f"{config.name}: {memory}, {inputs.shape[1]} tokens")
        typer.echo(str(path))


@app.command()
@one_process
def schema(
    of: Annotated[
        Literal["config", "episodes", "adapt"],
        typer.Option(help="Of a config, of a meta-training over tasks, or of how a transformers model adapts."),
    ] = "config",
) -> None:
    """Print a JSON Schema of the config, for editors, with the options of everything registered."""
    register_shipped()
    if of == "episodes":
        from metamem.episodes.json_schema import episodes_schema

        return typer.echo(json.dumps(episodes_schema(), indent=2))
    from metamem.config.json_schema import json_schema, schema_of

    if of == "adapt":
        return typer.echo(json.dumps(schema_of(AdaptConfig, "metamem adaptation", {}), indent=2))
    typer.echo(json.dumps(json_schema(), indent=2))


if __name__ == "__main__":
    app()
