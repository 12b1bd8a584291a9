"""A suite's table: the paper's rows and ours in the paper's column order, as text, Markdown and in the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.table import Table

from pipeline.suite.suites import SUITES, Column, Suite

MISSING = "-"


@dataclass(frozen=True, slots=True)
class Grid:
    """head: titles. paper, ours: rows of as many cells, a model's name first. notes: what the reader must know."""

    head: list[str]
    paper: list[list[str]]
    ours: list[list[str]]
    notes: list[str]


def grid(rows: Sequence[dict[str, Any]]) -> Grid:
    """The table of rows of one suite, as `pipeline.suite.harness` makes them, each with its `model`."""
    suite = SUITES[rows[0]["suite"]]
    averaged = all(column.percent for column in suite.columns)
    head = ["model", *(column.title for column in suite.columns), *(["AVG"] if averaged else [])]
    paper = [[name, *_averaged([f"{value:.1f}" for value in row], row, averaged)] for name, row in suite.rows.items()]
    ours = [_ours(suite, row, averaged) for row in rows]
    return Grid(head, paper, ours, _notes(suite, rows))


def _ours(suite: Suite, row: dict[str, Any], averaged: bool) -> list[str]:
    figures = [row["columns"].get(column.title) for column in suite.columns]
    cells = [_cell(column, figure) for column, figure in zip(suite.columns, figures, strict=True)]
    whole = [figure["value"] for figure in figures if figure]
    return [row["model"], *_averaged(cells, whole if len(whole) == len(figures) else [], averaged)]


def _cell(column: Column, figure: dict[str, float] | None) -> str:
    if figure is None:
        return MISSING
    digits = 1 if column.percent else 3
    error = f" ± {figure['stderr']:.{digits}f}" if "stderr" in figure else ""
    return f"{figure['value']:.{digits}f}{error}"


def _averaged(cells: list[str], values: Sequence[float], averaged: bool) -> list[str]:
    return [*cells, *([f"{fmean(values):.1f}" if values else MISSING] if averaged else [])]


def _notes(suite: Suite, rows: Sequence[dict[str, Any]]) -> list[str]:
    notes = [f"Paper: {suite.source}."] if suite.source else []
    told: dict[str, list[str]] = {}
    for column in suite.columns:
        if column.note:
            told.setdefault(column.note, []).append(column.title)
    notes += [f"{', '.join(titles)}: {note}." for note, titles in told.items()]
    shots = ", ".join(f"{column.title} {column.shots}" for column in suite.columns if column.shots)
    notes += [f"Shots: {shots}."] if shots else []
    if limits := sorted({row["limit"] for row in rows if row["limit"]}):
        notes.append(f"Only the first {', '.join(map(str, limits))} rows of each task: no figures to compare.")
    notes += [
        f"{row['model']}: {row['cut']} prompts lost their beginning for want of positions."
        for row in rows
        if row.get("cut")
    ]
    for title, reason in sorted({item for row in rows for item in row.get("left_out", {}).items()}):
        notes.append(f"{title}: left out: {reason}.")
    return notes


def markdown(found: Grid) -> str:
    """The table and its notes as Markdown."""
    rule = ["---", *["---:"] * (len(found.head) - 1)]
    lines = [found.head, rule, *found.paper, *found.ours]
    body = "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
    return "\n\n".join([body, *found.notes]) + "\n"


def text(found: Grid) -> Table:
    """The table for a terminal: the paper's rows dim."""
    table = Table()
    for title in found.head:
        table.add_column(title, overflow="fold")  # a model's whole name, not its beginning
    for row in found.paper:
        table.add_row(*row, style="dim")
    for row in found.ours:
        table.add_row(*row)
    return table
