"""Line charts and coloured text as SVG strings. No library, no script, no outside resource."""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

WIDTH, HEIGHT = 810, 390
LEFT, RIGHT, TOP, BOTTOM = 58, 190, 16, 46
LABEL_GAP = 16
EARLY = 0.05  # a curve's first twentieth may leave the plot at the top, or the end would be a flat line
CHARACTER, LINE, COLUMNS, LINES, LEGEND_LINES = 8.0, 22, 92, 14, 2  # monospaced text at 13 px

# Okabe and Ito's palette: told apart with any kind of colour vision; lightness follows the background.
LIGHT = (
    "--bg:#ffffff;--ink:#1c2330;--dim:#5d6675;--rule:#e3e6ec;--slm:#0072b2;--clm:#b35900;--random:#00815c;"
    "--hot:213,94,0;--cold:0,114,178;"
)
DARK = (
    "--bg:#12161d;--ink:#e8ebf0;--dim:#9aa4b2;--rule:#2b323d;--slm:#56b4e9;--clm:#e69f00;--random:#2fc79a;"
    "--hot:230,120,20;--cold:86,180,233;"
)
STYLE = (
    "svg.figure{font:13px system-ui,-apple-system,'Segoe UI',sans-serif}"
    "svg.figure text{fill:var(--ink)}svg.figure .dim{fill:var(--dim)}"
    "svg.figure .grid{stroke:var(--rule)}svg.figure .level{stroke:var(--dim);stroke-dasharray:5 4}"
    "svg.figure .line{fill:none;stroke-width:2.2;stroke-linejoin:round}"
    "svg.figure .dash{stroke-dasharray:6 5}svg.figure .word{font:13px ui-monospace,Menlo,Consolas,monospace}"
    + "".join(
        f"svg.figure .{arm}{{stroke:var(--{arm})}}svg.figure text.{arm},svg.figure circle.{arm}"
        f"{{fill:var(--{arm});stroke:none}}"
        for arm in ("slm", "clm", "random")
    )
)
THEME = f":root{{color-scheme:light dark;{LIGHT}}}@media(prefers-color-scheme:dark){{:root{{{DARK}}}}}"


@dataclass(frozen=True, slots=True)
class Series:
    """One line: `arm` gives the colour, points are (x, y) in order of x."""

    name: str
    arm: str
    points: list[Point]
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Frame:
    """The map from data to pixels. `cut` says that some points lie above the plot."""

    right: float
    low: float
    high: float
    cut: bool

    def x(self, value: float) -> float:
        """Pixel column of a data x."""
        return LEFT + (WIDTH - LEFT - RIGHT) * value / self.right

    def y(self, value: float) -> float:
        """Pixel row of a data y."""
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.low) / (self.high - self.low)


def chart(series: Sequence[Series], x_label: str, y_label: str, level: tuple[str, float] | None = None) -> str:
    """A line chart; `level` is a named dashed horizontal. Names stand at the lines' ends, values in tooltips."""
    series = [line for line in series if line.points]
    frame = frame_of(series, level)
    parts = [_axes(frame, x_label, y_label)]
    if level:
        row = frame.y(level[1])
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{row:.1f}" y2="{row:.1f}"/>')
        parts.append(f'<text class="dim" x="{LEFT + 6}" y="{row + 15:.1f}">{escape(level[0])}</text>')
    clip = "plot-" + "-".join(letter for letter in f"{x_label} {y_label}".lower().split() if letter.isalnum())
    parts.append(
        f'<clipPath id="{clip}"><rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT + 6}" '
        f'height="{HEIGHT - TOP - BOTTOM + 4}"/></clipPath><g clip-path="url(#{clip})">'
    )
    parts += [_line(frame, line) for line in series]
    parts += ["</g>", *_end_labels(frame, series)]
    return _figure(WIDTH, HEIGHT, f"{y_label} against {x_label}", parts)


def frame_of(series: Sequence[Series], level: tuple[str, float] | None = None) -> Frame:
    """The part of the data plane that a chart of `series` shows."""
    points = [point for line in series for point in line.points]
    right = max((x for x, _ in points), default=1.0) or 1.0
    values = [y for _, y in points] + ([level[1]] if level else [])
    late = [y for x, y in points if x >= EARLY * right] or values
    low, high = min(values, default=0.0), max(late, default=1.0)
    margin = 0.06 * (high - low) or 0.1
    return Frame(right, low - margin, high + margin, max(values, default=0.0) > high + margin)


def short(value: float) -> str:
    """A count as people write it: 950, 12k, 1.5M, 15B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers within [low, high]."""
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


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
    return _figure(int(32 + COLUMNS * CHARACTER), 46 + rows * LINE, title, parts)


def tint(excess: float) -> str:
    """Background of a token: warm where the live model is behind the reference, cool where it is ahead."""
    if math.isnan(excess):
        return "transparent"
    strength = min(abs(excess) / 3.0, 1.0) * 0.5
    return f"rgba(var(--{'hot' if excess > 0 else 'cold'}),{strength:.2f})"


def _axes(frame: Frame, x_label: str, y_label: str) -> str:
    parts = []
    y_ticks = ticks(frame.low, frame.high)
    digits = max(0, -math.floor(math.log10(y_ticks[1] - y_ticks[0]) + 1e-9)) if len(y_ticks) > 1 else 2
    for value in y_ticks:
        row = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{row:.1f}" y2="{row:.1f}"/>')
        label = f"{value:.{digits}f}"
        parts.append(f'<text class="dim" x="{LEFT - 8}" y="{row + 4:.1f}" text-anchor="end">{label}</text>')
    for value in ticks(0.0, frame.right):
        column = frame.x(value)
        place = f'x="{column:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle"'
        parts.append(f'<text class="dim" {place}>{short(value)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text class="dim" x="14" y="{middle}" text-anchor="middle" '
                 f'transform="rotate(-90 14 {middle})">{escape(y_label)}</text>')  # fmt: skip
    center = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="dim" x="{center}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _line(frame: Frame, line: Series) -> str:
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in line.points)
    shown = 0 if line.dashed else 1  # dots would hide the dashes, but they carry the tooltips
    dots = "".join(
        f'<circle class="{line.arm}" fill-opacity="{shown}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.4">'
        f"<title>{escape(line.name)}: {y:.3f} at {short(x)}</title></circle>"
        for x, y in line.points
    )
    return f'<polyline class="line {line.arm}{" dash" if line.dashed else ""}" points="{path}"/>{dots}'


def _end_labels(frame: Frame, series: Sequence[Series]) -> list[str]:
    """Names in the right margin at the height of the lines' ends, moved apart where they would overlap."""
    wanted = sorted((frame.y(line.points[-1][1]), number) for number, line in enumerate(series))
    rows: list[float] = []
    for row, _ in wanted:
        rows.append(max(row, rows[-1] + LABEL_GAP) if rows else row)
    overflow = max(0.0, rows[-1] - (HEIGHT - BOTTOM)) if rows else 0.0
    labels = []
    for row, (_, number) in zip(rows, wanted, strict=True):
        line = series[number]
        labels.append(
            f'<text class="{line.arm}" x="{WIDTH - RIGHT + 12}" y="{row - overflow + 4:.1f}" '
            f'font-weight="600">{escape(line.name)} {line.points[-1][1]:.3f}</text>'
        )
    return labels


def _figure(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    name = escape(label, quote=True)
    head = f'<svg class="figure" viewBox="0 0 {width} {height}" role="img" aria-label="{name}">'
    return head + "".join(parts) + "</svg>"


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
