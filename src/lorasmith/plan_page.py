"""The plan as a page of text: what will happen, before anything is loaded."""

import random
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lorasmith.data import captions
from lorasmith.data.buckets import CropPlan
from lorasmith.data.captions import CaptionOptions
from lorasmith.data.records import ImageRecord
from lorasmith.data.subsets import DatasetRules
from lorasmith.seeds import derive

_NAME_WIDTH, _LINE_WIDTH = 11, 118


def plan_page(title: str, paragraphs: Mapping[str, Sequence[str]]) -> str:
    """Return the page: a name on the left, its lines on the right, wrapped; a name without lines is left out."""
    lines = [title, ""]
    for name, sentences in paragraphs.items():
        wrapped = [part for sentence in sentences for part in _wrap(sentence)]
        lines += [f"{'' if number else name:<{_NAME_WIDTH}}{part}" for number, part in enumerate(wrapped)]
    return "\n".join(lines) + "\n"


def dataset_lines(
    datasets: Sequence[DatasetRules], records: Sequence[ImageRecord], repeats: Sequence[int]
) -> list[str]:
    """Say of which data sets and subsets there is how much, and in which shapes."""
    lines, index = [], 0
    for number, dataset in enumerate(datasets, start=1):
        buckets, (width, height) = dataset.buckets, dataset.resolution
        sides = "" if buckets is None or buckets.no_upscale else f" from {buckets.min_side} to {buckets.max_side}"
        shapes = "no buckets" if buckets is None else f"buckets{sides} in steps of {buckets.step}"
        lines.append(f"data set {number}: {width}x{height}, batch {dataset.batch_size}, {shapes}")
        for subset in dataset.subsets:
            own = [i for i, record in enumerate(records) if record.subset == index]
            kind = ", regularization" if subset.is_prior else ""
            samples = sum(repeats[i] for i in own)
            lines.append(
                f"  {subset.place}{kind}: {_pictures(len(own))} x {subset.repeats}, {samples} samples an epoch"
            )
            index += 1
    return lines


def caption_lines(records: Sequence[ImageRecord], shown: int = 3) -> list[str]:
    """Say which captions are trained: the commonest ones with their counts."""
    counts = Counter(record.caption for record in records)
    lines = [f'"{caption}" ({_pictures(count)})' for caption, count in counts.most_common(shown)]
    return lines + ([f"and {len(counts) - shown} more different captions"] if len(counts) > shown else [])


def caption_rule_lines(records: Sequence[ImageRecord], options: CaptionOptions, shown: int = 3) -> list[str]:
    """Say how captions vary while training, and show what becomes of the longest one; nothing where they do not."""
    lines = []
    if options.dropout:
        lines.append(f"{options.dropout:.4g} of the samples are trained without a caption")
    if options.dropout_every_epochs:
        lines.append(f"every sample of each {options.dropout_every_epochs}. epoch is trained without a caption")
    if options.token_warmup_steps:
        lines.append(
            f"parts of a caption: {options.token_warmup_min} at first, besides those kept in place, and all after "
            f"{options.token_warmup_steps:.4g} steps"
        )
    lasting = replace(options, dropout=0.0, dropout_every_epochs=0, token_warmup_steps=0)
    longest = max((record.caption for record in records), key=len)
    draws = [
        captions.process(longest, lasting, draws=lambda what, n=n: random.Random(derive(n, f"example {what}")))
        for n in range(shown)
    ]
    if draws != [longest] * shown:
        variants = " or ".join(f'"{text}"' for text in dict.fromkeys(draws))
        lines.append(f'"{longest}" becomes, for example, {variants}')
    return lines


def shape_lines(records: Sequence[ImageRecord], crops: Sequence[CropPlan], shown: int = 8) -> list[str]:
    """Say what the pictures are resized and cropped to, and what that costs."""
    shapes = Counter(_shape(crop) for crop in crops)
    lines = [f"{_pictures(count)} as {width}x{height}" for (width, height), count in shapes.most_common(shown)] + (
        [f"and {len(shapes) - shown} more shapes"] if len(shapes) > shown else []
    )
    enlarged = [
        record.path.name for record, crop in zip(records, crops, strict=True) if crop.resize[0] > record.size[0]
    ]
    if enlarged:
        lines.append(f"{_pictures(len(enlarged))} smaller than that and enlarged: {_some(enlarged)}")
    worst = max(range(len(crops)), key=lambda i: crops[i].lost_area)
    if crops[worst].lost_area > 0.005:
        mean = sum(crop.lost_area for crop in crops) / len(crops)
        lines.append(
            f"cropping cuts away {mean:.0%} of the area on average, at most {crops[worst].lost_area:.0%} "
            f"({records[worst].path.name})" + ("; --buckets would cut less" if len(shapes) == 1 and mean > 0.1 else "")
        )
    return lines


def mask_lines(records: Sequence[ImageRecord], background: float, *, by_area: bool) -> list[str]:
    """Say which pictures have masks, how much of these is learned, and how; nothing where there are none."""
    masked = [(record, record.mask) for record in records if record.mask is not None]
    if not masked:
        return []
    without = [record.path.name for record in records if record.mask is None and not record.is_prior]
    origins = dict.fromkeys("their transparency" if mask.path is None else "a file each" for _, mask in masked)
    coverages = [mask.coverage for _, mask in masked]
    least = masked[coverages.index(min(coverages))][0].path.name
    loss = "over each mask's area, so that a small one teaches as much" if by_area else "over all places"
    return [
        f"{len(masked)} of {_pictures(len(masked) + len(without))}, from {' or '.join(origins)}"
        + (f"; all is learned of the other {len(without)}: {_some(without)}" if without else ""),
        f"{sum(coverages) / len(masked):.0%} is learned on average, the least is {min(coverages):.0%} ({least}); "
        f"masked-out places count {background:g}; the loss is the mean {loss}",
    ]


def npz_lines(num_found: int, lacking: Sequence[str], masked: Sequence[str]) -> list[str]:
    """Say how many pictures' latents come from .npz files, which lack a file, and of which it holds a mask."""
    lines = [
        f"{num_found} of {_pictures(num_found + len(lacking))} from .npz files, one frozen draw each; which VAE made "
        "them, from which pixels, is not known"
    ]
    if lacking:
        lines.append(f"encoded, as no .npz file fits: {_some(lacking)}")
    if masked:
        lines.append(f"the alpha_mask in .npz files is not used; --alpha-mask takes the pictures' own: {_some(masked)}")
    return lines


def memory_line(parts: Mapping[str, int]) -> str:
    """Say how many bytes are needed in all and by what."""
    total = sum(parts.values())
    listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items() if size > 2**20)
    return f"about {total / 2**30:.1f} GiB while training" + (f" ({listed})" if listed else "")


def _shape(crop: CropPlan) -> tuple[int, int]:
    left, top, right, bottom = crop.crop
    return right - left, bottom - top


def _pictures(count: int) -> str:
    return f"{count} picture{'' if count == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _wrap(sentence: str) -> list[str]:
    """Break between words only, so that a path can be copied."""
    width = _LINE_WIDTH - _NAME_WIDTH
    return textwrap.wrap(sentence, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False) or [
        ""
    ]
