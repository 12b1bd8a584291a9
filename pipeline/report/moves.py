"""What `tokensift dynamics` found, for the page: how tokens' losses moved, and what is selected at the start and at the end."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.report.chart import Series, chart
from pipeline.report.page import Section, table, text_block
from pipeline.trend import CATEGORIES
from schemas.errors import UserError, first_line

CLASSES: dict[str, str] = dict(zip(CATEGORIES, ("hh", "lh", "hl", "ll"), strict=True))
MEANING = "from high or low loss at the start to high or low loss at the end"
SHOWN_TOKENS, SHOWN_WINDOWS = 260, 2


@dataclass(frozen=True)
class Moves:
    """The figures of a run's tokens, and the tokens of some windows."""

    arm: str
    figures: dict[str, Any]
    windows: list[list[dict[str, Any]]]


def read_moves(folder: Path) -> Moves:
    """What lies in a run's folder. Raises UserError if it cannot be read."""
    try:
        figures = json.loads((folder / "dynamics.json").read_text(encoding="utf-8"))
        rows = pq.read_table(folder / "dynamics.parquet").slice(0, 20 * SHOWN_TOKENS).to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: dynamics.json and dynamics.parquet cannot be read ({first_line(error)})",
            "`tokensift dynamics` writes them again",
        ) from error
    windows: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        windows.setdefault((row["doc_id"], row["window"]), []).append(row)
    longest = sorted(windows.values(), key=lambda window: -min(len(window), SHOWN_TOKENS))[:SHOWN_WINDOWS]
    return Moves(folder.name, figures, [window[:SHOWN_TOKENS] for window in longest])


def selection_sections(moves: Moves) -> list[Section]:
    """What is selected at the start, in the middle and at the end of training."""
    last = len(moves.figures["checkpoints"]) - 1
    places = {"start": 0, "middle": last // 2, "end": last}
    agree, keep = moves.figures["agreement"], moves.figures["keep"]
    caption = (
        f"Run {moves.arm}, {moves.figures['tokens']:,} tokens of {moves.figures['sample']}. Of the {keep:.0%} of tokens with"
        f" the most excess loss at the start {agree[0][last // 2]:.0%} are among them in the middle too, and"
        f" {agree[0][last]:.0%} at the end; chance would give {keep:.0%}. Underlined below: what is selected at each time."
    )
    window = moves.windows[0] if moves.windows else []
    blocks = [
        text_block(f"{window[0]['doc_id']}, at the {name}", [_word(row, place) for row in window])
        for name, place in places.items()
        if window
    ]
    return [Section("At the start, in the middle, at the end", caption, "".join(blocks))]


def _word(row: dict[str, Any], place: int) -> tuple[str, str, str, bool]:
    kept, live = row["kept"][place], row["losses"][place]
    note = f"live {live:.2f}, reference {row['ref_loss']:.2f}, excess {live - row['ref_loss']:+.2f} nats"
    return _spelt(row), note + (", selected" if kept else ""), "transparent", kept


def _spelt(row: dict[str, Any]) -> str:
    return row["text"].replace("\n", "↵\n")


def dynamics_sections(moves: Moves) -> list[Section]:
    """Shares beside the paper's, mean curves, and tokens in the colours of their categories."""
    figures = moves.figures
    caption = (
        f"Run {moves.arm}, {figures['tokens']:,} tokens of {figures['sample']}, under {len(figures['checkpoints'])} models from"
        f" start to end. Categories as in the paper, {MEANING}: a least-squares line through a token's losses falls or rises by"
        " more than 0.2 nats, or else its last loss is above or below the mean. The paper's shares are of"
        " TinyLlama-1.1B on 15B tokens of OpenWebMath."
    )
    x = [point["tokens_seen"] for point in figures["checkpoints"]]
    x = x if len({*x}) == len(x) else list(range(len(x)))
    lines = [
        Series(name, CLASSES[name], list(zip(map(float, x), row["loss"], strict=True)))
        for name, row in figures["categories"].items()
        if row["loss"][0] is not None
    ]
    curves = chart(lines, "tokens seen" if x[-1] >= len(x) else "model", "mean loss (nats/token)")
    words = [
        text_block(f"{window[0]['doc_id']}, window {window[0]['window']}", [_coloured(row) for row in window])
        for window in moves.windows
    ]
    legend = " · ".join(f'<span style="background:{_shade(name)}">{name}</span>' for name in CATEGORIES)
    return [
        Section(f"How single tokens' losses move: {moves.arm}", caption, shares_table(figures) + curves),
        Section("Which tokens those are", "", f'<p class="caption key">{legend}</p>{"".join(words)}'),
    ]


def shares_table(figures: dict[str, Any]) -> str:
    """One row a category."""
    head = (
        "tokens",
        "share",
        "in the paper",
        "loss at the start",
        "at the end",
        "reference",
        "selected at the start",
        "at the end",
    )
    rows = []
    for name, row in figures["categories"].items():
        losses = [_number(value) for value in (row["loss"][0], row["loss"][-1], row["reference_loss"])]
        kept = [_share(value) for value in (row["kept"][0], row["kept"][-1])]
        rows.append((CLASSES[name], (name, _share(row["share"]), _share(row["paper"]), *losses, *kept)))
    return table(head, rows)


def _coloured(row: dict[str, Any]) -> tuple[str, str, str, bool]:
    losses = row["losses"]
    path = " → ".join(f"{value:.2f}" for value in (losses[0], losses[len(losses) // 2], losses[-1]))
    note = f"{row['category']}, live {path}, fitted change {row['change']:+.2f}, reference {row['ref_loss']:.2f} nats"
    return _spelt(row), note, _shade(row["category"]), False


def _shade(category: str) -> str:
    return f"color-mix(in srgb, var(--{CLASSES[category]}) 38%, transparent)"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
