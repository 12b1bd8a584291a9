"""The report's HTML: one page that loads nothing, in the reader's light or dark."""

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from pipeline.report.chart import COLOURS, STYLE, THEME, tint

PAGE_STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,'Segoe UI',sans-serif}
main{max-width:880px;margin:0 auto;padding:40px 24px 80px}
h1{font-size:15px;font-weight:600;color:var(--dim);margin:0 0 10px}
h2{font-size:24px;margin:64px 0 4px;padding-top:14px;border-top:1px solid var(--rule)}
h3{font-size:16px;margin:30px 0 4px;text-wrap:balance}
h4{font-size:13px;font-weight:600;color:var(--dim);margin:22px 0 4px;overflow-wrap:anywhere}
.headline{font-size:23px;line-height:1.38;font-weight:600;margin:0 0 10px;text-wrap:pretty}
.caption{color:var(--dim);font-size:14px;margin:4px 0 10px;max-width:74ch;overflow-wrap:anywhere}
.wide{overflow-x:auto}
svg.figure{width:100%;height:auto;display:block}.phone{display:none}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}
th,td{text-align:right;padding:7px 0 7px 13px;border-bottom:1px solid var(--rule);vertical-align:bottom}
th{color:var(--dim);font-weight:500;font-size:13px}
th:first-child,td:first-child{text-align:left;padding-left:0}
td[class]{font-weight:600}td:not(:first-child){white-space:nowrap}td:first-child{min-width:7em}
.text{font:13px/1.75 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere;margin:0;
 padding:12px 14px;border:1px solid var(--rule);border-radius:8px 8px 0 0;cursor:default}
.text:focus-visible{outline:2px solid var(--slm);outline-offset:2px}
.text span{border-radius:2px}
.text .kept,.key .kept{border-bottom:2px solid var(--ink)}
.text .at{outline:2px solid var(--ink)}
output{display:block;position:sticky;bottom:0;min-height:34px;padding:6px 14px;border:1px solid var(--rule);border-top:0;
 border-radius:0 0 8px 8px;background:var(--bg);color:var(--dim);font-size:13px;font-variant-numeric:tabular-nums}
.key span{padding:1px 6px;border-radius:2px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 18px;font-size:14px}
dt{color:var(--dim)}dd{margin:0;overflow-wrap:anywhere}
@media(max-width:640px){main{padding:24px 14px 60px}.headline{font-size:19px}h2{font-size:21px}
 .wide-page{display:none}.phone{display:block}.text{font-size:12px;padding:10px}
 table{font-size:13px}th,td{padding-left:12px}dl{grid-template-columns:1fr}dd{margin-bottom:6px}}
""" + "".join(f"td.{name}{{color:var(--{name})}}" for name in COLOURS)
# Figures of the token under the pointer, or the one that arrow keys lead to, below its text. Without it they are tooltips.
SCRIPT = """
for (const text of document.querySelectorAll(".text")) {
  const words = [...text.children], note = text.nextElementSibling;
  let at = -1;
  const show = (place) => {
    if (!words[place]) return;
    words[at]?.classList.remove("at");
    at = place;
    words[at].classList.add("at");
    note.textContent = words[at].title;
  };
  for (const kind of ["pointerover", "click"]) text.addEventListener(kind, (event) => show(words.indexOf(event.target)));
  text.addEventListener("keydown", (event) => {
    const to = {ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + 10, ArrowUp: at - 10, Home: 0, End: words.length - 1}[event.key];
    if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    show(Math.min(Math.max(to, 0), words.length - 1));
  });
}
"""
# The page keeps itself from loading anything and from running anything but its own script, whatever a document's text holds.
SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{SCRIPT_HASH}'"


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


@dataclass(frozen=True, slots=True)
class Question:
    """What a part of the page answers, and the sections that do."""

    title: str
    sections: Sequence[Section]


def page(title: str, headline: str, questions: Sequence[Question]) -> str:
    """The whole page; `title`, `headline` and captions are plain text. A question without sections is left out."""
    body = "".join(
        f"<h2>{escape(question.title)}</h2>{''.join(map(_section, question.sections))}"
        for question in questions
        if question.sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{THEME}{STYLE}{PAGE_STYLE}</style></head>"
        f'<body><main><h1>{escape(title)}</h1><p class="headline">{escape(headline)}</p>{body}</main>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _section(section: Section) -> str:
    caption = f'<p class="caption">{escape(section.caption)}</p>' if section.caption else ""
    return f"<section><h3>{escape(section.title)}</h3>{caption}{section.html}</section>"


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
    """A window's text: tinted by excess loss, kept tokens underlined."""
    return text_block(name, [(token.text, _note(token), tint(token.excess), token.kept) for token in tokens])


def text_block(name: str, words: Sequence[tuple[str, str, str, bool]]) -> str:
    """Text of (word, its figures, background, whether it is underlined), and a line for the figures of the one pointed at."""
    spans = "".join(
        f'<span{" class=kept" if kept else ""} style="background:{background}" title="{escape(_quoted(word, note))}">'
        f"{escape(word)}</span>"
        for word, note, background, kept in words
    )
    label = escape(f"{name}; arrow keys go from token to token", quote=True)
    hint = "Point at a token, or press Tab and the arrow keys, for its figures."
    return (
        f'<h4>{escape(name)}</h4><p class="text" tabindex="0" role="group" aria-label="{label}">{spans}</p>'
        f'<output aria-live="polite">{hint}</output>'
    )


def _quoted(word: str, note: str) -> str:
    return f"“{word.replace(chr(10), '')}”: {note}"


def key() -> str:
    """The legend of `document`."""
    shades = "".join(f'<span style="background:{tint(excess)}">{excess:g}</span> ' for excess in (-3, -1, 0, 1, 3))
    return f'<p class="caption key">excess loss in nats: {shades} · <span class="kept">kept</span> · not kept</p>'


def _note(token: Token) -> str:
    if math.isnan(token.excess):
        return "first token: nothing predicts it"
    note = f"live {token.live:.2f}, reference {token.reference:.2f}, excess {token.excess:+.2f} nats"
    return note + (", kept" if token.kept else ", not kept")
