"""Results of an experiment (`tokensift experiment`): arms at their own best rates, over replicates, judged on test text."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.report.chart import Point, Range, Series, chart, ranges
from pipeline.report.page import Section, table
from schemas.errors import UserError, first_line
from trainer.metrics import read_metrics

COLUMNS = {
    "test loss": ("test", ".3f"),
    "minus baseline": ("difference", "+.3f"),
    "fewer tokens": ("fewer_tokens", ".2f"),
    "fewer tokens, decayed": ("fewer_tokens_decayed", ".2f"),
    "less compute, 1 run": ("less_compute_of_1_runs", ".2f"),
    "less compute, 3 runs": ("less_compute_of_3_runs", ".2f"),
}
GRID = 40  # points of a mean curve


@dataclass(frozen=True)
class Results:
    """What an experiment's folder says. `runs`: the rows of arms at their best rate and full length; `settings`: the file's."""

    name: str
    baseline: str
    replicates: int
    arms: list[dict[str, Any]]
    runs: list[dict[str, Any]]
    settings: dict[str, dict[str, Any]]

    @property
    def best(self) -> dict[str, Any] | None:
        """Of the arms that select by excess loss the one that is best on validation text, of those judged on most replicates.

        Arms that took another's rate, or go on from another, are left out.
        """
        slm = {row["arm"] for row in self.runs if row["objective"] == "slm"}
        slm = {name for name in slm if not any(self.settings[name].get(other) for other in ("like", "after"))}
        own = [arm for arm in self.arms if arm["arm"] in slm]
        most = max((arm["validation"]["n"] for arm in own), default=0)
        found = [arm for arm in own if arm["validation"]["n"] == most]
        return min(found, key=lambda arm: arm["validation"]["mean"], default=None)

    def arm(self, name: str) -> dict[str, Any]:
        """The summary of an arm."""
        return next(arm for arm in self.arms if arm["arm"] == name)

    def colour(self, name: str) -> str:
        """An arm's colour is its objective's."""
        objective = next((row["objective"] for row in self.runs if row["arm"] == name), "")
        return objective if objective in ("clm", "slm", "random") else "other"


def read_results(folder: Path) -> Results | None:
    """The results in an experiment's folder, None if there are none. Raises UserError if they cannot be read."""
    if not (folder / "summary.json").exists():
        return None
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        rows = pq.read_table(folder / "results.parquet").to_pylist()
        runs = [row for row in rows if row["chosen"] and row["length"] == 1]
        about = summary["experiment"]
        arms = [arm for arm in summary["arms"] if arm["test"]["mean"] is not None]
        results = Results(about["name"], about["baseline"], len(about["replicates"]), arms, runs, about["arms"])
        return results if any(arm["arm"] == results.baseline for arm in arms) else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: summary.json and results.parquet cannot be read ({first_line(error)})",
            "`tokensift experiment` writes them again",
        ) from error


def tuned_headline(results: Results) -> str:
    """The tuned comparison in a few sentences."""
    base, best = results.arm(results.baseline), results.best
    if best is None or best["difference"]["mean"] is None:
        return f"No arm of {results.name} that selects by excess loss has been judged beside {results.baseline} yet."
    gain = best["difference"]
    sentences = [
        f"Each arm at its own best learning rate, chosen on validation text: {best['arm']} ends"
        f" {_size(gain)} nats/token {'below' if gain['mean'] < 0 else 'above'} {results.baseline}"
        f" ({_told(best['test'])} against {_told(base['test'])} on test text, {_runs(gain['n'])})."
    ]
    decayed, curve = best.get("fewer_tokens_decayed"), best.get("fewer_tokens")
    factor = decayed if decayed and decayed["mean"] is not None else curve
    if factor and factor["mean"] is not None:
        how = "both decayed fully" if factor is decayed else "its rate not yet decayed there"
        sentences.append(f"It comes to {results.baseline}'s result with {_factor(factor['mean'], 'tokens')}, {how}.")
    one, three = best.get("less_compute_of_1_runs"), best.get("less_compute_of_3_runs")
    if one and three and one["mean"] is not None and three["mean"] is not None:
        sentences.append(
            f"Reference and scoring counted: {_factor(one['mean'], 'compute')} for one run,"
            f" {_factor(three['mean'], 'compute')} where three runs share them."
        )
    if best["at_edge"] or base["at_edge"]:
        edge = [arm["arm"] for arm in (base, best) if arm["at_edge"]]
        sentences.append(f"The best rate of {' and '.join(edge)} lies at the end of what was tried.")
    return " ".join(sentences)


def _size(value: Mapping[str, Any]) -> str:
    sd = f" (sd {value['sd']:.3f})" if value["sd"] is not None else ""
    return f"{abs(value['mean']):.3f}{sd}"


def _told(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:.3f}"


def _runs(count: int) -> str:
    return "one replicate" if count == 1 else f"{count} replicates, each with data, base and reference of its own"


def _factor(value: float, what: str) -> str:
    """A ratio above one as `1.4× fewer tokens`, one below as `1.4× more`, one that rounds to one as it is."""
    factor, less = max(value, 1 / value), "less" if what == "compute" else "fewer"
    if f"{factor:.1f}" == "1.0":
        return f"about as {'much' if what == 'compute' else 'many'} {what}"
    return f"{factor:.1f}× {less if value > 1 else 'more'} {what}"


def tuned_sections(results: Results) -> list[Section]:
    """The table of arms, how far each is from the baseline in each replicate, and the keep-ratio curve."""
    caption = (
        f"Experiment {results.name}: mean (standard deviation) over replicates. Rates were chosen on validation text, what"
        " stands here was measured on test text. Fewer tokens: of the baseline's end, the arm's curve not decayed there, or"
        " both decayed at their own lengths. Compute counts reference and scoring, for one run or shared by three."
    )
    sections = [Section("Arms at their own best rate", caption, tuned_table(results))]
    if rows := differences(results):
        sections.append(
            Section(f"Test loss minus {results.baseline}'s", "A small dot is a replicate, compared with the baseline of the"
                    " same data, base and order; the line is one standard deviation around the mean.",
                    ranges(rows, f"nats/token, minus {results.baseline}"))
        )  # fmt: skip
    return sections + keep_sections(results)


def tuned_table(results: Results) -> str:
    """One row an arm; columns that no arm has are left out."""
    columns = {
        title: (key, form)
        for title, (key, form) in COLUMNS.items()
        if any((arm.get(key) or {}).get("mean") is not None for arm in results.arms)
    }
    rows = []
    for arm in results.arms:
        point = ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in arm["point"].values())
        own = arm["arm"] == results.baseline
        cells = ["-" if own and key != "test" else _cell(arm.get(key), form) for key, form in columns.values()]
        told = (arm["arm"], point + (" (edge)" if arm["at_edge"] else ""), str(arm["test"]["n"]))
        rows.append((results.colour(arm["arm"]), (*told, *cells)))
    return table(("arm", "rate", "replicates", *columns), rows)


def _cell(value: Mapping[str, Any] | None, form: str) -> str:
    if not value or value["mean"] is None:
        return "-"
    sd = f" ({value['sd']:{form.removeprefix('+')}})" if value["sd"] is not None else ""
    of = value.get("of", value["n"])
    return f"{value['mean']:{form}}{sd}" + (f", {value['n']} of {of}" if value["n"] < of else "")


def differences(results: Results) -> list[Range]:
    """Each arm's test losses minus the baseline's of the same replicate, the best first."""
    base = {row["replicate"]: row["test_final"] for row in results.runs if row["arm"] == results.baseline}
    found = []
    for arm in results.arms:
        own = [row for row in results.runs if row["arm"] == arm["arm"] and row["replicate"] in base]
        if own and arm["arm"] != results.baseline:
            values = [row["test_final"] - base[row["replicate"]] for row in own]
            found.append(Range(arm["arm"], results.colour(arm["arm"]), values))
    return sorted(found, key=lambda row: fmean(row.values))


def keep_sections(results: Results) -> list[Section]:
    """Test loss against the share of tokens kept, where several were tried by arms that differ in nothing else."""
    by_keep: dict[float, list[float]] = {}
    for row in results.runs:
        arm = results.settings[row["arm"]]
        other = arm.get("scores") or arm.get("after") or arm.get("set", {}).keys() - {"train.objective", "train.keep"}
        if row["objective"] == "slm" and not other:
            by_keep.setdefault(row["keep"], []).append(row["test_final"])
    if len(by_keep) < 2:
        return []
    base = [row["test_final"] for row in results.runs if row["arm"] == results.baseline]
    keeps = sorted(by_keep)
    points = [(keep, fmean(by_keep[keep])) for keep in keeps]
    spread = [stdev(by_keep[keep]) if len(by_keep[keep]) > 1 else 0.0 for keep in keeps]
    band = tuple((keep, mean - sd, mean + sd) for (keep, mean), sd in zip(points, spread, strict=True))
    line = Series("SLM", "slm", points, band=band)
    best = min(points, key=lambda point: point[1])
    caption = (
        f"Mean and standard deviation over replicates, each at its own best rate. The best of these is {best[0]:g}."
    )
    html = chart([line], "share of tokens kept", "test loss (nats/token)", (results.baseline, fmean(base)))
    return [Section("How much to keep", caption, html)]


def mean_curves(results: Results) -> list[Series]:
    """Test loss against tokens seen: mean of the replicates, one standard deviation around it, for three arms."""
    best = results.best
    random = next((row["arm"] for row in results.runs if row["objective"] == "random"), None)
    names: list[str] = [name for name in (results.baseline, random, best["arm"] if best else None) if name]
    return [line for name in names if (line := mean_curve(results, name))]


def mean_curve(results: Results, arm: str) -> Series | None:
    """The mean curve of an arm; None where the runs' metrics are not there any more."""
    curves = [_curve(Path(row["folder"])) for row in results.runs if row["arm"] == arm]
    curves = [curve for curve in curves if len(curve) > 1]
    if not curves:
        return None
    grid = np.linspace(max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves), GRID)
    values = np.array([np.interp(grid, [x for x, _ in curve], [y for _, y in curve]) for curve in curves])
    mean, sd = values.mean(0), values.std(0, ddof=1) if len(curves) > 1 else np.zeros(GRID)
    band = tuple(zip(grid.tolist(), (mean - sd).tolist(), (mean + sd).tolist(), strict=True))
    return Series(arm, results.colour(arm), list(zip(grid.tolist(), mean.tolist(), strict=True)), band=band)


def _curve(folder: Path) -> list[Point]:
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "eval" and "target_loss" in row]
    return [(float(row["tokens_seen"]), float(row["target_loss"])) for row in rows]
