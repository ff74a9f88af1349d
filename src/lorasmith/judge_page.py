"""The page that `lorasmith judge` writes: what is recommended and why, all scores, and the pictures, in one file."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lorasmith.judging import NAMES, Candidate
from lorasmith.picture_scores import COPY, Reference, overall, shares

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem; color: #28282e; background: #fafaf8 }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
p, dl { max-width: 60rem } dt { font-weight: 600 } dd { margin: 0 0 .5rem 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem }
td, th { text-align: left; padding: .25rem .8rem .25rem 0; vertical-align: top; border-bottom: 1px solid #e4e4de }
.scores td + td { font-variant-numeric: tabular-nums }
.best { background: #e3efe9 } .best td:first-child { font-weight: 600 }
.faint { color: #78788a; font-size: .8rem }
.alert { color: #b02020; font-size: .8rem }
.sheet td, .sheet th { padding: .3rem; border: 0 }
.sheet th:first-child { position: sticky; left: 0; background: #fafaf8; min-width: 8rem; max-width: 14rem }
.sheet thead th { max-width: 14rem; font-weight: 400 }
img { width: 160px; border-radius: 6px; display: block }
.pairs { display: flex; flex-wrap: wrap; gap: 1.2rem }
.pair { display: flex; gap: .2rem; flex-wrap: wrap; width: 324px }
"""
_MEANINGS = {
    "likeness": "Cosine of its pictures with the training pictures, the mean of all pairs. Higher is more alike.",
    "adherence": "How well its pictures show their prompts. Compare it with the base model's, not with 1.",
    "diversity": "How far pictures of the same prompt lie apart. 0: every seed gives the same picture.",
    "copying": "Share of its pictures that are nearer to a training picture than half of what lies between these.",
    "damage": "How far pictures of unrelated prompts moved from the base model's of the same seed. 0: not at all.",
}


@dataclass(frozen=True)
class Shown:
    """A picture on the page. url: small, as a `data:` URL. file: the whole one, beside the page. note: stands below."""

    url: str
    file: str
    note: str
    is_alert: bool = False


@dataclass(frozen=True)
class Row:
    """The pictures of the base model (`candidate` is None) or of a LoRA at a strength, in the columns' order.

    nearest: pairs of a picture and the training picture that it is nearest to, the nearest first.
    """

    candidate: Candidate | None
    pictures: Sequence[Shown]
    unrelated: Sequence[Shown]
    nearest: Sequence[tuple[Shown, Shown]] = field(default_factory=list)


def judge_page(
    verdict: str,
    best: Candidate | None,
    reference: Reference,
    notes: Sequence[str],
    columns: Sequence[str],
    unrelated_columns: Sequence[str],
    rows: Sequence[Row],
) -> str:
    """Return the page.

    Args:
        notes: what was judged and by what, a line each.
        columns, unrelated_columns: what stands above the pictures: prompt and seed.
        rows: the base model's first.
    """
    candidates = [row.candidate for row in rows if row.candidate is not None]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>lorasmith judge</title><style>{_STYLE}</style></head><body>
<h1>Which LoRA?</h1>
<p><strong>{html.escape(verdict)}</strong></p>
{"".join(f'<p class="faint">{html.escape(note)}</p>' for note in notes)}
<h2>Scores</h2><div class="wide">{_scores(candidates, best, reference)}</div>
<dl>{"".join(f"<dt>{name}</dt><dd>{_MEANINGS[name]}</dd>" for name in NAMES)}
<dt>overall</dt><dd>Product of what each score is worth, 0 to 1 (in small print below it); a rule of thumb, no
measurement: look at the pictures.</dd></dl>
<h2>Pictures</h2><p>Same prompt and same noise in each column. A click shows the whole picture.</p>
{_sheet(columns, [(_name(row), row.pictures) for row in rows])}
<h2>Unrelated prompts</h2><p>What the LoRA was not trained for should stay as the base model draws it.</p>
{_sheet(unrelated_columns, [(_name(row), row.unrelated) for row in rows])}
<h2>Nearest training pictures</h2><p>Left what was drawn, right the training picture that it is nearest to. 1 is as
near as training pictures commonly are to each other; below {COPY:g} counts as a copy.</p>
{"".join(_pairs(_name(row), row.nearest) for row in rows if row.nearest)}
</body></html>
"""


def score_table(candidates: Sequence[Candidate], best: Candidate | None, reference: Reference) -> list[str]:
    """Return the scores as lines of text; the base model's first, and a star at what is recommended."""
    rows = [("base model", _cells(reference.base), "")]
    rows += [(one.name, _cells(one.scores), f"{overall(one.scores, reference):.3f}") for one in candidates]
    width = max(len(name) for name, _, _ in rows)
    lines = ["  ".join([" " * width, *(f"{name:>9}" for name in (*NAMES, "overall"))])]
    for (name, cells, total), one in zip(rows, [None, *candidates], strict=True):
        mark = " *" if best is not None and one is best else ""
        lines.append("  ".join([f"{name:<{width}}", *(f"{cell:>9}" for cell in (*cells, total))]) + mark)
    return [line.rstrip() for line in lines]


def _cells(scores: object) -> list[str]:
    values = [getattr(scores, name) for name in NAMES]
    return ["-" if value is None else f"{value:.3f}" for value in values]


def _name(row: Row) -> str:
    return "base model" if row.candidate is None else row.candidate.name


def _scores(candidates: Sequence[Candidate], best: Candidate | None, reference: Reference) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("", *NAMES, "overall"))
    rows = [_score_row("base model", _cells(reference.base), {}, "", is_best=False)]
    for one in candidates:
        worth, total = shares(one.scores, reference), f"{overall(one.scores, reference):.3f}"
        rows.append(_score_row(one.name, _cells(one.scores), worth, total, is_best=one is best))
    return f'<table class="scores"><thead><tr>{head}</tr></thead>{"".join(rows)}</table>'


def _score_row(name: str, cells: Sequence[str], worth: Mapping[str, float], total: str, *, is_best: bool) -> str:
    texts = [
        f'{cell}<br><span class="faint">{worth[score]:.2f}</span>' if score in worth else cell
        for score, cell in zip(NAMES, cells, strict=True)
    ]
    kind = ' class="best"' if is_best else ""
    return f"<tr{kind}><td>{html.escape(name)}</td>{''.join(f'<td>{text}</td>' for text in (*texts, total))}</tr>"


def _sheet(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Shown]]]) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in ("", *columns))
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{_figure(one)}</td>' for one in pictures)}</tr>"
        for name, pictures in rows
    )
    return f'<div class="wide"><table class="sheet"><thead><tr>{head}</tr></thead>{body}</table></div>'


def _pairs(name: str, pairs: Sequence[tuple[Shown, Shown]]) -> str:
    shown = "".join(f'<div class="pair">{_figure(drawn)}{_figure(training)}</div>' for drawn, training in pairs)
    return f'<h3>{html.escape(name)}</h3><div class="pairs">{shown}</div>'


def _figure(one: Shown) -> str:
    kind, image = "alert" if one.is_alert else "faint", f'<img src="{one.url}" alt="{html.escape(one.note)}">'
    linked = f'<a href="{html.escape(one.file)}">{image}</a>' if one.file else image
    return f'<div>{linked}<span class="{kind}">{html.escape(one.note)}</span></div>'
