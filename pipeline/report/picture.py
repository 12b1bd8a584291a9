"""Figures as files of their own: a chart, or coloured text, with its own background, for a README."""

import math
import unicodedata
from collections.abc import Sequence
from html import escape

from pipeline.report.chart import STYLE, THEME, figure, tint

CHARACTER, LINE, COLUMNS, LINES, LEGEND_LINES = 8.0, 22, 92, 14, 2  # monospaced text at 13 px


def standalone(svg: str) -> str:
    """A figure as a file of its own, with its own background, for a README."""
    box = svg.index('viewBox="') + len('viewBox="')
    _, _, width, height = svg[box : svg.index('"', box)].split()
    style = f"<style>{THEME}{STYLE}</style>"
    background = f'<rect width="{width}" height="{height}" rx="8" style="fill:var(--bg)"/>'
    size = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    head, body = svg.split(">", 1)
    return size + head.removeprefix("<svg ") + ">" + style + background + body + "\n"


def coloured_text(title: str, words: Sequence[tuple[str, float, bool]]) -> str:
    """Text in a picture: words of (text, excess loss in nats, kept), with a legend."""
    parts = [f'<text x="16" y="26">{escape(title)}</text>']
    parts += _legend()
    column, row = 0, LEGEND_LINES
    for text, excess, kept in words:
        for piece in _lines(text, column):
            if piece is None:
                column, row = 0, row + 1
                continue
            if row >= LINES + LEGEND_LINES:
                break
            parts.append(_word(piece, column, row, excess, kept))
            column += _columns(piece)
    rows = min(row + 1, LINES + LEGEND_LINES)
    return figure(int(32 + COLUMNS * CHARACTER), 46 + rows * LINE, title, parts)


def _legend() -> list[str]:
    """What tint and underline mean, in the same look as the text."""
    parts, column = [], 0
    samples = (("loss below the reference's", -3.0, False), ("loss above", 3.0, False), ("kept", math.nan, True))
    for text, excess, kept in samples:
        parts.append(_word(f" {text} ", column, 0, excess, kept))
        column += len(text) + 4
    return parts


def _word(piece: str, column: int, row: int, excess: float, kept: bool) -> str:
    x, y, width = 16 + column * CHARACTER, 54 + row * LINE, _columns(piece) * CHARACTER
    parts = [f'<rect x="{x}" y="{y - 14}" width="{width}" height="17" style="fill:{tint(excess)}"/>']
    if kept:
        parts.append(f'<rect x="{x + 0.5}" y="{y + 4}" width="{width - 1}" height="2" style="fill:var(--ink)"/>')
    if piece.strip():
        fit = f'textLength="{width}" lengthAdjust="spacingAndGlyphs" xml:space="preserve"'
        parts.append(f'<text class="word" x="{x}" y="{y}" {fit}>{escape(piece)}</text>')
    return "".join(parts)


def _lines(text: str, column: int) -> list[str | None]:
    """Pieces of a word between line breaks (None), its own and those that the margin forces."""
    pieces: list[str | None] = []
    for number, part in enumerate(text.expandtabs(4).split("\n")):
        if number:
            pieces.append(None)
            column = 0
        if part and column and column + _columns(part) > COLUMNS:
            pieces.append(None)
            column = 0
        if part:
            pieces.append(part[:COLUMNS])
            column += _columns(part)
    return pieces


def _columns(text: str) -> int:
    return (
        sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text) or 1
    )
