"""What is drawn while training: each prompt with the size, seed and settings that it is drawn with."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lorasmith import prompts
from lorasmith.config import SampleSection
from lorasmith.data import captions
from lorasmith.data.buckets import Size
from lorasmith.data.records import ImageRecord
from lorasmith.data.subsets import Subset
from lorasmith.prompts import Prompt
from lorasmith.sampling import Drawing

_NUM_DEFAULT_PROMPTS = 2


def drawings(
    samples: SampleSection, records: Sequence[ImageRecord], subsets: Sequence[Subset], resolution: Size
) -> list[Drawing]:
    """Return what to draw: what a prompt does not say itself is as the options say; seeds count up.

    Raises:
        UserError: a file of prompts or an option in one cannot be used.
    """
    if not (samples.before_after or samples.at_first or samples.sample_every_steps or samples.sample_every_epochs):
        return []
    usual = Drawing(
        prompt="",
        negative=samples.negative,
        size=samples.sample_size or resolution,
        seed=samples.sample_seed,
        steps=samples.sample_steps,
        guidance=samples.guidance,
        sampler=samples.sampler,
    )
    return [
        replace(usual, seed=samples.sample_seed + number).asked(prompt)
        for number, prompt in enumerate(_prompts(samples, records, subsets))
    ]


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
