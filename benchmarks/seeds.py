"""The demo over several seeds, clm / random / slm side by side, with the spread: is the effect there every time?

    python -m benchmarks.seeds --seeds 3

A seed decides everything that chance decides: which templates and problems are held out, the corpus, the base
model's first weights, every run's order and the control's draws. Each seed has a folder and resumes like the demo.
"""

import statistics
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pipeline import cli
from pipeline.report.arms import ratio, speed_up
from pipeline.report.build import SHORT, Arm, compute_curve, read_arms, read_cost

RUNS = "runs/seeds"


def main(
    seeds: Annotated[int, typer.Option(help="How many.")] = 3,
    config: Annotated[Path, typer.Option(help="The demo's config or one like it.")] = Path("configs/demo.yaml"),
) -> None:
    """Run what has not been run, then print one row a seed and the means."""
    found = []
    for seed in range(seeds):
        settings = [f"root={RUNS}/{seed}", f"train.seed={seed}", f"reference.train.seed={seed}"]
        cli.demo(config, settings)
        loaded = cli.read_config(config, settings)
        found.append((read_arms(loaded.train.output), read_cost(loaded)))
    head = [f"{SHORT[name]} final" for name in SHORT]
    table = Table("seed", *head, "SLM: fewer tokens", "random: fewer tokens", "SLM: less compute", title="nats/token")
    for seed, (arms, cost) in enumerate(found):
        compute = {name: Arm(compute_curve(name, arm, cost), [], True) for name, arm in arms.items()}
        ratios = [ratio(arms, "slm"), ratio(arms, "random"), ratio(compute, "slm")]
        finals = [f"{arms[name].final:.3f}" for name in SHORT]
        table.add_row(str(seed), *finals, *(f"{value:.2f}x" if value else "never" for value in ratios))
    finals = [[arms[name].final for arms, _ in found] for name in SHORT]
    gains = [ratio(arms, "slm") or float("nan") for arms, _ in found]
    table.add_row("mean (sd)", *map(spread, finals), spread(gains), "", "")
    Console(width=120).print(table)
    tokens = [speed_up(arms["slm"].curve, arms["clm"].final) for arms, _ in found]
    Console().print(
        f"tokens at which SLM passed CLM's final loss: {[round(count) if count else None for count in tokens]}"
    )


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.fmean(values):.3f} ({deviation:.3f})"


if __name__ == "__main__":
    typer.run(main)
