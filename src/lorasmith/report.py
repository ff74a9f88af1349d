"""The report of a run: one folder with a page, the loss curve, samples before and after, and what was learned where."""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from lorasmith.sheets import sheet

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #28282e; background: #fafaf8 }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2.2rem } img { max-width: 100%; border-radius: 6px }
table { border-collapse: collapse; font-size: .9rem }
td, th { text-align: left; padding: .25rem .8rem .25rem 0; vertical-align: top; border-bottom: 1px solid #e4e4de }
code { background: #eeeee8; padding: .1rem .3rem; border-radius: 4px; overflow-wrap: anywhere }
.settings { columns: 2; column-gap: 2rem }
.settings table { width: 100%; break-inside: avoid; margin-bottom: 1rem }
"""
_ON_LOSSES = (
    "Diffusion losses are noisy: each step sees other noise levels. Look at the trend, and judge by the samples."
)
_ON_VALIDATION = (
    " The held-out pictures are measured with the same noise every time: where their loss begins to rise while the "
    "other still falls, the pictures are being learned by heart, and an earlier file may be the better one."
)

_SCORES = ("likeness", "adherence", "diversity", "copying")
_ON_SCORES = (
    "By the judge, beside the training pictures and what the untrained model draws (step 0), whose score is 0. Higher "
    "is better, but for copying; a rule of thumb: look at the samples."
)
_RATES = '<h2>Learning rate</h2><img src="rates.svg" alt="learning rate over steps">\n'
_NUM_NAMED, _NUM_LISTED = 8, 30  # held-out pictures named in the chart, and in the table


@dataclass(frozen=True)
class ReportContents:
    """What a report shows.

    summary: plain sentences for the top. settings: section -> option -> value. losses: (step, loss), steps from 1.
    before, after: pictures of `prompts` without and with the LoRA, in their order. norms: module name -> Frobenius
    norm of its delta, where that is known. files: (file name, what it is for). validation: (step, loss) of the
    held-out pictures.
    scores: of the samples, a line for each moment with its `step`, `score` and what this is made of.
    pictures: (step, loss) of each of these, by its name. rates: (step, learning rate) of what learns at it, by name.
    """

    title: str
    summary: Sequence[str]
    settings: Mapping[str, Mapping[str, object]]
    losses: Sequence[tuple[int, float]]
    norms: Mapping[str, float]
    files: Sequence[tuple[str, str]]
    validation: Sequence[tuple[int, float]] = field(default_factory=list)
    pictures: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    scores: Sequence[Mapping[str, float]] = field(default_factory=list)
    rates: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    prompts: Sequence[str] = field(default_factory=list)
    before: Sequence[Image.Image] = field(default_factory=list)
    after: Sequence[Image.Image] = field(default_factory=list)


def write_report(folder: Path, contents: ReportContents) -> Path:
    """Write the report into `folder` and return its page, `index.html`."""
    folder.mkdir(parents=True, exist_ok=True)
    _draw_losses(folder / "loss.png", contents.losses, contents.validation)
    if contents.pictures:
        _draw_pictures(folder / "held-out.png", contents.pictures)
    if contents.rates:
        _draw_rates(folder / "rates.svg", contents.rates)
    if contents.norms:
        draw_norms(folder / "norms.png", norms_by_block(contents.norms))
    if contents.after:
        rows = [("before", contents.before)] if contents.before else []
        sheet(contents.prompts, [*rows, ("after", contents.after)]).save(folder / "samples.png")
    page = folder / "index.html"
    page.write_text(_page(contents), encoding="utf-8")
    return page


def norms_by_block(norms: Mapping[str, float]) -> dict[str, float]:
    """Join modules' delta norms into their blocks': the root of the sum of squares.

    A block is a text-encoder layer (`text 3`), or a resnet of the U-Net with the attention behind it (`down 1.0`,
    `mid`, `up 3.2`), the sampler being the last of its level (`down 1.2`, `up 1.2`). All other layers are `others`.
    """
    squares: dict[str, float] = {}
    for name, norm in norms.items():
        block = _block_of(name)
        squares[block] = squares.get(block, 0.0) + norm**2
    return {block: square**0.5 for block, square in sorted(squares.items(), key=lambda item: _block_order(item[0]))}


def smooth(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Return the exponential moving average, corrected for its start (Kingma and Ba 2014, section 3)."""
    average, smoothed = 0.0, []
    for count, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return smoothed


_IN_BLOCK = re.compile(
    r"lora_(?:te\d?_text_model_encoder_layers_(?P<text>\d{1,3})|unet_(?P<mid>mid)_block|"
    r"unet_(?P<side>down|up)_blocks_(?P<level>\d{1,3})_"
    r"(?:(?:attentions|resnets)_(?P<place>\d{1,3})|(?:down|up)samplers_0))_",
    re.ASCII,
)
_SAMPLER = 2  # an upsampler stands behind three resnets, as part of the last; a downsampler behind two
_SIDES = ["text", "down", "mid", "up", "others"]


def _block_of(name: str) -> str:
    found = _IN_BLOCK.match(name)
    if found is None:
        return "others"
    if found["text"]:
        return f"text {found['text']}"
    return found["mid"] or f"{found['side']} {found['level']}.{found['place'] or _SAMPLER}"


def _block_order(block: str) -> tuple[int, list[int]]:
    side, _, place = block.partition(" ")
    return _SIDES.index(side), [int(number) for number in place.split(".") if number]


def _draw_losses(path: Path, losses: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]] = ()) -> None:
    figure, axes = _figure(9, 3.2)
    steps, values = [step for step, _ in losses], [loss for _, loss in losses]
    axes.plot(steps, values, color="#c9c9c0", linewidth=0.7, label="each step")
    axes.plot(steps, smooth(values), color="#2f6f6f", linewidth=1.8, label="smoothed")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="#b9772f", linewidth=1.8, marker=".", label="held-out pictures")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    figure.savefig(path)


def _draw_pictures(path: Path, pictures: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    figure, axes = _figure(9, 3.2)
    worst = _by_rise(pictures)[:_NUM_NAMED]
    for name in sorted(pictures, key=lambda name: name in worst):  # the named ones on top
        label = {"label": name.replace("$", r"\$").lstrip("_")} if name in worst else {}  # as matplotlib wants it
        axes.plot(*zip(*pictures[name], strict=True), linewidth=1.4 if label else 0.7, marker=".",
                  **(label or {"color": "#c9c9c0"}))  # fmt: skip
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)


def _draw_rates(path: Path, rates: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    figure, axes = _figure(9, 2.2)
    for name, rate in rates.items():
        axes.plot(*zip(*rate, strict=True), linewidth=1.8, label=name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, metadata={"Date": None})


def _by_rise(pictures: Mapping[str, Sequence[tuple[int, float]]]) -> list[str]:
    """Return the pictures' names: first those whose loss rose most from its lowest value to the last one."""

    def rise(name: str) -> float:
        losses = [loss for _, loss in pictures[name]]
        return losses[-1] - min(losses)

    return sorted(pictures, key=rise, reverse=True)


def draw_norms(path: Path, blocks: Mapping[str, float]) -> None:
    """Draw a bar for each block's norm into a picture."""
    figure, axes = _figure(9, 3.2)
    colors = ["#b9772f" if block.startswith("text") else "#2f6f6f" for block in blocks]
    axes.bar(range(len(blocks)), list(blocks.values()), color=colors)
    axes.set_xticks(range(len(blocks)), list(blocks), rotation=90, fontsize=8)
    axes.set_ylabel("norm of the update")
    figure.savefig(path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # Imported here: it takes half a second that a run only spends at its end. The Figure class draws without a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


_NORMS = """<h2>What was learned where</h2>
<p>Norm of the weight update per block (text encoder, then U-Net). All zero means nothing was learned.</p>
<img src="norms.png" alt="norm of the update per block">
"""


def _page(contents: ReportContents) -> str:
    samples = (
        '<h2>Samples</h2><p>Same prompt and same noise in each column.</p><img src="samples.png" alt="samples">'
        if contents.after
        else ""
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(contents.title)}</title>
<style>{_STYLE}</style></head><body>
<h1>{html.escape(contents.title)}</h1>
{"".join(f"<p>{html.escape(line)}</p>" for line in contents.summary)}
<h2>Which file to use where</h2>{_table(contents.files)}
{samples}{_scores(contents.scores)}
<h2>Loss</h2>
<p>{_ON_LOSSES}{_ON_VALIDATION if contents.validation else ""}</p>
<img src="loss.png" alt="loss over steps">
{_held_out(contents.pictures)}{_RATES if contents.rates else ""}{_NORMS if contents.norms else ""}
<h2>Settings</h2><div class="settings">{"".join(_section(*section) for section in contents.settings.items())}</div>
</body></html>
"""


def _scores(lines: Sequence[Mapping[str, float]]) -> str:
    if not lines:
        return ""
    names = [name for name in ("score", *_SCORES) if name in lines[-1]]
    rows = [
        (f"step {line['step']}", ", ".join(f"{name} {line[name]:.3f}" for name in names if name in line))
        for line in lines
    ]
    return f"<h2>Scores of the samples</h2><p>{_ON_SCORES}</p>{_table(rows)}\n"


def _held_out(pictures: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    if not pictures:
        return ""
    rows = []
    for name in _by_rise(pictures)[:_NUM_LISTED]:
        lowest = min(pictures[name], key=lambda one: one[1])
        first, last = pictures[name][0], pictures[name][-1]
        text = f"{first[1]:.4f} at first, lowest {lowest[1]:.4f} after step {lowest[0]}, {last[1]:.4f} at last"
        rows.append((name, text))
    rest = len(pictures) - len(rows)
    more = f"<p>And {rest} more: logs/validation.jsonl.</p>" if rest else ""
    return (
        "<h2>Each held-out picture</h2><p>Those whose loss rose most since it was lowest come first.</p>"
        f'<img src="held-out.png" alt="loss of each held-out picture">{_table(rows)}{more}\n'
    )


def _section(name: str, options: Mapping[str, object]) -> str:
    return f"<table><tr><th colspan=2>{html.escape(name)}</th></tr>{_rows(list(options.items()))}</table>"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return f"<table>{_rows(rows)}</table>"


def _rows(rows: Sequence[tuple[str, object]]) -> str:
    return "".join(
        f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(str(value))}</td></tr>" for name, value in rows
    )
