"""The page of a grid: tables of its pictures, which lie beside the page, and a view of each with the base model's.

Without JavaScript it is a table whose pictures are links.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from lorasmith.data.buckets import Size
from lorasmith.grids import Cell, Heading, Sheet, band_starts, spans

_STYLE = """
:root { color-scheme: light dark; --ink: #28282e; --paper: #fafaf8; --faint: #6c6c74; --rule: #d8d8d2; --cell: 256px }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e2; --paper: #1b1b1e; --faint: #a0a0a8; --rule: #3c3c42 }
}
body { font: 15px/1.4 system-ui, sans-serif; margin: 0; padding: 0 1.5rem 1.5rem; color: var(--ink);
  background: var(--paper); width: max-content; min-width: calc(100% - 3rem) }
header, nav, h2 { position: sticky; left: 1.5rem; width: fit-content; max-width: calc(100vw - 3rem) }
h1 { font-size: 1.4rem; margin: 1.2rem 0 .2rem } h2 { font-size: 1.1rem; margin: 2rem 0 .2rem }
p { color: var(--faint); margin: .2rem 0 } a { color: inherit }
table { border-spacing: 3px; margin-top: .6rem }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
th { font-weight: 400; padding: .25rem .4rem; background: var(--paper); overflow-wrap: anywhere }
thead { position: sticky; top: 0; z-index: 2 }
thead th { vertical-align: bottom } thead .band { border-bottom: 1px solid var(--rule) }
thead td { background: var(--paper); position: sticky; left: 0; z-index: 1 }
tbody th { text-align: left; position: sticky; z-index: 1; max-width: 10rem; box-sizing: border-box }
tbody .band { border-right: 1px solid var(--rule); width: 10rem; min-width: 10rem }
td { padding: 0 } .inner { color: var(--faint) }
.apart-left { padding-left: 12px } .apart-top > * { padding-top: 12px }
td img { display: block; width: var(--cell); height: auto; border-radius: 3px } .small { image-rendering: pixelated }
td a:focus-visible { outline: 3px solid Highlight }
input, button { font: inherit; color: inherit; accent-color: var(--faint) }
dialog { border: 0; padding: 0; margin: 0; width: 100vw; height: 100vh; max-width: none; max-height: none;
  color: #e6e6e2; background: #121214 }
dialog::backdrop { background: #121214 }
#view { display: grid; grid-template-rows: auto 1fr auto; height: 100% }
#view > div { display: flex; flex-wrap: wrap; gap: 1rem; align-items: center; justify-content: center;
  padding: .5rem 1rem }
#view > #stage { position: relative; overflow: auto; display: grid; min-height: 0; padding: 0 }
#stage img { grid-area: 1 / 1; margin: auto; max-width: 100%; max-height: 100%; object-fit: contain; width: 100%;
  height: 100%; min-height: 0 }
#stage.whole img { max-width: none; max-height: none; width: auto; height: auto }
#stage.base #own { visibility: hidden }
#view button { background: #2a2a2e; border: 1px solid #48484e; border-radius: 4px; padding: .2rem .8rem;
  color: inherit }
"""
_SCRIPT = """
'use strict';
(() => {
  const size = document.getElementById('size'), page = document.body;
  document.getElementById('sizes').hidden = false;
  size.addEventListener('input', () => page.style.setProperty('--cell', size.value + 'px'));
  const dialog = document.querySelector('dialog'), stage = document.getElementById('stage');
  const own = document.getElementById('own'), base = document.getElementById('base');
  const note = document.getElementById('note'), share = document.getElementById('share');
  const hold = document.getElementById('hold'), compare = document.getElementById('compare');
  let link = null;
  const cut = () => { own.style.clipPath = 'inset(0 0 0 ' + share.value + '%)'; };
  const show = (to) => {
    link = to;
    const image = to.querySelector('img');
    own.src = to.href;
    own.alt = note.textContent = image.alt;
    own.className = base.className = image.className;
    compare.hidden = base.hidden = !to.dataset.base;
    if (to.dataset.base) base.src = to.dataset.base; else base.removeAttribute('src');
    if (!to.dataset.base) share.value = 0;
    cut();
    if (!dialog.open) dialog.showModal();
  };
  const neighbour = (down, right) => {
    const cell = link.closest('td'), rows = [...cell.closest('tbody').rows];
    const pictures = (row) => [...row.querySelectorAll('td')];
    const row = rows[rows.indexOf(cell.parentNode) + down];
    const other = row && pictures(row)[pictures(cell.parentNode).indexOf(cell) + right];
    return other && other.querySelector('a');
  };
  const go = (down, right) => { const to = neighbour(down, right); if (to) show(to); };
  const holding = (on) => stage.classList.toggle('base', on && !base.hidden);
  document.addEventListener('click', (event) => {
    const to = event.target.closest && event.target.closest('td a');
    if (!to || event.button || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    show(to);
  });
  const keys = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  dialog.addEventListener('keydown', (event) => {
    if (event.key === 'b' || event.key === 'B') holding(true);
    else if (event.key === 'z' || event.key === 'Z') stage.classList.toggle('whole');
    else if (keys[event.key] && event.target !== share) { event.preventDefault(); go(...keys[event.key]); }
  });
  dialog.addEventListener('keyup', (event) => { if (event.key === 'b' || event.key === 'B') holding(false); });
  dialog.addEventListener('close', () => { holding(false); if (link) link.focus(); });
  for (const name of ['pointerup', 'pointerleave', 'pointercancel']) hold.addEventListener(name, () => holding(false));
  hold.addEventListener('pointerdown', () => holding(true));
  stage.addEventListener('click', () => stage.classList.toggle('whole'));
  share.addEventListener('input', cut);
  for (const button of dialog.querySelectorAll('[data-go]'))
    button.addEventListener('click', () => go(...button.dataset.go.split(',').map(Number)));
  document.getElementById('close').addEventListener('click', () => dialog.close());
})();
"""
_DIALOG = """<dialog aria-label="One picture"><div id="view">
<div><span id="note"></span></div>
<div id="stage"><img id="base" alt="the same with the base model"><img id="own" alt=""></div>
<div><button data-go="0,-1" aria-label="picture on the left">&larr;</button>
<button data-go="-1,0" aria-label="picture above">&uarr;</button>
<button data-go="1,0" aria-label="picture below">&darr;</button>
<button data-go="0,1" aria-label="picture on the right">&rarr;</button>
<span id="compare"><button id="hold">hold for the base model (B)</button>
<label>base model <input id="share" type="range" min="0" max="100" value="0"></label></span>
<button id="close">close (Esc)</button></div>
</div></dialog>
"""
_HELP = "A click shows a picture whole; arrow keys go to those around it, Z shows one pixel as one."
_HELP_WITH_BASE = " B, or the slider, shows what the base model makes of the same prompt and seed."
_SMALL = 256  # pixels of a side up to which single ones are shown
_HEADING_WIDTH = 10  # rem, as in the style


@dataclass(frozen=True)
class Shown:
    """A picture of the page: its file, by its path from the page, its size and what it is, in words."""

    file: str
    size: Size
    words: str


def grid_page(title: str, facts: Sequence[str], sheets: Sequence[Sheet], pictures: Mapping[Cell, Shown]) -> str:
    """Return the page.

    Args:
        facts: what all pictures have in common, a line each.
        pictures: of all cells; where the base model's are among them, the others are compared with these.
    """
    shown = min(max(max(one.size[0] for one in pictures.values()), 160), 256)
    names = [" · ".join(label.text for label in sheet.title) for sheet in sheets]
    sections = [
        _section(i, name, sheet, pictures, is_named=name != title)
        for i, (name, sheet) in enumerate(zip(names, sheets, strict=True), 1)
    ]
    has_base = any(cell.lora is None for cell in pictures)
    links = "".join(f'<li><a href="#sheet-{i}">{name}</a></li>' for i, name in enumerate(map(html.escape, names), 1))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head>
<body style="--cell: {shown}px">
<header><h1>{html.escape(title)}</h1>
{"".join(f"<p>{html.escape(fact)}</p>" for fact in facts)}
<p>{_HELP}{_HELP_WITH_BASE if has_base else ""}</p>
<p id="sizes" hidden><label>size <input id="size" type="range" min="64" max="768" value="{shown}"></label></p>
</header>
{f"<nav aria-label='Sheets'><ol>{links}</ol></nav>" if len(sheets) > 1 else ""}
{"".join(sections)}
{_DIALOG}<script>{_SCRIPT}</script>
</body></html>
"""


def _section(number: int, name: str, sheet: Sheet, pictures: Mapping[Cell, Shown], *, is_named: bool) -> str:
    lefts, tops = set(band_starts(sheet.columns)), set(band_starts(sheet.rows))
    bands = [_row_headings(sheet.rows, level) for level in range(len(sheet.rows[0]))]
    rows = []
    for i, row in enumerate(sheet.cells):
        cells = "".join(_cell(one, pictures, is_apart=j in lefts) for j, one in enumerate(row))
        kind = ' class="apart-top"' if i in tops else ""
        rows.append(f"<tr{kind}>{''.join(band.get(i, '') for band in bands)}{cells}</tr>\n")
    return f"""<section id="sheet-{number}">{f"<h2>{html.escape(name)}</h2>" if is_named else ""}
<table><caption>{html.escape(name)}</caption>{_column_headings(sheet, lefts)}
<tbody>
{"".join(rows)}</tbody></table></section>
"""


def _column_headings(sheet: Sheet, lefts: set[int]) -> str:
    depth = len(sheet.columns[0])
    if not depth:
        return ""
    corner = f'<td rowspan="{depth}" colspan="{len(sheet.rows[0])}"></td>' if sheet.rows[0] else ""
    lines = []
    for level in range(depth):
        found = [
            _heading(sheet.columns[begin], level, "col", count, is_apart=begin in lefts)
            for begin, count in spans(sheet.columns, level)
        ]
        lines.append(f"<tr>{'' if level else corner}{''.join(found)}</tr>\n")
    return f"<thead>\n{''.join(lines)}</thead>"


def _row_headings(headings: Sequence[Heading], level: int) -> dict[int, str]:
    """Return a level's headings by the row in which they begin."""
    return {begin: _heading(headings[begin], level, "row", count) for begin, count in spans(headings, level)}


def _heading(heading: Heading, level: int, side: str, count: int, *, is_apart: bool = False) -> str:
    """Return the heading of a band or of one column or row; where what follows is nothing, it reaches that far."""
    label, rest = heading[level], heading[level + 1 :]
    if level and not label.text:
        return ""
    is_band = any(one.text for one in rest)
    reach = 1 if is_band else 1 + len(rest)
    along, across = ("colspan", "rowspan") if side == "col" else ("rowspan", "colspan")
    kinds = [kind for kind, is_so in (("band", is_band), ("inner", level), ("apart-left", is_apart)) if is_so]
    facts = [
        f'scope="{side}{"group" if is_band else ""}"',
        *([f'class="{" ".join(kinds)}"'] if kinds else []),
        *([f'{along}="{count}"'] if count > 1 else []),
        *([f'{across}="{reach}"'] if reach > 1 else []),
        *([f'style="left: {level * _HEADING_WIDTH}rem"'] if side == "row" else []),
    ]
    return f"<th {' '.join(facts)}>{html.escape(label.text)}</th>"


def _cell(cell: Cell, pictures: Mapping[Cell, Shown], *, is_apart: bool) -> str:
    one, base = pictures[cell], pictures.get(Cell(cell.prompt, cell.seed, None, None))
    compared = f' data-base="{_url(base.file)}"' if base is not None and base != one else ""
    width, height = one.size
    kind = ' class="small"' if max(one.size) <= _SMALL else ""
    size = f'width="{width}" height="{height}"{kind}'
    image = f'<img src="{_url(one.file)}" alt="{html.escape(one.words)}" {size} loading="lazy">'
    apart = ' class="apart-left"' if is_apart else ""
    return f'<td{apart}><a href="{_url(one.file)}"{compared}>{image}</a></td>'


def _url(file: str) -> str:
    return html.escape(quote(file))
