"""The pieces a page is put together from: escaped text, tables, pictures, the style sheet."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from zsq_ext.report.svg import COLOURS


class Html(str):
    """Text that is HTML already; everything else is escaped when it enters a page."""


def text(value: object) -> Html:
    """Any value as HTML."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def table(header: Sequence[str], rows: Iterable[Sequence[object]], numeric: Sequence[int] = ()) -> Html:
    """A table; the columns in ``numeric`` are set flush right."""
    right = [' class="num"' if n in numeric else "" for n in range(len(header))]
    head = "".join(f"<th{side}>{text(cell)}</th>" for side, cell in zip(right, header, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{side}>{text(cell)}</td>" for side, cell in zip(right, row, strict=True)) + "</tr>"
        for row in rows
    )
    return Html(f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')


def pairs(rows: Iterable[tuple[object, object]]) -> Html:
    """A table of names and values without a header."""
    body = "".join(f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in rows)
    return Html(f'<table class="pairs"><tbody>{body}</tbody></table>')


def bar(start: float, stop: float) -> Html:
    """A bar over part of its cell, between two shares of the width in [0, 1]."""
    start, stop = (min(max(share, 0.0), 1.0) for share in (start, stop))
    width = max(stop - start, 0.002)  # a sliver stays visible
    return Html(f'<span class="bar"><i style="left:{100 * start:.2f}%;width:{100 * width:.2f}%"></i></span>')


def image(png: bytes, width: int, description: str) -> Html:
    """A PNG inside the page, ``width`` CSS pixels wide where there is room."""
    data = base64.b64encode(png).decode()
    return Html(f'<img alt="{escape(description)}" style="width:{width}px" src="data:image/png;base64,{data}">')


def note(words: str) -> Html:
    """A paragraph of small print."""
    return Html(f'<p class="note">{escape(words)}</p>')


def section(anchor: str, title: str, *body: str) -> Html:
    """A titled part of the page; the body is HTML."""
    return Html(f'<section id="{escape(anchor)}"><h2>{escape(title)}</h2>{"".join(body)}</section>')


def page(title: str, subtitle: str, *body: str) -> str:
    """A whole document that loads nothing from anywhere."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f'<body><header><h1>{escape(title)}</h1><p class="note">{escape(subtitle)}</p></header>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


_LIGHT = ("#2f6db5", "#c8434f", "#2b8a57", "#b07d10", "#7657a8", "#0e8a91", "#8c5a45", "#6b7280")
_DARK = ("#7db0ee", "#f2858f", "#66c893", "#e2b64a", "#b79be3", "#54c6cc", "#cf9d87", "#a3aab5")

STYLE = (
    ":root{--ink:#1b1f24;--soft:#5c6670;--rule:#e1e5e9;--paper:#fff;--fill:#2f6db5;"
    + "".join(f"--c{n}:{colour};" for n, colour in enumerate(_LIGHT))
    + "}@media(prefers-color-scheme:dark){:root{--ink:#e4e7ea;--soft:#9aa4ae;--rule:#31373d;--paper:#16191c;"
    "--fill:#7db0ee;" + "".join(f"--c{n}:{colour};" for n, colour in enumerate(_DARK)) + "}}"
    "*{box-sizing:border-box}"
    "body{margin:0 auto;padding:2.5rem 1.5rem 5rem;max-width:58rem;background:var(--paper);color:var(--ink);"
    "font:15px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;font-variant-numeric:tabular-nums}"
    "h1{font-size:1.75rem;line-height:1.2;margin:0 0 .25rem;font-weight:650}"
    "h2{font-size:1.15rem;margin:2.6rem 0 .6rem;padding-top:.9rem;border-top:1px solid var(--rule);font-weight:650}"
    "h3{font-size:.95rem;margin:1.4rem 0 .4rem;font-weight:650}"
    "p{margin:.4rem 0;max-width:46rem}.note{color:var(--soft);font-size:.87rem}"
    "nav{margin:1.2rem 0 0;font-size:.87rem;display:flex;flex-wrap:wrap;gap:.1rem 1.1rem}nav a{color:var(--fill);"
    "text-decoration:none}nav a:hover{text-decoration:underline}"
    ".figures{display:flex;flex-wrap:wrap;gap:.8rem 2.4rem;margin:1.4rem 0 0}"
    ".figures b{display:block;font-size:1.5rem;font-weight:600;line-height:1.25}"
    ".figures span{color:var(--soft);font-size:.82rem}"
    ".wide{overflow-x:auto}table{border-collapse:collapse;margin:.6rem 0;font-size:.87rem}"
    "th,td{text-align:left;padding:.22rem 1.1rem .22rem 0;vertical-align:baseline;border-bottom:1px solid var(--rule)}"
    "thead th{color:var(--soft);font-weight:500;white-space:nowrap}.num{text-align:right}"
    "th:last-child,td:last-child{padding-right:0}"
    ".pairs th{font-weight:400;color:var(--soft);white-space:nowrap}.pairs td{overflow-wrap:anywhere}"
    ".columns{display:grid;grid-template-columns:repeat(auto-fill,minmax(19rem,1fr));gap:0 2.2rem}"
    ".columns table{width:100%}"
    ".bar{display:inline-block;position:relative;width:9rem;height:.6em;background:var(--rule);border-radius:2px}"
    ".bar i{position:absolute;top:0;bottom:0;background:var(--fill);border-radius:2px;min-width:1px}"
    "img{max-width:100%;height:auto;image-rendering:pixelated;display:block;margin:.6rem 0}"
    ".spark{width:6rem;height:1em;display:inline-block;vertical-align:middle}"
    "figure{margin:.6rem 0;max-width:44rem}figure>svg{width:100%;height:auto;display:block;overflow:visible}"
    "svg text{font-size:11px;fill:var(--soft)}.line{fill:none;stroke-width:1.6;stroke-linejoin:round}"
    ".dashed{stroke-dasharray:5 3}.dot{stroke:none}.grid{stroke:var(--rule)}.tick{stroke:var(--soft)}"
    ".legend{list-style:none;margin:0 0 .3rem;padding:0 0 0 62px;font-size:.82rem;display:flex;flex-wrap:wrap;"
    "gap:.1rem 1.1rem}.swatch{width:24px;height:8px;margin-right:.4rem;vertical-align:middle}"
    + "".join(f".c{n}{{stroke:var(--c{n})}}.dot.c{n}{{fill:var(--c{n})}}" for n in range(COLOURS))
    + "@media print{body{max-width:none;padding:0}section{break-inside:avoid-page}}"
)
