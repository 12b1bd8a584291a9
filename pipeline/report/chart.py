"""Line charts and coloured text as SVG strings. No library, no script, no outside resource."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from statistics import fmean, stdev

Point = tuple[float, float]
Band = tuple[float, float, float]  # x, lowest y, highest y

LABEL_GAP = 16
LETTER = 7.8  # width of a bold letter of the figures, at most, on the average
EARLY = 0.05  # a curve's first twentieth may leave the plot at the top, or the end would be a flat line

# Okabe and Ito's palette: told apart with any kind of colour vision; lightness follows the background. The last four are
# the categories of token dynamics.
COLOURS = {
    "slm": ("#0072b2", "#56b4e9"),
    "clm": ("#b35900", "#e69f00"),
    "random": ("#00815c", "#2fc79a"),
    "other": ("#7a4a9c", "#c9a0e6"),
    "hh": ("#b3261e", "#f28b82"),
    "lh": ("#b35900", "#e69f00"),
    "hl": ("#0072b2", "#56b4e9"),
    "ll": ("#3f7d20", "#8fd16a"),
}


def _theme(place: int, rest: str) -> str:
    return "".join(f"--{name}:{colours[place]};" for name, colours in COLOURS.items()) + rest


LIGHT = _theme(0, "--bg:#ffffff;--ink:#1c2330;--dim:#5d6675;--rule:#e3e6ec;--hot:213,94,0;--cold:0,114,178;")
DARK = _theme(1, "--bg:#12161d;--ink:#e8ebf0;--dim:#9aa4b2;--rule:#2b323d;--hot:230,120,20;--cold:86,180,233;")
STYLE = (
    "svg.figure{font:13px system-ui,-apple-system,'Segoe UI',sans-serif}"
    "svg.figure text{fill:var(--ink)}svg.figure .dim{fill:var(--dim)}"
    "svg.figure .grid{stroke:var(--rule)}svg.figure .level{stroke:var(--dim);stroke-dasharray:5 4}"
    "svg.figure .line{fill:none;stroke-width:2.2;stroke-linejoin:round}svg.figure .band{fill-opacity:.18}"
    "svg.figure .dash{stroke-dasharray:6 5}svg.figure .word{font:13px ui-monospace,Menlo,Consolas,monospace}"
    + "".join(
        f"svg.figure .{name}{{stroke:var(--{name})}}svg.figure text.{name},svg.figure circle.{name}"
        f"{{fill:var(--{name});stroke:none}}svg.figure polygon.{name}{{fill:var(--{name});stroke:none}}"
        for name in COLOURS
    )
)
THEME = f":root{{color-scheme:light dark;{LIGHT}}}@media(prefers-color-scheme:dark){{:root{{{DARK}}}}}"


@dataclass(frozen=True, slots=True)
class Size:
    """Pixels of a figure and of its margins. `aside`: names stand beside the lines' ends, not above the plot."""

    width: int
    height: int
    left: int
    right: int
    top: int = 16
    bottom: int = 46
    aside: bool = True


WIDE = Size(810, 390, 58, 190)
PHONE = Size(380, 300, 50, 14, aside=False)


@dataclass(frozen=True, slots=True)
class Series:
    """One line: `arm` gives the colour, points are (x, y) in order of x; `band` is drawn behind it."""

    name: str
    arm: str
    points: list[Point]
    dashed: bool = False
    band: tuple[Band, ...] = ()


@dataclass(frozen=True, slots=True)
class Range:
    """One line of `ranges`: values of one thing, of which mean and standard deviation are drawn."""

    name: str
    arm: str
    values: list[float]


@dataclass(frozen=True, slots=True)
class Frame:
    """The map from data to pixels. `cut` says that some points lie above the plot."""

    right: float
    low: float
    high: float
    cut: bool
    size: Size = WIDE

    def x(self, value: float) -> float:
        """Pixel column of a data x."""
        return self.size.left + (self.size.width - self.size.left - self.size.right) * value / self.right

    def y(self, value: float) -> float:
        """Pixel row of a data y."""
        size = self.size
        return (
            size.height
            - size.bottom
            - (size.height - size.top - size.bottom) * (value - self.low) / (self.high - self.low)
        )


def chart(series: Sequence[Series], x_label: str, y_label: str, level: tuple[str, float] | None = None) -> str:
    """A line chart for a wide page and one for a phone; the page's style shows the one that suits."""
    phone, wide = (drawn(series, x_label, y_label, level, size) for size in (PHONE, WIDE))
    return f'<div class="wide-page">{wide}</div><div class="phone">{phone}</div>'


def drawn(
    series: Sequence[Series], x_label: str, y_label: str, level: tuple[str, float] | None = None, size: Size = WIDE
) -> str:
    """A line chart as one SVG; `level` is a named dashed horizontal. Values stand in tooltips."""
    series = [line for line in series if line.points]
    if not size.aside:
        more = LABEL_GAP * len(series)
        size = replace(size, top=size.top + more, height=size.height + more)
    frame = frame_of(series, level, size)
    parts = [_axes(frame, x_label, y_label)]
    if level:
        row = frame.y(level[1])
        parts.append(
            f'<line class="level" x1="{size.left}" x2="{size.width - size.right}" y1="{row:.1f}" y2="{row:.1f}"/>'
        )
        parts.append(f'<text class="dim" x="{size.left + 6}" y="{row + 15:.1f}">{escape(level[0])}</text>')
    clip = "plot-" + "-".join(
        letter for letter in f"{x_label} {y_label} {size.width}".lower().split() if letter.isalnum()
    )
    parts.append(
        f'<clipPath id="{clip}"><rect x="{size.left}" y="{size.top}" width="{size.width - size.left - size.right + 6}" '
        f'height="{size.height - size.top - size.bottom + 4}"/></clipPath><g clip-path="url(#{clip})">'
    )
    parts += [_band(frame, line) for line in series if line.band]
    parts += [_line(frame, line) for line in series]
    parts += ["</g>", *(_end_labels(frame, series) if size.aside else _top_labels(frame, series))]
    return figure(size.width, size.height, f"{y_label} against {x_label}", parts)


def ranges(rows: Sequence[Range], label: str) -> str:
    """Rows of dots around zero, with mean and standard deviation of each, for a wide page and for a phone."""
    names = round(20 + LETTER * max(len(row.name) for row in rows))
    sizes = replace(PHONE, left=14), replace(WIDE, left=max(190, names), right=140)
    phone, wide = (_ranges(rows, label, size) for size in sizes)
    return f'<div class="wide-page">{wide}</div><div class="phone">{phone}</div>'


def _ranges(rows: Sequence[Range], label: str, size: Size) -> str:
    gap = 30 if size.aside else 46
    size = replace(size, height=size.top + gap * len(rows) + size.bottom)
    values = [0.0, *(value for row in rows for value in row.values)]
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.1
    low, high = low - margin, high + margin

    def x(value: float) -> float:
        return size.left + (size.width - size.left - size.right) * (value - low) / (high - low)

    end = size.height - size.bottom
    parts = []
    for value in ticks(low, high, 6 if size.aside else 4):
        parts.append(f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{size.top}" y2="{end}"/>')
        parts.append(f'<text class="dim" x="{x(value):.1f}" y="{end + 18}" text-anchor="middle">{value:+.3g}</text>')
    parts.append(f'<line class="level" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{size.top}" y2="{end}"/>')
    for number, row in enumerate(rows):
        y = size.top + gap * (number + 0.5) + (0 if size.aside else 10)
        mean, sd = fmean(row.values), stdev(row.values) if len(row.values) > 1 else 0.0
        place = f'x="{size.left - 10}" y="{y + 4:.1f}" text-anchor="end"' if size.aside else f'x="2" y="{y - 14:.1f}"'
        told = f"{mean:+.3f}" + (f" ± {sd:.3f}" if sd else "")
        note = "" if size.aside else f"  {told}"
        parts.append(f'<text class="{row.arm}" {place} font-weight="600">{escape(row.name + note)}</text>')
        parts.append(
            f'<line class="{row.arm}" stroke-width="2.2" x1="{x(mean - sd):.1f}" x2="{x(mean + sd):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        dots = [(value, 2.6, 0.45) for value in row.values] + [(mean, 5.0, 1.0)]
        parts += [
            f'<circle class="{row.arm}" fill-opacity="{opacity}" cx="{x(value):.1f}" cy="{y:.1f}" r="{radius}">'
            f"<title>{escape(row.name)}: {value:+.3f}</title></circle>"
            for value, radius, opacity in dots
        ]
        if size.aside:
            parts.append(f'<text class="dim" x="{size.width - size.right + 10}" y="{y + 4:.1f}">{told}</text>')
    parts.append(f'<text class="dim" x="{(size.left + size.width - size.right) / 2}" y="{size.height - 8}" '
                 f'text-anchor="middle">{escape(label)}</text>')  # fmt: skip
    return figure(size.width, size.height, label, parts)


def frame_of(series: Sequence[Series], level: tuple[str, float] | None = None, size: Size = WIDE) -> Frame:
    """The part of the data plane that a chart of `series` shows."""
    points = [point for line in series for point in line.points]
    points += [(x, y) for line in series for x, *ends in line.band for y in ends]
    right = max((x for x, _ in points), default=1.0) or 1.0
    values = [y for _, y in points] + ([level[1]] if level else [])
    late = [y for x, y in points if x >= EARLY * right] or values
    low, high = min(values, default=0.0), max(late, default=1.0)
    margin = 0.06 * (high - low) or 0.1
    return Frame(right, low - margin, high + margin, max(values, default=0.0) > high + margin, size)


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


def tint(excess: float) -> str:
    """Background of a token: warm where the live model is behind the reference, cool where it is ahead."""
    if math.isnan(excess):
        return "transparent"
    strength = min(abs(excess) / 3.0, 1.0) * 0.5
    return f"rgba(var(--{'hot' if excess > 0 else 'cold'}),{strength:.2f})"


def _axes(frame: Frame, x_label: str, y_label: str) -> str:
    parts, size = [], frame.size
    right, end = size.width - size.right, size.height - size.bottom
    y_ticks = ticks(frame.low, frame.high)
    digits = max(0, -math.floor(math.log10(y_ticks[1] - y_ticks[0]) + 1e-9)) if len(y_ticks) > 1 else 2
    for value in y_ticks:
        row = frame.y(value)
        parts.append(f'<line class="grid" x1="{size.left}" x2="{right}" y1="{row:.1f}" y2="{row:.1f}"/>')
        label = f"{value:.{digits}f}"
        parts.append(f'<text class="dim" x="{size.left - 8}" y="{row + 4:.1f}" text-anchor="end">{label}</text>')
    for value in ticks(0.0, frame.right, 6 if size.aside else 4):
        place = f'x="{frame.x(value):.1f}" y="{end + 18}" text-anchor="middle"'
        parts.append(f'<text class="dim" {place}>{short(value)}</text>')
    middle = (size.top + end) / 2
    parts.append(f'<text class="dim" x="14" y="{middle}" text-anchor="middle" '
                 f'transform="rotate(-90 14 {middle})">{escape(y_label)}</text>')  # fmt: skip
    center = (size.left + right) / 2
    parts.append(f'<text class="dim" x="{center}" y="{size.height - 8}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _band(frame: Frame, line: Series) -> str:
    upper = [(x, high) for x, _, high in line.band]
    lower = [(x, low) for x, low, _ in reversed(line.band)]
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in upper + lower)
    return f'<polygon class="band {line.arm}" points="{path}"/>'


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
    size = frame.size
    wanted = sorted((frame.y(line.points[-1][1]), number) for number, line in enumerate(series))
    rows: list[float] = []
    for row, _ in wanted:
        rows.append(max(row, rows[-1] + LABEL_GAP) if rows else row)
    overflow = max(0.0, rows[-1] - (size.height - size.bottom)) if rows else 0.0
    return [
        _label(series[number], size.width - size.right + 12, row - overflow + 4)
        for row, (_, number) in zip(rows, wanted, strict=True)
    ]


def _top_labels(frame: Frame, series: Sequence[Series]) -> list[str]:
    """Names above the plot, in the order of the lines' ends."""
    ends = sorted(series, key=lambda line: -line.points[-1][1])
    marked = [replace(line, name=line.name + (" (dashed)" if line.dashed else "")) for line in ends]
    return [_label(line, frame.size.left, 12 + LABEL_GAP * number) for number, line in enumerate(marked)]


def _label(line: Series, x: float, y: float) -> str:
    name = f"{line.name} {line.points[-1][1]:.3f}"
    return f'<text class="{line.arm}" x="{x}" y="{y:.1f}" font-weight="600">{escape(name)}</text>'


def figure(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    """An SVG element that is as wide as its place."""
    name = escape(label, quote=True)
    head = f'<svg class="figure" viewBox="0 0 {width} {height}" role="img" aria-label="{name}">'
    return head + "".join(parts) + "</svg>"
