"""One HTML page that stands by itself: no request off it, no script; it follows the reader's light or dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d8dde3; --ground: #fdfdfc; --sheet: #fff;
  --bad: #b3410b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e8; --soft: #9aa4ae; --line: #343a41; --ground: #15181b;
  --sheet: #1b1f23; --bad: #f0935c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 Charter, "Bitstream Charter", "Iowan Old Style", "Source Serif 4", Georgia, serif; }
main { max-width: 62rem; margin: 0 auto; padding: 3.5rem 1.5rem 6rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.35rem; margin: 3.2rem 0 .8rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2.2rem 0 .6rem; }
p, dd { max-width: 46rem; }
.soft { color: var(--soft); }
.bad { color: var(--bad); }
nav { margin: 1.2rem 0 0; columns: 16rem; font-size: .95rem; }
nav a { display: block; color: inherit; text-decoration-color: var(--line); text-underline-offset: .2em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 1rem 0; font-size: .95rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: .85em/1.5 ui-monospace, "SF Mono", "DejaVu Sans Mono", Menlo, monospace; }
pre { background: var(--sheet); border: 1px solid var(--line); border-radius: 4px; padding: .8rem 1rem;
  overflow-x: auto; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums lining-nums; margin: .8rem 0;
  border-top: 1.5px solid var(--ink); border-bottom: 1.5px solid var(--ink); }
th { text-align: right; font-weight: 600; padding: .35rem .9rem; border-bottom: 1px solid var(--ink);
  vertical-align: bottom; }
td { text-align: right; padding: .22rem .9rem; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: .2rem; }
tbody tr:hover { background: color-mix(in srgb, var(--line) 40%, transparent); }
figure { margin: 2rem 0 2.6rem; }
figure svg { width: 100%; height: auto; display: block; overflow: visible; }
figcaption { font-size: .9rem; line-height: 1.5; max-width: 50rem; margin-top: .7rem; }
figcaption b { margin-right: .35rem; }
footer { margin-top: 4rem; border-top: 1px solid var(--line); padding-top: 1rem; font-size: .85rem;
  color: var(--soft); }
@media print { body { background: none; } main { max-width: none; padding: 0; } figure, table { break-inside: avoid; } }
"""


def page(title: str, about: str, sections: Sequence[tuple[str, str, str]], footer: str) -> str:
    """The page: a title, what it is about, sections (id, heading, HTML), and a footer."""
    links = "".join(f'<a href="#{key}">{escape(heading)}</a>' for key, heading, _ in sections)
    body = "".join(f'<h2 id="{key}">{escape(heading)}</h2>\n{html}\n' for key, heading, html in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # Nothing but what is in the page: a browser refuses, and says so, whatever else it would ask for.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>{_CSS}</style>\n</head>\n'
        "<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="soft">{escape(about)}</p>\n<nav>{links}</nav>\n{body}'
        f"<footer>{escape(footer)}</footer>\n</main>\n</body>\n</html>\n"
    )


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its first column to the left, the others to the right."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def figure(number: int, title: str, caption: str, svg: str, files: Sequence[str]) -> str:
    """A figure with its number and caption, and the names of its files."""
    listed = " · ".join(f"<code>{escape(name)}</code>" for name in files)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
    return (
        f"<figure>{svg}<figcaption><b>Figure {number}. {escape(title)}.</b>{escape(caption)} "
        f'<span class="soft">{listed}</span></figcaption></figure>'
    )


def terms(pairs: Sequence[tuple[str, str]]) -> str:
    """What is what."""
    return "<dl>" + "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in pairs if text) + "</dl>"


def folded(summary: str, text: str) -> str:
    """A text that one unfolds."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
