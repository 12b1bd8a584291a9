"""The command `tokensift`. Each verb reads one config; heavy imports wait until the config is known to be right."""

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from schemas.config import Config, load_config
from schemas.errors import UserError

# Forked tokenizer threads would only warn; stage 1 parallelises over workers.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Selective Language Modeling (Rho-1): score every token once with a reference model, then train only on"
    " the tokens worth learning.",
)
ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="YAML file that describes the experiment.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="Override a field, e.g. --set train.keep=0.7 (YAML value).")
]
ScaleOption = Annotated[float, typer.Option(min=0.01, help="Share of the demo's text; 0.05 is a smoke run.")]
DEMO = Path("configs/demo.yaml")
ARMS = ("clm", "random", "slm")


def read_config(path: Path, settings: list[str] | None) -> Config:
    """Read the config with `field=value` overrides applied."""
    import yaml

    overrides = {}
    for item in settings or []:
        field, mark, value = item.partition("=")
        if not mark:
            raise UserError(f"--set {item}: must be field=value, as in --set train.keep=0.7")
        overrides[field] = yaml.safe_load(value)
    return load_config(path, overrides)


@app.command()
def demo(config: ConfigOption = DEMO, set_: SetOption = None, scale: ScaleOption = 1.0) -> None:
    """The whole road on made data: base, reference, score, clm / random / slm, evaluation, report. Resumes."""
    from pipeline.progress import console

    started = time.monotonic()
    data(config, set_, scale)
    base(config, set_)
    reference(config, set_)
    score(config, set_)
    for objective in ARMS:
        train(config, set_, objective)
    eval_([], config, set_)
    report(config, set_)
    console.print(f"demo done in {(time.monotonic() - started) / 60:.1f} minutes")


@app.command()
def data(config: ConfigOption = DEMO, set_: SetOption = None, scale: ScaleOption = 1.0) -> None:
    """Build the demo's data from installed packages: noisy corpus, curated corpus, held-out text and problems."""
    from pipeline.demo.data import build
    from pipeline.progress import console

    loaded = read_config(config, set_)
    folder = data_folder(loaded)
    files = build(folder, loaded.train.seed, scale)["files"]
    console.print(f"data: {len(files)} files, {sum(f['bytes'] for f in files.values()) / 1e6:.1f} MB in {folder}")


@app.command()
def base(config: ConfigOption = DEMO, set_: SetOption = None) -> None:
    """Train the demo's tiny base model from nothing (real runs name a base from the hub instead)."""
    from pipeline.demo.base import make_base

    loaded = read_config(config, set_)
    make_base(loaded, data_folder(loaded))


@app.command()
def reference(config: ConfigOption = DEMO, set_: SetOption = None) -> None:
    """Train the reference model: the base, further, on the small curated corpus."""
    loaded = read_config(config, set_)
    from pipeline.train import train_reference

    train_reference(loaded)


@app.command()
def score(config: ConfigOption = DEMO, set_: SetOption = None) -> None:
    """Stage 1: write every corpus token's reference loss to Parquet, on Ray. Does only what is missing."""
    loaded = read_config(config, set_)
    from pipeline.score import score_with_progress

    raise_exit(score_with_progress(loaded))


@app.command()
def train(
    config: ConfigOption = DEMO,
    set_: SetOption = None,
    objective: Annotated[str | None, typer.Option(help="clm, slm or random; default: the config's.")] = None,
) -> None:
    """Stage 2: train on stored scores. Resumes from the last checkpoint; under torchrun, on every GPU."""
    if objective not in (None, *ARMS):
        raise UserError(f"--objective {objective}: must be one of {', '.join(ARMS)}")
    loaded = read_config(config, set_)
    from pipeline.train import train_live

    train_live(loaded, objective)  # type: ignore[arg-type]


@app.command("eval")
def eval_(
    models: Annotated[list[str] | None, typer.Argument(help="Model folders; default: all the experiment made.")] = None,
    config: ConfigOption = DEMO,
    set_: SetOption = None,
) -> None:
    """Held-out target-domain loss and exact match on held-out problems, for any checkpoint."""
    loaded = read_config(config, set_)
    from pipeline.evaluate import evaluate_models

    evaluate_models(loaded, models or [])


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A score dataset or one score shard.")],
    documents: Annotated[int, typer.Option(help="Documents to show, coloured by reference loss.")] = 3,
    tokenizer: Annotated[
        str | None, typer.Option(help="Model folder or name whose tokenizer spells the tokens.")
    ] = None,
) -> None:
    """What a score dataset or shard holds: fingerprints, counts, loss histogram, coloured documents."""
    from pipeline.inspect import inspect as show

    speller = None
    if tokenizer:
        from schemas.models import local_model, open_tokenizer

        speller = open_tokenizer(local_model(tokenizer), "--tokenizer")
    show(path, speller, documents)


@app.command()
def verify(path: Annotated[Path, typer.Argument(help="A score dataset or one score shard.")]) -> None:
    """Hash everything again and say what is broken and how to mend it."""
    from pipeline.progress import console
    from pipeline.verify import verify as check

    problems = check(path)
    for problem in problems:
        console.print(problem, style="red", highlight=False, soft_wrap=True)
    if not problems:
        console.print(f"{path}: everything matches its receipt")
    raise_exit(len(problems))


@app.command()
def report(config: ConfigOption = DEMO, set_: SetOption = None) -> None:
    """One self-contained HTML page: curves, speed-up, kept and dropped losses, coloured documents."""
    loaded = read_config(config, set_)
    from pipeline.progress import console
    from pipeline.report.build import build_report

    console.print(f"report: {build_report(loaded)}", soft_wrap=True)


def data_folder(config: Config) -> Path:
    """Where the demo's data lie: two levels above the corpus files of its config."""
    return Path(config.corpus.paths[0]).parent.parent


def raise_exit(problems: int) -> None:
    """Leave with status 1 if there are problems."""
    if problems:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: a user's mistake is one message on standard error and exit status 2."""
    try:
        app()
    except UserError as error:
        from rich.console import Console

        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True, markup=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
