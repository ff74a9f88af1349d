"""What is drawn while training: each prompt with the size, seed and settings that it is drawn with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lorasmith import prompts
from lorasmith.config import SampleSection
from lorasmith.data import captions
from lorasmith.data.buckets import Size
from lorasmith.data.records import ImageRecord
from lorasmith.data.subsets import Subset
from lorasmith.prompts import Prompt
from lorasmith.sampling import sampler_named

Value = TypeVar("Value")

_NUM_DEFAULT_PROMPTS = 2


@dataclass(frozen=True)
class Drawing:
    """One picture to draw at each moment; `size` in pixels (w, h)."""

    prompt: str
    negative: str
    size: Size
    seed: int
    steps: int
    guidance: float
    sampler: str


def drawings(
    samples: SampleSection, records: Sequence[ImageRecord], subsets: Sequence[Subset], resolution: Size
) -> list[Drawing]:
    """Return what to draw: what a prompt does not say itself is as the options say; seeds count up.

    Raises:
        UserError: a file of prompts or an option in one cannot be used.
    """
    if not (samples.before_after or samples.at_first or samples.sample_every_steps or samples.sample_every_epochs):
        return []
    width, height = samples.sample_size or resolution
    found = []
    for number, prompt in enumerate(_prompts(samples, records, subsets)):
        found.append(
            Drawing(
                prompt=prompt.text,
                negative=_or(prompt.negative, samples.negative),
                size=(_or(prompt.width, width), _or(prompt.height, height)),
                seed=_or(prompt.seed, samples.sample_seed + number),
                steps=_or(prompt.steps, samples.sample_steps),
                guidance=_or(prompt.guidance, samples.guidance),
                sampler=sampler_named(_or(prompt.sampler, samples.sampler)),
            )
        )
    return found


def _prompts(samples: SampleSection, records: Sequence[ImageRecord], subsets: Sequence[Subset]) -> list[Prompt]:
    """Return the prompts that are given, or captions of the training pictures, which have no options."""
    if prompts.is_file(samples.prompts):
        return prompts.read_file(Path(samples.prompts[0]))
    if samples.prompts:
        return [prompts.parse(line) for line in samples.prompts]
    texts = dict.fromkeys(
        captions.plain(record.caption, subsets[record.subset].captions) for record in records if not record.is_prior
    )
    return [Prompt(text) for text in list(texts)[:_NUM_DEFAULT_PROMPTS]]


def _or(value: Value | None, otherwise: Value) -> Value:
    return otherwise if value is None else value


def sample_lines(found: Sequence[Drawing]) -> list[str]:
    """Return a line for each drawing: its prompt, and what sets it apart from the first."""
    if not found:
        return ["none"]
    first = _settings(found[0])
    return [
        ", ".join(
            [f'"{one.prompt}"', *(f"{k} {v}" for k, v in _settings(one).items() if one is found[0] or v != first[k])]
        )
        for one in found
    ]


def _settings(drawing: Drawing) -> dict[str, str]:
    width, height = drawing.size
    return {
        "size": f"{width}x{height}",
        "steps": str(drawing.steps),
        "guidance": f"{drawing.guidance:g}",
        "sampler": drawing.sampler,
        "negative": f'"{drawing.negative}"',
    }
