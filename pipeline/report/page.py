"""The report's HTML: one page that loads nothing, in the reader's light or dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from pipeline.report.chart import STYLE, THEME, tint

PAGE_STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,'Segoe UI',sans-serif}
main{max-width:880px;margin:0 auto;padding:40px 24px 80px}
h1{font-size:15px;font-weight:600;color:var(--dim);margin:0 0 10px}
h2{font-size:19px;margin:48px 0 6px}
h3{font-size:13px;font-weight:600;color:var(--dim);margin:24px 0 4px;overflow-wrap:anywhere}
.headline{font-size:25px;line-height:1.35;font-weight:600;margin:0;text-wrap:pretty}
.caption{color:var(--dim);font-size:14px;margin:4px 0 10px;max-width:74ch}
.wide{overflow-x:auto}
section{overflow-x:auto}svg.figure{width:100%;min-width:600px;height:auto;display:block}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:15px}
th,td{text-align:right;padding:7px 0 7px 18px;border-bottom:1px solid var(--rule);vertical-align:bottom}
th{color:var(--dim);font-weight:500;font-size:13px}
th:first-child,td:first-child{text-align:left;padding-left:0}
.clm{color:var(--clm)}.random{color:var(--random)}.slm{color:var(--slm)}
td.clm,td.random,td.slm{font-weight:600}
.text{font:13px/1.75 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere;margin:0;
 padding:12px 14px;border:1px solid var(--rule);border-radius:8px}
.text span{border-radius:2px}
.text .kept,.key .kept{border-bottom:2px solid var(--ink)}
.text span:hover{outline:1px solid var(--ink)}
.key span{padding:1px 6px;border-radius:2px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 18px;font-size:14px}
dt{color:var(--dim)}dd{margin:0;overflow-wrap:anywhere}
"""
# The page keeps itself from loading anything, whatever a document's text holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a shown window; losses in nats, NaN for the first of a window."""

    text: str
    live: float
    reference: float
    kept: bool

    @property
    def excess(self) -> float:
        """Live minus reference loss, nats."""
        return self.live - self.reference


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, a caption in plain text, and finished HTML."""

    title: str
    caption: str
    html: str


def page(title: str, headline: str, sections: Sequence[Section]) -> str:
    """The whole page; `title`, `headline` and captions are plain text."""
    body = "".join(
        f"<section><h2>{escape(section.title)}</h2>"
        + (f'<p class="caption">{escape(section.caption)}</p>' if section.caption else "")
        + f"{section.html}</section>"
        for section in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{THEME}{STYLE}{PAGE_STYLE}</style></head>"
        f'<body><main><h1>{escape(title)}</h1><p class="headline">{escape(headline)}</p>{body}</main></body></html>\n'
    )


def table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table of plain text; each row comes with the arm that colours its first cell."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{arm}">{escape(cell)}</td>' if number == 0 else f"<td>{escape(cell)}</td>"
            for number, cell in enumerate(cells)
        )
        + "</tr>"
        for arm, cells in rows
    )
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def definitions(pairs: Sequence[tuple[str, str]]) -> str:
    """A list of names and values, plain text."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs) + "</dl>"


def document(name: str, tokens: Sequence[Token]) -> str:
    """A window's text: tinted by excess loss, kept tokens underlined, figures in each token's tooltip."""
    return f'<h3>{escape(name)}</h3><p class="text">{"".join(map(_span, tokens))}</p>'


def key() -> str:
    """The legend of `document`."""
    shades = "".join(f'<span style="background:{tint(excess)}">{excess:g}</span> ' for excess in (-3, -1, 0, 1, 3))
    return f'<p class="caption key">excess loss in nats: {shades} · <span class="kept">kept</span> · not kept</p>'


def _span(token: Token) -> str:
    if math.isnan(token.excess):
        note = "first token: nothing predicts it"
    else:
        note = f"live {token.live:.2f}, reference {token.reference:.2f}, excess {token.excess:+.2f} nats"
        note += ", kept" if token.kept else ", not kept"
    word = token.text.replace("\n", "↵")
    mark = ' class="kept"' if token.kept else ""
    style = "" if math.isnan(token.excess) else f' style="background:{tint(token.excess)}"'
    return f'<span{mark}{style} title="{escape(f"“{word}”: {note}")}">{escape(token.text)}</span>'
