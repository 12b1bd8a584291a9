"""The report of an experiment: does selecting tokens pay, when, what is selected, what does it cost."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pvariance
from typing import Any

from pipeline.evaluation.evaluate import FIGURES, WITH_TOOL, on_problems
from pipeline.experiment.cost import TRAIN
from pipeline.report.arms import (
    ARMS,
    SHORT,
    Arm,
    arms_caption,
    arms_table,
    compute_caption,
    compute_curve,
    headline,
    left_out,
    read_arms,
    smooth,
)
from pipeline.report.chart import Series, chart, drawn, frame_of, short
from pipeline.report.moves import Moves, dynamics_sections, read_moves, selection_sections
from pipeline.report.page import Question, Section, Token, definitions, document, key, page, table
from pipeline.report.picture import coloured_text, standalone
from pipeline.report.text import judge_documents
from pipeline.report.tuned import Results, mean_curves, read_results, tuned_headline, tuned_sections
from pipeline.suite.show import grid
from schemas.config import Config
from schemas.errors import UserError
from schemas.receipt import Layout, read_dataset, read_receipts
from schemas.seal import digest
from schemas.store import write_atomic

Y = "held-out target loss (nats/token)"


def build_report(config: Config, results_folder: Path | None = None) -> Path:
    """Write `report.html`, `curve.svg` and `tokens.svg` into `train.output`; returns the page's path.

    `results_folder`: an experiment's, by default `experiments/<name>` beside the config's root. Raises UserError if there
    is neither a trained arm nor such an experiment.
    """
    arms = read_arms(config)
    results = read_results(results_folder or config.root.parent / "experiments" / config.name)
    if results_folder and results is None:
        raise UserError(f"{results_folder}: has no results", "`tokensift experiment` writes summary.json there")
    if not arms and results is None:
        raise UserError(
            f"train.output: {config.train.output} has no metrics of {', '.join(ARMS)}", "run `tokensift train` first"
        )
    windows = judge_documents(config) if "slm" in arms and arms["slm"].finished else []
    moves = [read_moves(path.parent) for path in sorted(config.train.output.glob("*/dynamics.json"))]
    questions = [
        Question("Does it pay?", [*(tuned_sections(results) if results else []), *arm_sections(config, arms)]),
        Question("When?", [*band_sections(results), *curve_sections(arms)]),
        Question("What does it cost?", cost_sections(arms)),
        Question("What is selected?", selected_sections(config, arms, moves, windows)),
        Question("Which tokens are learnt?", [section for found in moves for section in dynamics_sections(found)]),
        Question("What it was made from", [Section("This page", "", definitions(origin(config)))]),
    ]
    path = config.train.output / "report.html"
    first = tuned_headline(results) if results else untuned(headline(arms))
    write_atomic(path, page(f"Tokensift: {config.name}", first, questions).encode())
    if curve := token_drawing(arms, results):
        write_picture(config.train.output / "curve.svg", curve)
    if windows:
        write_picture(config.train.output / "tokens.svg", text_picture(windows))
    return path


def write_picture(path: Path, svg: str) -> None:
    """Save a figure of the page as an SVG file with its own background."""
    write_atomic(path, standalone(svg).encode())


def untuned(text: str) -> str:
    """A comparison of single runs, said to be no more."""
    return f"Not a tuned comparison, but one run an arm, all at the config's learning rate: {text}"


def arm_sections(config: Config, arms: dict[str, Arm]) -> list[Section]:
    """The runs of this config: losses, speed-ups, and what the models can do with problems."""
    if not arms:
        return []
    title = "This config's own runs, one an arm"
    sections = [Section(title, arms_caption(arms) + left_out(config.train.output), arms_table(arms))]
    path = config.train.output / FIGURES
    sections += [accuracy_section(path)] if path.exists() else []
    return sections + [suite_section(path) for path in sorted(config.train.output.glob("suite-*.json"))]


def suite_section(path: Path) -> Section:
    """A suite's table beside the paper's rows, as `tokensift eval --suite` left it."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    found = grid([row | {"model": _short_name(row["model"])} for row in rows])
    cells = [("", row) for row in found.paper] + [(row[0] if row[0] in ARMS else "", row) for row in found.ours]
    return Section(f"Few-shot tasks: {rows[0]['suite']}", " ".join(found.notes), table(found.head, cells))


def _short_name(model: str) -> str:
    """An arm's name for its final model; other models as they are called."""
    place = Path(model)
    return place.parent.name if place.name == "final" else model


def accuracy_section(path: Path) -> Section:
    """Held-out figures of every model, as `tokensift eval` left them."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    columns, found = on_problems(rows)
    cells = []
    for row, done in zip(rows, found, strict=True):
        name = _short_name(row["model"])
        loss = f"{row['target_loss']:.3f}" if "target_loss" in row else "-"
        cells.append((name if name in ARMS else "", (name, loss, *done)))
    caption = "Exact match: a greedy answer that ends in the right number."
    ranked = next((row for row in rows if "acc" in row), None)
    if ranked:
        caption += (
            f" Ranked: the right answer to each of {ranked['ranked']} problems is likelier than all its distractors, by summed"
            f" log-likelihood (acc) or its mean of a token (acc_norm), ± one standard error; guessing gives"
            f" {ranked['chance']:.0%}."
        )
    if any("tool_match" in row for row in rows):
        caption += " " + WITH_TOOL[0].upper() + WITH_TOOL[1:] + "."
    return Section("Problems", caption, table(("model", "target loss", *columns), cells))


def band_sections(results: Results | None) -> list[Section]:
    """Mean curves of an experiment's replicates."""
    lines = mean_curves(results) if results else []
    caption = "Mean over replicates, each arm at its own best rate; the band is one standard deviation."
    return [Section("Test loss by tokens seen", caption, chart(lines, "tokens seen", Y))] if lines else []


def curve_sections(arms: dict[str, Arm]) -> list[Section]:
    """The chart of the held-out target loss."""
    if not arms:
        return []
    if not any(arm.curve for arm in arms.values()):
        return [Section("Held-out target loss", "Nothing was measured: give eval.target in the config.", "")]
    caption = "On text that no arm was trained on; this config's own runs."
    caption += " The first, steepest part leaves the plot at the top." if frame_of(_series(arms)).cut else ""
    return [
        Section("Held-out target loss by tokens seen", caption, chart(_series(arms), "tokens seen", Y, _level(arms)))
    ]


def token_drawing(arms: dict[str, Arm], results: Results | None) -> str:
    """Held-out target loss against tokens seen, as one SVG: the tuned experiment's if there is one; empty without curves."""
    if results and (lines := mean_curves(results)):
        return drawn(lines, "tokens seen", "test loss (nats/token), mean and sd")
    return drawn(_series(arms), "tokens seen", Y, _level(arms)) if any(arm.curve for arm in arms.values()) else ""


def cost_sections(arms: dict[str, Arm]) -> list[Section]:
    """The same curves by compute, and the parts of the sum."""
    title = "The same by compute"
    if not any(arm.curve for arm in arms.values()):
        return []
    if any(arm.cost is None for arm in arms.values()):
        return [
            Section(title, "Not counted: base or reference, whose sizes it depends on, are not on this machine.", "")
        ]
    series = [Series(SHORT[name], name, compute_curve(arm)) for name, arm in arms.items()]
    html = chart(series, "compute (forward-token equivalents)", Y, _level(arms))
    return [Section(title, compute_caption(arms), html), *bill_sections(arms)]


def bill_sections(arms: dict[str, Arm]) -> list[Section]:
    """What a run costs by parts, alone and where several share the scores."""
    if "slm" not in arms or not (cost := arms["slm"].cost) or not arms["slm"].train:
        return []
    plain = TRAIN * arms["slm"].train[-1]["tokens_seen"]
    rows: list[tuple[str, Sequence[str]]] = [
        ("", ("CLM of that length", "-", "-", short(plain), short(plain), "1.00×"))
    ]
    for runs, name in ((1, "SLM, one run"), (3, "SLM, each of three runs"), (10, "SLM, each of ten runs")):
        total = cost.total(runs).forwards
        parts = (cost.reference.forwards / runs, cost.scoring.forwards / runs, cost.live.forwards, total)
        rows.append(("slm", (name, *map(short, parts), f"{total / plain:.2f}×")))
    head = ("run", "reference", "scoring", "training", "in all", "against CLM")
    caption = (
        "Forward-token equivalents of a run of the same length. The reference is trained and the corpus scored once."
    )
    return [Section("The bill", caption, table(head, rows))]


def selected_sections(
    config: Config, arms: dict[str, Arm], moves: list[Moves], windows: list[tuple[str, list[Token]]]
) -> list[Section]:
    """Losses of kept and dropped tokens, selections at different times, and coloured documents."""
    if not arms:
        return []
    lines = selection_chart(arms)
    caption = "Loss in training, nats/token, averaged over neighbouring steps: what the selection trains on and what it leaves."
    kept = [Section("Kept and dropped tokens", caption, lines)] if lines else []
    selecting = [found for found in moves if found.arm not in ("clm", "random")]
    times = [section for found in selecting for section in selection_sections(found)]
    return [*kept, *times, documents_section(windows, config.train.keep)]


def selection_chart(arms: dict[str, Arm]) -> str:
    """Loss of kept and dropped tokens over training; empty if no arm selects."""
    series = []
    for name in ("slm", "random"):
        for field in ("kept", "dropped"):
            points = smooth(arms[name].train if name in arms else [], f"loss_{field}")
            if points:
                series.append(Series(f"{SHORT[name]} {field}", name, points, dashed=field == "dropped"))
    return chart(series, "training tokens seen", "training loss (nats/token)") if series else ""


def documents_section(windows: list[tuple[str, list[Token]]], keep: float) -> Section:
    """Windows of the corpus, coloured."""
    title = "What SLM keeps"
    if not windows:
        return Section(title, "Needs the finished SLM model and its scores.", "")
    lowest = min((token.excess for _, tokens in windows for token in tokens if token.kept), default=math.nan)
    caption = (
        f"Windows from the middle of the first documents. Underlined: the top {keep:.0%} of these tokens by"
        " excess loss, the final SLM model's loss minus the stored reference loss; the lowest kept excess is"
        f" {lowest:+.2f} nats."
    )
    return Section(title, caption, key() + "".join(document(name, tokens) for name, tokens in windows))


def text_picture(windows: list[tuple[str, list[Token]]]) -> str:
    """The window in which stretches of kept and of dropped text differ most, as a figure."""
    name, tokens = max(windows, key=lambda item: contrast([token.kept for token in item[1]]))
    return coloured_text(name[:100], [(token.text, token.excess, token.kept) for token in tokens])


def contrast(kept: Sequence[bool], stretch: int = 16) -> float:
    """How much the share of kept tokens varies from one stretch of tokens to the next: its variance."""
    return pvariance([fmean(kept[start : start + stretch]) for start in range(0, len(kept), stretch)])


def origin(config: Config) -> list[tuple[str, str]]:
    """Names and settings that the page was made from."""
    places = [place for part in config.parts for place in part.scores]
    layouts = [Layout(place) for place in places]
    scores = ", ".join(digest(read_dataset(one)) if one.dataset.exists() else "no score dataset" for one in layouts)
    scored = sum(receipt.tokens for one in layouts for receipt in read_receipts(one).values())
    return [
        ("experiment", config.name),
        ("base", config.base),
        ("reference", config.score.model),
        ("scores", f"{', '.join(map(str, places))}, fingerprint {scores}, {scored:,} tokens"),
        ("selection", f"top {config.train.keep:.0%} by {config.train.scope}, seed {config.train.seed}"),
        ("learning rate", f"{config.train.learning_rate:g}, all arms of this config"),
    ]


def _series(arms: dict[str, Arm]) -> list[Series]:
    return [Series(SHORT[name], name, arm.curve) for name, arm in arms.items()]


def _level(arms: dict[str, Arm]) -> tuple[str, float] | None:
    return ("CLM's final loss", arms["clm"].final) if "clm" in arms and arms["clm"].curve else None
