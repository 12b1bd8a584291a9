"""Results: a row a run, and what the runs say together about each arm, beside the baseline of the same replicate."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean, stdev
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.experiment.cost import TRAIN, cost_of, decayed_reach, first_reach, loss_at
from pipeline.experiment.plan import Experiment, Run, at_edge, choices_of
from pipeline.experiment.run import Work
from schemas.store import write_atomic
from trainer.metrics import curve, read_metrics

SHARED = (1, 3)  # runs that share reference and scores


@dataclass(frozen=True, slots=True)
class Row:
    """One finished run. Losses in nats/token; `forwards_*` in forward-token equivalents of the live model.

    Of an arm that comes `after` another, tokens and cost are those of both runs; steps are its own.
    """

    arm: str
    replicate: int
    length: float
    chosen: bool  # its point is the arm's best on validation: only such runs are judged
    point: str  # JSON
    objective: str
    keep: float
    scope: str
    steps: int
    tokens: int
    tokens_selected: int
    validation_final: float
    validation_best: float
    test_final: float
    test_best: float
    tokens_to_baseline: float | None  # where its test curve first comes down to the baseline's end
    seconds: float
    seconds_reference: float
    seconds_scoring: float
    forwards: float
    forwards_reference: float
    forwards_scoring: float
    flops: float
    folder: str

    def compute(self, runs: int) -> float:
        """Forward-token equivalents of one run of `runs` that share reference and scores."""
        return self.forwards + (self.forwards_reference + self.forwards_scoring) / runs


def rows_of(work: Work) -> list[Row]:
    """All finished runs, those that broke down left out."""
    choices = choices_of(work.experiment, work.losses)
    levels: dict[int, float] = {}
    best = choices.get(work.experiment.baseline)
    for run in work.losses:
        if run == Run(work.experiment.baseline, best or (), run.seed):
            rows = read_metrics(work.config(run).train.folder / "metrics.jsonl")
            levels[run.seed] = curve(rows, "target_loss")[-1][1]
    runs = [run for run, loss in work.losses.items() if math.isfinite(loss)]
    return [row_of(work, run, choices.get(run.arm) == run.point, levels.get(run.seed)) for run in runs]


def row_of(work: Work, run: Run, chosen: bool, level: float | None) -> Row:
    """One run; `level`: the test loss at which the baseline of its replicate ended."""
    config = work.config(run)
    folder, train = config.train.folder, config.train
    rows = read_metrics(folder / "metrics.jsonl")
    last = [row for row in rows if row["kind"] == "train"][-1]
    test, validation = curve(rows, "target_loss"), curve(rows, "validation_loss")
    cost, seen, selected = cost_of(config), 0, 0
    if (before := work.before(run)) is not None:  # the arm is both runs, one after the other
        first = row_of(work, before, chosen, None)
        cost, seen, selected = cost.following(cost_of(work.config(before))), first.tokens, first.tokens_selected
    return Row(
        arm=run.arm,
        replicate=run.seed,
        length=run.length,
        chosen=chosen,
        point=json.dumps(dict(run.point)),
        objective=train.objective,
        keep=1.0 if train.objective == "clm" else train.keep,
        scope=train.scope,
        steps=last["step"],
        tokens=seen + last["tokens_seen"],
        tokens_selected=selected + last["tokens_selected"],
        validation_final=validation[-1][1],
        validation_best=min(loss for _, loss in validation),
        test_final=test[-1][1],
        test_best=min(loss for _, loss in test),
        tokens_to_baseline=None if level is None else first_reach([(seen + at, loss) for at, loss in test], level),
        seconds=cost.live.seconds,
        seconds_reference=cost.reference.seconds,
        seconds_scoring=cost.scoring.seconds,
        forwards=cost.live.forwards,
        forwards_reference=cost.reference.forwards,
        forwards_scoring=cost.scoring.forwards,
        flops=cost.flops,
        folder=str(folder),
    )


def summary_of(work: Work, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One entry an arm that has been judged: means and deviations over replicates, differences to the baseline in pairs.

    `difference`: test loss minus the baseline's at equal tokens, nats. `difference_at_equal_compute_of_N_runs`: minus what
    the baseline has when it is trained, its rate decayed fully, for as much compute as the arm took, reference and scoring
    shared by N runs; interpolated between the baseline's lengths, None beyond them. `fewer_tokens`: tokens of the baseline
    over those at which the arm's curve, its rate still high, first reached the baseline's end. `fewer_tokens_decayed`: the
    same between the arm's finished runs of several lengths. `less_compute_of_N_runs`: as that, in compute.
    """
    experiment, choices = work.experiment, choices_of(work.experiment, work.losses)
    judged = [row for row in rows if row.chosen]
    base = {row.replicate: row for row in judged if row.arm == experiment.baseline and row.length == 1}
    found = []
    for name in experiment.arms:
        own = [row for row in judged if row.arm == name and row.length == 1]
        if own:
            edge = at_edge(experiment, name, choices[name], work.losses)
            pairs = [(row, base[row.replicate]) for row in own if row.replicate in base]
            entry = {
                "arm": name,
                "point": dict(choices[name]),
                "at_edge": edge,
                "test": spread([row.test_final for row in own]),
                "validation": spread([row.validation_final for row in own]),
                "tokens": spread([row.tokens for row in own]),
            }
            found.append(entry | against(experiment, pairs, judged) | {"lengths": at_lengths(experiment, name, judged)})
    return found


def at_lengths(experiment: Experiment, name: str, judged: Sequence[Row]) -> list[dict[str, Any]]:
    """The arm at each length at which it and the baseline were run, the shortest first: does the difference last?"""
    base = {(row.replicate, row.length): row for row in judged if row.arm == experiment.baseline}
    own = [row for row in judged if row.arm == name and (row.replicate, row.length) in base]
    found = []
    for length in sorted({row.length for row in own}):
        pairs = [(row, base[row.replicate, length]) for row in own if row.length == length]
        found.append(
            {
                "length": length,
                "tokens": spread([row.tokens for row, _ in pairs]),
                "test": spread([row.test_final for row, _ in pairs]),
                "difference": spread([row.test_final - other.test_final for row, other in pairs]),
            }
        )
    return found


def against(experiment: Experiment, pairs: Sequence[tuple[Row, Row]], judged: Sequence[Row]) -> dict[str, Any]:
    """An arm beside the baseline: `pairs` are their runs of the same replicate, `judged` all that there is to compare with."""
    found = {
        "difference": over([row.test_final - other.test_final for row, other in pairs]),
        "fewer_tokens": over([ratio(other.tokens, row.tokens_to_baseline) for row, other in pairs]),
    }
    several = bool(pairs) and pairs[0][0].arm in experiment.lengths
    if several:
        found["fewer_tokens_decayed"] = over(
            [fewer(row, other, judged, lambda one: one.tokens) for row, other in pairs]
        )
    for runs in SHARED:
        cost = partial(Row.compute, runs=runs)
        found[f"compute_of_{runs}_runs"] = over([cost(row) / TRAIN for row, _ in pairs])
        equal = [equal_compute(row, by_length(judged, other), cost) for row, other in pairs]
        found[f"difference_at_equal_compute_of_{runs}_runs"] = over(equal)
        if several:
            found[f"less_compute_of_{runs}_runs"] = over([fewer(row, other, judged, cost) for row, other in pairs])
    return found


def by_length(rows: Sequence[Row], like: Row) -> list[Row]:
    """The judged runs of an arm on one replicate, the shortest first."""
    own = [row for row in rows if (row.arm, row.replicate) == (like.arm, like.replicate)]
    return sorted(own, key=lambda row: row.tokens)


def fewer(row: Row, baseline: Row, judged: Sequence[Row], cost: Callable[[Row], float]) -> float | None:
    """What the baseline cost over what the arm costs, its rate decayed, at the length where it ends at the same loss.

    At least that, if the shortest run ends lower already; None if the arm was run at one length alone.
    """
    points = [(cost(one), one.test_final) for one in by_length(judged, row)]
    if len(points) < 2:
        return None
    return ratio(cost(baseline), decayed_reach(points, baseline.test_final))


def equal_compute(row: Row, baseline: Sequence[Row], cost: Callable[[Row], float]) -> float | None:
    """The run's test loss minus the baseline's at equal cost, nats; None where no run of the baseline is as long."""
    other = loss_at([(cost(one), one.test_final) for one in baseline], cost(row))
    return None if other is None else row.test_final - other


def ratio(one: float, other: float | None) -> float | None:
    """One over the other, None if there is no other."""
    return None if other is None else one / other


def over(values: Sequence[float | None]) -> dict[str, Any]:
    """`spread` of what there is; `of`: how many pairs there are, with a value or without."""
    return spread([value for value in values if value is not None]) | {"of": len(values)}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation and number of values; None where they are not defined."""
    mean = fmean(values) if values else None
    return {"mean": mean, "sd": stdev(values) if len(values) > 1 else None, "n": len(values)}


def write_results(work: Work) -> list[dict[str, Any]]:
    """Write results.parquet, results.csv, summary.json and summary.md into the experiment's root; returns the summary."""
    rows, root = rows_of(work), work.experiment.root
    if not rows:
        return []
    table = [asdict(row) for row in rows]
    sink, text = io.BytesIO(), io.StringIO()
    pq.write_table(pa.Table.from_pylist(table), sink)
    writer = csv.DictWriter(text, list(table[0]))
    writer.writeheader()
    writer.writerows(table)
    summary = summary_of(work, rows)
    write_atomic(root / "results.parquet", sink.getvalue())
    write_atomic(root / "results.csv", text.getvalue().encode())
    about = {"experiment": work.experiment.model_dump(mode="json"), "runs": len(rows), "arms": summary}
    write_atomic(root / "summary.json", (json.dumps(about, indent=2) + "\n").encode())
    write_atomic(root / "summary.md", markdown(work.experiment, summary).encode())
    return summary


COLUMNS = {
    "test loss": ("test", ".3f"),
    "minus baseline": ("difference", "+.3f"),
    "same, equal compute, 1 run": ("difference_at_equal_compute_of_1_runs", "+.3f"),
    "3 runs sharing scores": ("difference_at_equal_compute_of_3_runs", "+.3f"),
    "fewer tokens, curve": ("fewer_tokens", ".2f"),
    "fewer tokens, decayed": ("fewer_tokens_decayed", ".2f"),
    "less compute, 1 run": ("less_compute_of_1_runs", ".2f"),
    "3 runs sharing": ("less_compute_of_3_runs", ".2f"),
}


def cells(entry: dict[str, Any]) -> list[str]:
    """An arm's line in the table for readers."""
    point = ", ".join(f"{field.rpartition('.')[2]} {value:g}" if isinstance(value, float) else f"{field} {value}"
                      for field, value in entry["point"].items())  # fmt: skip
    return [
        entry["arm"],
        point + (" (edge)" if entry["at_edge"] else ""),
        str(entry["test"]["n"]),
        *(cell(entry.get(key), form) for key, form in COLUMNS.values()),
    ]


def cell(value: dict[str, Any] | None, form: str) -> str:
    """`mean (sd)`, and in how many of the pairs there was a value if not in all."""
    if value is None or not value.get("of", value["n"]):
        return ""
    of = value.get("of", value["n"])
    if value["mean"] is None:
        return f"none of {of}"
    text = f"{value['mean']:{form}}" + (f" ({value['sd']:.{form[-2]}f})" if value["sd"] is not None else "")
    return text if value["n"] == of else f"{text}, {value['n']} of {of}"


def markdown(experiment: Experiment, summary: Sequence[dict[str, Any]]) -> str:
    """The summary as tables of Markdown, mean and standard deviation over replicates: arms, then arms by length."""
    text = tabled(["arm", "chosen on validation", "replicates", *COLUMNS], map(cells, summary))
    by_length = [
        [entry["arm"], f"{one['length']:g}", str(one["test"]["n"]), f"{one['tokens']['mean']:,.0f}", cell(one["test"], ".3f"), cell(one["difference"], "+.3f")]
        for entry in summary
        if len(entry["lengths"]) > 1 and entry["arm"] != experiment.baseline
        for one in entry["lengths"]
    ]  # fmt: skip
    return text + (
        "\n" + tabled(["arm", "length", "replicates", "tokens", "test loss", "minus baseline"], by_length)
        if by_length
        else ""
    )


def tabled(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))
