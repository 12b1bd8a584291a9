"""The command `tokensift`. Each verb reads one config; heavy imports wait until the config is known to be right."""

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.failure import explain
from pipeline.progress import say
from schemas.config import Config, load_config, parse_yaml
from schemas.errors import Stranded, UserError, first_line
from schemas.place import Place, to_place

# Forked tokenizer threads would only warn; stage 1 parallelises over workers.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Selective Language Modeling (Rho-1): score every token once with a reference model, then train only on"
    " the tokens worth learning.",
)
ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="YAML file of the experiment, or the name of a shipped one (demo).")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="Override a field, e.g. --set train.keep=0.7 (YAML value).")
]
ScaleOption = Annotated[float, typer.Option(min=0.01, max=1, help="Share of the demo's text; 0.05 is a smoke run.")]
DEMO, EXPERIMENTS = Path("demo"), Path("configs", "experiments")
ARMS = ("clm", "random", "slm")
LAUNCHED = ("train", "reference", "finetune")


def read_config(path: Path, settings: list[str] | None, **given: Any) -> Config:
    """Read the config with `field=value` overrides applied; `given` are fields of `train` that options name."""
    overrides: dict[str, Any] = {}
    for item in settings or []:
        field, mark, value = item.partition("=")
        if not mark or not field.strip("."):
            raise UserError(f"--set {item}: is not field=value", "write it as in --set train.keep=0.7")
        try:
            overrides[field] = parse_yaml(value)
        except ValueError as error:
            raise UserError(f"--set {item}: the value {error}", "quote it as YAML would be") from error
    overrides |= {f"train.{field}": value for field, value in given.items() if value is not None}
    return load_config(find_config(path), overrides)


def read_steps(text: str | None) -> list[int] | None:
    """Steps from:to. Raises UserError for what is none."""
    first, mark, end = (text or "").partition(":")
    if text and not (mark and first.isdecimal() and end.isdecimal()):
        raise UserError(f"--profile {text}: is not from:to", "write it as in --profile 10:13, which is steps 10 to 12")
    return [int(first), int(end)] if text else None


def read_place(text: str) -> Place:
    """The path or URL that a verb was given. Raises UserError for a URL of another kind."""
    try:
        return to_place(text)
    except ValueError as error:
        raise UserError(first_line(error), "give a path, or the URL of an object store") from error


def find_config(path: Path, folder: Path = Path("configs")) -> Path:
    """The file itself, or the shipped one of that name: a config, or what else lies in `folder`."""
    here = folder / f"{path.stem}.yaml"
    shipped = Path(__file__).resolve().parents[1] / here
    return shipped if path in (Path(path.stem), here) and not path.is_file() and shipped.exists() else path


def show_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        say(f"tokensift {version('tokensift')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Selective Language Modeling (Rho-1): score every token once, then train only on the tokens worth learning."""


@app.command()
def demo(config: ConfigOption = DEMO, set_: SetOption = None, scale: ScaleOption = 1.0) -> None:
    """The whole road on made data: base, reference, score, clm / random / slm, evaluation, report. Resumes."""
    started = time.monotonic()
    data(config, set_, scale)
    base(config, set_)
    reference(config, set_)
    score(config, set_)
    for objective in ARMS:
        train(config, set_, objective)
    eval_([], config, set_)
    report(config, set_)
    say(f"demo done in {(time.monotonic() - started) / 60:.1f} minutes")


@app.command()
def data(config: ConfigOption = DEMO, set_: SetOption = None, scale: ScaleOption = 1.0) -> None:
    """Build the demo's data from installed packages: noisy corpus, curated corpus, held-out text and problems."""
    loaded = read_config(config, set_)
    from pipeline.demo import chats
    from pipeline.demo.base import corpus_folder, data_folder
    from pipeline.demo.data import build

    if loaded.corpus.messages:  # what is fine-tuned on them is a finished model, of whatever experiment
        folder = corpus_folder(loaded)
        files = chats.build(folder, loaded.train.seed, scale)["files"]
    else:
        folder = data_folder(loaded)
        files = build(folder, loaded.train.seed, scale, loaded.demo)["files"]
    say(f"data: {len(files)} files, {sum(f['bytes'] for f in files.values()) / 1e6:.1f} MB in {folder}")


@app.command()
def base(config: ConfigOption = DEMO, set_: SetOption = None) -> None:
    """Train the demo's tiny base model from nothing (real runs name a base from the hub instead)."""
    loaded = read_config(config, set_)
    from pipeline.demo.base import make_base

    make_base(loaded)


@app.command()
def init(
    base: Annotated[str, typer.Option(help="Model to start from: a folder or a hub name.")],
    corpus: Annotated[list[str], typer.Option(help="Files to score and train on; globs and URLs allowed; repeatable.")],
    curated: Annotated[list[str] | None, typer.Option(help="Small curated files to train the reference on.")] = None,
    reference: Annotated[str | None, typer.Option(help="Or a finished reference model of the same tokenizer.")] = None,
    name: Annotated[str, typer.Option(help="The experiment's name; outputs go to runs/<name>.")] = "mine",
    text: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
) -> None:
    """Write the smallest config for your own corpus and model, after a look at both; prints what to type next."""
    from pipeline.init import write_config

    write_config(Path(f"{name}.yaml"), name, base, corpus, curated or [], reference, text)


@app.command()
def reference(config: ConfigOption = DEMO, set_: SetOption = None) -> None:
    """Train the reference model: the base, further, on the small curated corpus."""
    loaded = read_config(config, set_)
    from pipeline.train import train_reference

    train_reference(loaded)


@app.command()
def score(
    config: ConfigOption = DEMO,
    set_: SetOption = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Score at most so many units now; the next call goes on from there.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, and say what it comes to: tokens, disk, hours. Writes nothing.")
    ] = False,
    rate: Annotated[
        bool, typer.Option(help="With --dry-run: time the engine on a sample, some 10 s and the model's load.")
    ] = True,
) -> None:
    """Stage 1: write every corpus token's reference loss to Parquet, on Ray. Does only what is missing."""
    loaded = read_config(config, set_)
    from pipeline.score import dry_run as say_what_it_takes
    from pipeline.score import score_with_progress

    if dry_run:
        return say_what_it_takes(loaded, rate)
    raise_exit(score_with_progress(loaded, limit))


@app.command()
def status(
    path: Annotated[str | None, typer.Argument(help="A score dataset; default: the config's score.output.")] = None,
    config: ConfigOption = DEMO,
    set_: SetOption = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """How far scoring is: units, rate, time left, quarantine, disk. From the files alone, while a job runs or after."""
    where = read_place(path) if path else read_config(config, set_).score.output
    from pipeline.status import print_status
    from pipeline.status import status as look
    from schemas.receipt import Layout

    found = look(Layout(where))
    if json_:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        print_status(found)


@app.command()
def train(
    config: ConfigOption = DEMO,
    set_: SetOption = None,
    objective: Annotated[
        str | None, typer.Option(help="clm, slm, random, self-ref-loss, -entropy or -both; default: the config's.")
    ] = None,
    run: Annotated[str | None, typer.Option(help="Name of the run's folder; default: the objective.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, and say what it comes to: steps, memory, disk. Writes nothing.")
    ] = False,
    profile: Annotated[
        str | None, typer.Option(help="Trace steps from:to (exclusive), e.g. 10:13; a Chrome trace a rank.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="With --dry-run: GPUs (or processes) that would train.")] = 1,
    json_: Annotated[bool, typer.Option("--json", help="With --dry-run: print one JSON object.")] = False,
) -> None:
    """Stage 2: train on stored scores. Resumes from the last checkpoint; under torchrun, on every GPU."""
    loaded = read_config(config, set_, objective=objective, run=run, profile=read_steps(profile))
    if dry_run:
        from pipeline.forecast import forecast, print_forecast

        plan = forecast(loaded, ranks)
        if json_:
            sys.stdout.write(json.dumps(plan) + "\n")
        else:
            print_forecast(plan)
        return
    from pipeline.train import train_live

    train_live(loaded)


@app.command()
def finetune(
    config: ConfigOption = DEMO,
    set_: SetOption = None,
    objective: Annotated[str | None, typer.Option(help="clm, random; slm and others train on scores.")] = None,
    run: Annotated[str | None, typer.Option(help="Name of the run's folder; default: the objective.")] = None,
) -> None:
    """Train a finished model on conversations (corpus.messages), on what the assistant says alone. Resumes."""
    loaded = read_config(config, set_, objective=objective, run=run)
    from pipeline.finetune import finetune as tune

    tune(loaded)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def launch(
    context: typer.Context,
    verb: Annotated[str, typer.Argument(help="train, reference or finetune; what follows it is that verb's own.")],
    address: Annotated[
        str, typer.Option(help="The Ray cluster: host:port, or auto for the one of this node.")
    ] = "auto",
    nodes: Annotated[int | None, typer.Option(min=1, help="Default: all that have GPUs.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Of each node. Default: its GPUs.")] = None,
) -> None:
    """Train over the nodes of a Ray cluster, e.g. the one that scored: torchrun on each. Ctrl-C saves on all of them."""
    if verb not in LAUNCHED:
        raise UserError(f"launch {verb}: is none of {', '.join(LAUNCHED)}", "e.g. tokensift launch train -c mine.yaml")
    from pipeline.launch import launch as run_on_nodes

    raise_exit(run_on_nodes([verb, *context.args], address, nodes, ranks))


@app.command()
def experiment(
    file: Annotated[Path, typer.Argument(help="YAML file of the experiment, or the name of a shipped one (demo).")],
    workers: Annotated[int, typer.Option(min=1, help="Runs made side by side on this machine.")] = 1,
    arms: Annotated[str | None, typer.Option(help="Only these arms, by comma.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is done and what is to do. Runs nothing.")
    ] = False,
) -> None:
    """Arms, each at its own best setting by validation loss, over replicates: tables of losses and cost. Resumes."""
    from pipeline.experiment.plan import load_experiment, only

    loaded = load_experiment(find_config(file, EXPERIMENTS))
    base = find_config(Path(loaded.config))
    chosen = only(loaded, [name.strip() for name in arms.split(",")]) if arms else loaded
    from pipeline.experiment.show import print_plan, print_summary

    if dry_run:
        return print_plan(chosen, base)
    from pipeline.experiment.run import conduct

    conduct(chosen, base, workers)
    print_summary(loaded, base)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A training run's checkpoint, .../checkpoints/step-<number>.")],
    folder: Annotated[Path, typer.Argument(help="The model folder to make.")],
) -> None:
    """Make a Hugging Face folder of a checkpoint, block by block: memory does not grow with the model."""
    from trainer.export import export_to

    export_to(checkpoint, folder)
    say(f"{folder}: a Hugging Face model, float32")


@app.command("eval")
def eval_(
    models: Annotated[list[str] | None, typer.Argument(help="Model folders; default: all the experiment made.")] = None,
    config: ConfigOption = DEMO,
    set_: SetOption = None,
    tool: Annotated[
        bool, typer.Option("--tool", help="Answer problems with a Python tool too; its programs run in a sandbox.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="With --tool: times that the model may write.")] = 4,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object a model.")] = False,
    suite: Annotated[
        str | None, typer.Option(help="Few-shot tasks by lm-eval instead: math9, general15 (the paper's), demo.")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="What writes answers: hf, or vllm in an environment that has it.")
    ] = "hf",
    limit: Annotated[int | None, typer.Option(min=1, help="With --suite: only so many rows of each task.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="With --suite: folder of data sets, <organisation>/<name>, for the hub's.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="With --suite: file for the table, .json or .md.")] = None,
    follow: Annotated[
        Path | None, typer.Option(help="With --suite: a run's folder, whose checkpoints are evaluated as they appear.")
    ] = None,
) -> None:
    """Held-out target-domain loss, exact match and ranked answers on held-out problems, or few-shot tasks, for any checkpoint."""
    loaded = read_config(config, set_)
    if suite is not None:
        if tool:
            raise UserError("--tool: a suite's tasks are asked without a tool", "leave out --tool or --suite")
        from pipeline.suite.run import run_suite

        return run_suite(loaded, models or [], suite, backend, limit, data, json_, output, follow)
    if limit or data or output or follow:
        raise UserError("--limit, --data, --output, --follow: they are options of --suite", "add e.g. --suite demo")
    from pipeline.evaluation.evaluate import Asking, evaluate_models, print_figures

    rows = evaluate_models(loaded, models or [], show=not json_, asking=Asking(backend, tool, rounds))
    if json_:
        sys.stdout.write("".join(json.dumps(row) + "\n" for row in rows))
    else:
        print_figures(rows)


@app.command()
def dynamics(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Models or checkpoints, in order; default: the base and what the run kept (train.keep_every)."
        ),
    ] = None,
    config: ConfigOption = DEMO,
    set_: SetOption = None,
    objective: Annotated[str | None, typer.Option(help="The run's objective; default: the config's.")] = None,
    run: Annotated[str | None, typer.Option(help="The run's name; default: the objective.")] = None,
    target: Annotated[bool, typer.Option("--target", help="Follow the texts of eval.target, not the corpus.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the corpus to follow.")] = 320_000,
    output: Annotated[Path | None, typer.Option(help="Folder of the results; default: the run's.")] = None,
) -> None:
    """How single tokens' losses move over a run: H→L, L→H, H→H, L→L as in the paper, and what is selected when."""
    loaded = read_config(config, set_, objective=objective, run=run)
    from pipeline.dynamics import dynamics as follow

    follow(loaded, models or [], target, tokens, output)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A score dataset or one score shard: a path or a URL.")],
    documents: Annotated[int, typer.Option(min=0, help="Documents to show, coloured by reference loss.")] = 3,
    tokenizer: Annotated[
        str | None, typer.Option(help="Model folder or name whose tokenizer spells the tokens.")
    ] = None,
) -> None:
    """What a score dataset or shard holds: fingerprints, counts, loss histogram, coloured documents."""
    from pipeline.inspect import inspect as show

    speller = None
    if tokenizer is not None:
        from schemas.models import local_model, open_tokenizer

        speller = open_tokenizer(local_model(tokenizer, "--tokenizer"), "--tokenizer")
    show(read_place(path), speller, documents)


@app.command()
def verify(
    path: Annotated[str, typer.Argument(help="A score dataset or one score shard: a path or a URL.")],
) -> None:
    """Hash everything again and say what is broken and how to mend it."""
    from pipeline.verify import verify as check

    problems = check(read_place(path))
    for problem in problems:
        say(problem, style="red")
    if not problems:
        say(f"{path}: everything matches its receipt")
    raise_exit(len(problems))


@app.command()
def report(
    config: ConfigOption = DEMO,
    set_: SetOption = None,
    results: Annotated[
        Path | None, typer.Option(help="An experiment's folder; default: experiments/<name> beside the config's root.")
    ] = None,
) -> None:
    """One self-contained HTML page: does selection pay, when, what is selected, what does it cost."""
    loaded = read_config(config, set_)
    from pipeline.report.build import build_report

    say(f"report: {build_report(loaded, results)}")


def raise_exit(problems: int) -> None:
    """Leave with status 1 if there are problems."""
    if problems:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: whatever goes wrong is one message on standard error; a user's mistake exits with status 2."""
    try:
        app()
    except (Exception, KeyboardInterrupt) as error:
        status = explain(error)
        if isinstance(error, Stranded):
            sys.stdout.flush()
            os._exit(status)
        sys.exit(status)


if __name__ == "__main__":
    main()
