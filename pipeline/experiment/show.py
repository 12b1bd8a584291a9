"""What a user sees of an experiment: what is done and to do, and in the end what was found."""

from pathlib import Path

from rich.table import Table

from pipeline.experiment.plan import Experiment, Run, left
from pipeline.experiment.run import Work
from pipeline.experiment.table import COLUMNS, cells, rows_of, write_results
from pipeline.progress import console, say


def print_plan(experiment: Experiment, base: Path) -> None:
    """Every run that can be named, done or not, and what the rest will take if it goes as what is done."""
    work = Work(experiment, base)
    table = Table("arm", "replicate", "length", "setting", "state")
    for run in [*work.losses, *work.wanted()]:
        table.add_row(run.arm, str(run.seed), f"{run.length:g}", spelled(run), state(work, run))
    console.print(table)
    rows, still = rows_of(work), left(experiment, work.losses)
    say(
        f"{len(work.losses)} runs done, {still} to do, growth of grids left out; arms not tuned yet are run at their best later"
    )
    if rows:
        seconds = sum(row.seconds for row in rows) / sum(row.length for row in rows)
        forwards = sum(row.forwards for row in rows) / sum(row.length for row in rows)
        say(
            f"a run of length 1 took {seconds:,.0f} s of steps and {forwards:,.0f} forward tokens: {still * seconds / 3600:.1f} hours, {still * forwards:.2e} forward tokens for the rest by one worker"
        )


def print_summary(experiment: Experiment, base: Path) -> None:
    """Write the results' files and print the summary."""
    work = Work(experiment, base)
    table = Table(
        "arm", "chosen on validation", "replicates", *COLUMNS, title="nats/token and ratios: mean (sd) over replicates"
    )
    for entry in write_results(work):
        table.add_row(*cells(entry))
    console.print(table)
    say(f"{experiment.root}: results.parquet, results.csv, summary.json, summary.md")


def state(work: Work, run: Run) -> str:
    """Of a run, in a word or a loss."""
    if run not in work.losses:
        return "begun" if (work.config(run).train.folder / "metrics.jsonl").exists() else "to do"
    return f"validation {work.losses[run]:.3f}"


def spelled(run: Run) -> str:
    """The values of a run's point."""
    return ", ".join(f"{field} {value}" for field, value in run.point)
