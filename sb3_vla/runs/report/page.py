"""Parts of an HTML page that needs nothing beside itself: escaped text, tables, and the style sheet.

The style follows the reader's light or dark colors, fits a phone, and prints.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any


class Html(str):
    """Text that is HTML already; any other is escaped before it gets into a page."""


def markup(value: object) -> Html:
    """Text as HTML, escaped unless it is HTML already."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def table(
    caption: str,
    header: Sequence[str],
    rows: Iterable[Sequence[Any]],
    more: Iterable[Sequence[Any]] = (),
    *,
    words: bool = False,
) -> Html:
    """
    A table whose first column heads its rows.

    :param caption: above it
    :param header: what heads the columns; an empty one heads nothing
    :param rows: cells, text or HTML
    :param more: rows that are set apart below the others
    :param words: the cells are words, to be broken where they are too long, instead of numbers in columns
    :return: the table, which is moved sideways where it is too wide
    """
    heads = "".join(f'<th scope="col">{markup(cell)}</th>' if cell else "<td></td>" for cell in header)
    bodies = []
    for look, part in (("ours", list(rows)), ("published", list(more))):
        lines = "".join(
            f'<tr><th scope="row">{markup(row[0])}</th>{"".join(f"<td>{markup(cell)}</td>" for cell in row[1:])}</tr>'
            for row in part
        )
        if lines:
            bodies.append(f'<tbody class="{look}">{lines}</tbody>')
    kind = ' class="words"' if words else ""
    return Html(
        f'<div class="scroll" role="region" tabindex="0" aria-label="{markup(caption)}">'
        f"<table{kind}>"
        f"<caption>{markup(caption)}</caption><thead><tr>{heads}</tr></thead>{''.join(bodies)}</table></div>"
    )


def details(summary: str, content: str) -> Html:
    """HTML that is shown when its summary is clicked, and in print."""
    return Html(f"<details><summary>{markup(summary)}</summary>{content}</details>")


def paragraphs(texts: Iterable[str]) -> Html:
    """A paragraph for each text."""
    return Html("".join(f"<p>{markup(text)}</p>" for text in texts))


def bullets(texts: Sequence[str]) -> Html:
    """A list of texts; nothing where there is none."""
    return Html(f"<ul>{''.join(f'<li>{markup(text)}</li>' for text in texts)}</ul>" if texts else "")


STYLE = """
:root{color-scheme:light dark;--page:#fff;--text:#1f2328;--soft:#57606a;--line:#d0d7de;--panel:#f6f8fa;
--before:#a3adb8;--after:#4a8fd0;--curve:#2469b0;--thin:#8fa3b8;--second:#b35900;--gained:#1f6feb;--lost:#bc4c00}
@media screen and (prefers-color-scheme:dark){:root{--page:#0d1117;--text:#e6edf3;--soft:#9aa4af;--line:#30363d;
--panel:#161b22;--before:#6e7781;--after:#58a6ff;--curve:#79c0ff;--thin:#58677a;--second:#f0a35e;--gained:#58a6ff;
--lost:#f0883e}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.5 system-ui,sans-serif;overflow-wrap:break-word}
main{max-width:64rem;margin:auto;padding:1rem}
h1{margin:.5rem 0;font-size:1.6rem}
h2{margin:2rem 0 .5rem;font-size:1.25rem;border-bottom:1px solid var(--line)}
h3{margin:1rem 0 .25rem;font-size:1rem}
p{margin:.5rem 0;max-width:48rem}
a{color:var(--curve)}
.facts{display:flex;flex-wrap:wrap;gap:.75rem;margin:0}
.facts div{background:var(--panel);border:1px solid var(--line);border-radius:6px;padding:.4rem .8rem}
dt{color:var(--soft);font-size:.8rem}
dd{margin:0;font-size:1.15rem;font-weight:600}
.scroll{overflow-x:auto}
table{border-collapse:collapse;margin:.75rem 0;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);font-size:.85rem}
th,td{padding:.25rem .6rem;text-align:right;vertical-align:top;border-bottom:1px solid var(--line)}
th:first-child{text-align:left;font-weight:400}
.words th,.words td{text-align:left;overflow-wrap:anywhere}
.words td{min-width:6rem}
thead th{font-weight:600}
td small{display:block;white-space:nowrap}
small{color:var(--soft);font-size:.75rem;font-weight:400}
.published{background:var(--panel)}
.published th{font-style:italic}
.published:not(:first-of-type) tr:first-child>*{border-top:2px solid var(--soft)}
pre{background:var(--panel);border:1px solid var(--line);border-radius:6px;padding:.6rem;font-size:.85rem;
white-space:pre-wrap;overflow-wrap:anywhere}
summary{cursor:pointer;color:var(--curve)}
details{margin:.5rem 0}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1.25rem}
.videos{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,10rem),1fr));gap:.75rem}
figure{margin:1rem 0;break-inside:avoid}
.charts figure,.videos figure{margin:0}
figure p{font-size:.8rem;color:var(--soft)}
figcaption{font-size:.9rem;font-weight:600}
.video figcaption{font-size:.75rem;font-weight:400;color:var(--soft);overflow-wrap:anywhere}
video,.video img{width:100%;display:block;background:var(--panel)}
.still{background:var(--panel);padding:1rem .5rem;margin:0}
svg{display:block;width:100%;height:auto;font:11px system-ui,sans-serif;fill:var(--text)}
svg .end{text-anchor:end}
svg .middle{text-anchor:middle}
.grid{stroke:var(--line);stroke-width:1}
polyline{fill:none;stroke-linejoin:round}
.main{stroke:var(--curve);stroke-width:2.2}
.second{stroke:var(--second);stroke-width:2.2}
.thin{stroke:var(--thin);stroke-width:.8;opacity:.7}
.dots{stroke:var(--curve);stroke-width:4;stroke-linecap:round;opacity:.4;fill:none}
.before{fill:var(--before)}
.after{fill:var(--after)}
.interval{stroke:var(--text);stroke-width:1;fill:none}
.heat{fill:var(--curve)}
.frame{fill:none;stroke:var(--line)}
.both{fill:var(--before)}
.gained{fill:var(--gained)}
.lost{fill:none;stroke:var(--lost);stroke-width:2}
.neither{fill:var(--soft)}
.key{display:inline-block;margin-right:1rem;white-space:nowrap}
.key i{display:inline-block;width:.8em;height:.8em;margin-right:.35em;vertical-align:-.05em;background:var(--curve)}
.key .thin,.key .second,.key .main{height:3px;vertical-align:.2em;opacity:1}
.key .thin{background:var(--thin)}
.key .second{background:var(--second)}
.key .dots{border-radius:50%;width:.5em;height:.5em}
.key .before,.key .both{background:var(--before)}
.key .after{background:var(--after)}
.key .gained{background:var(--gained)}
.key .lost{background:linear-gradient(45deg,transparent 40%,var(--lost) 40% 60%,transparent 60%),
linear-gradient(-45deg,transparent 40%,var(--lost) 40% 60%,transparent 60%)}
.key .neither{background:var(--soft);width:.3em;height:.3em;vertical-align:.2em}
.scale span{display:inline-block;width:6em;height:.8em;margin:0 .4em;border:1px solid var(--line);
background:linear-gradient(90deg,transparent,var(--curve));vertical-align:-.1em}
@media (max-width:30rem){body{font-size:15px}th,td{padding:.25rem .35rem}main{padding:.75rem}
.published small{display:block;font-size:.65rem;line-height:1.25}th:first-child{min-width:7.5rem}}
@media print{main{max-width:none}details::details-content{content-visibility:visible;block-size:auto}a{color:inherit}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}.scroll{overflow:visible}h2{break-after:avoid}}
"""
