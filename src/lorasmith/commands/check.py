"""`lorasmith check`: find what is wrong with a folder of pictures and captions, before any training.

    lorasmith check photos

Reads every picture once, gathers facts, and hands them to the rules in `data/quality.py`. Nothing is changed; `--fix`
writes a repaired copy into a new folder.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, TypeVar

from PIL import Image
from tqdm import tqdm

from lorasmith.command_line import quoted
from lorasmith.config import CheckConfig
from lorasmith.data import inspection, masks, repair
from lorasmith.data.buckets import Buckets, CropPlan
from lorasmith.data.caption_files import DEFAULT_EXTENSIONS, CaptionFiles, accepted_extensions, read_caption_files
from lorasmith.data.gathering import plan_crops
from lorasmith.data.images import (
    UnreadablePicture,
    extensions,
    folders_within,
    foreign_pictures_in,
    open_image,
    pictures_in,
    require_folder,
)
from lorasmith.data.mask_files import MaskLook, Matches
from lorasmith.data.quality import (
    SEVERITIES,
    Facts,
    Finding,
    Group,
    Picture,
    PictureMask,
    Wishes,
    duplicates,
    find_all,
    strays,
)
from lorasmith.data.records import ImageRecord
from lorasmith.data.sources import metadata_json
from lorasmith.data.sources.folder import Part, find_parts, nothing_found
from lorasmith.data.subsets import Augmentation, DatasetRules, Subset
from lorasmith.errors import UserError
from lorasmith.models import tokenizer
from lorasmith.plan_page import shape_lines
from lorasmith.sheets import Entry, contact_sheet, crop_view, tinted

EXIT_CODES = {"error": 2, "warning": 1, "hint": 0}
_TITLES = {
    "error": "Errors: training would stop",
    "warning": "Warnings: the result would suffer, or pictures be left out",
    "hint": "Hints: perhaps meant so",
}
_NUM_EXAMPLES = 3
_PER_SHEET = 240
_SHEET_KINDS = (".png", ".jpg", ".jpeg", ".webp")

_Given = TypeVar("_Given")
_Made = TypeVar("_Made")
Looks = dict[Path, inspection.Look]


def run(cfg: CheckConfig) -> int:
    """Look through the folder, tell what was found, and return the exit code: 2 errors, 1 warnings, 0 neither."""
    if cfg.folder is None:
        raise UserError("missing: DIR, the folder of pictures. For example: lorasmith check photos")
    require_folder(cfg.folder)
    _check_outputs(cfg, cfg.folder)
    if cfg.captions is None:
        parts, _ = find_parts(cfg.folder, cfg.caption, 1, recursive=cfg.recursive)
        accepted = accepted_extensions(cfg.caption_extension)
        captions = [read_caption_files(part.folder, part.pictures, accepted) for part in parts]
        facts, looks = examine(cfg.folder, parts, captions, accepted)
    else:
        facts, looks = examine_metadata(cfg.folder, cfg.captions, cfg.caption)
    facts = with_masks(facts, cfg.masks, is_alpha=cfg.alpha_mask)
    wishes = Wishes(cfg.resolution, count_tokens, cfg.trigger, cfg.caption, cfg.max_token_length)
    findings = find_all(facts, wishes)
    code = max((EXIT_CODES[finding.severity] for finding in findings), default=0)
    told = [] if cfg.json_file == "-" else [page(facts, findings, num_examples=None if cfg.every else _NUM_EXAMPLES)]
    if cfg.json_file is not None:
        text = json.dumps(as_json(facts, findings, code), indent=2, ensure_ascii=False)
        if cfg.json_file == "-":
            print(text)
        else:
            Path(cfg.json_file).expanduser().write_text(text + "\n", encoding="utf-8")
    if cfg.sheet is not None:
        told += [f"contact sheet   {path}" for path in write_sheets(cfg.sheet, facts, findings)]
    if cfg.preview is not None:
        told += write_preview(cfg, cfg.preview, facts)
    if cfg.fix is not None:
        told.append(write_copy(cfg.fix, facts, looks))
    if cfg.json_file != "-":
        print("\n".join(told))
    return code


def _check_outputs(cfg: CheckConfig, folder: Path) -> None:
    """Refuse outputs that cannot be written, or that would lie among the pictures; before anything is read."""
    json_path = None if cfg.json_file in (None, "-") else Path(cfg.json_file).expanduser()
    outputs = {"--json": json_path, "--sheet": cfg.sheet, "--preview": cfg.preview, "--fix": cfg.fix}
    for flag, path in outputs.items():
        if path is None:
            continue
        if path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{flag} {path} lies in {folder} itself, where nothing is changed; give another place.")
        if flag != "--fix" and (path.is_dir() or not path.absolute().parent.is_dir()):
            reason = "this is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise UserError(f"{flag} {path}: {reason}; give the path of a file that may be written.")
    for flag, path in {"--sheet": cfg.sheet, "--preview": cfg.preview}.items():
        if path is not None and path.suffix.lower() not in _SHEET_KINDS:
            raise UserError(f"{flag} {path}: expected a name that ends with {', '.join(_SHEET_KINDS)}.")
    if cfg.fix is not None:
        repair.require_new(cfg.fix)


# ---- facts ---------------------------------------------------------------------------------------------------------


def examine(
    folder: Path, parts: Sequence[Part], captions: Sequence[CaptionFiles], accepted: Sequence[str]
) -> tuple[Facts, Looks]:
    """Read everything in a folder and return what is known of it.

    Args:
        parts, captions: the folders whose pictures are trained, and what the text files in each of them say.

    Raises:
        UserError: there is nothing that could be meant as a picture.
    """
    used = {picture for part in parts for picture in part.pictures}
    places = folders_within(folder)
    unused = [path for place in places for path in pictures_in(place) if path not in used]
    foreign = [path for place in places for path in foreign_pictures_in(place)]
    if not (used or unused or foreign):
        raise UserError(nothing_found(folder))
    everything = [*used, *unused]
    looked_at = dict(zip(everything, _in_threads(_inspect, everything, "reading"), strict=True))
    looks = {path: look for path, look in looked_at.items() if isinstance(look, inspection.Look) and path in used}
    pictures: list[Picture] = []
    stray_captions: dict[Path, Path] = {}
    office_files: dict[Path, Path] = {}
    for part, found in zip(parts, captions, strict=True):
        group = Group(part.folder, part.name, part.repeats, part.fallback if part.is_dreambooth else None)
        pictures += [_picture(path, group, looked_at[path], found) for path in part.pictures]
        texts, office = _strays(part, found)
        stray_captions |= texts
        office_files |= office
    groups = list(dict.fromkeys(picture.group for picture in pictures))
    alike = _alike(pictures, looks)
    return (
        Facts(
            folder, groups, pictures, captions, accepted, foreign, unused, stray_captions, office_files, alike,
            unused_details=_details_of_unused(folder, unused, looked_at),
        ),
        looks,
    )  # fmt: skip


def _details_of_unused(
    folder: Path, unused: Sequence[Path], looked_at: Mapping[Path, inspection.Look | UnreadablePicture]
) -> dict[Path, str]:
    """Return what is wrong with pictures besides that they are not used: broken, or copies of one met before."""
    details: dict[Path, str] = {}
    first: dict[str, Path] = {}
    left = set(unused)
    for path, look in looked_at.items():
        if isinstance(look, UnreadablePicture):
            details[path] = f"cannot be read: {look.reason}"
        elif (earlier := first.setdefault(look.content_hash, path)) != path:
            details[path] = f"the same file as {earlier.relative_to(folder).as_posix()}"
    return {path: detail for path, detail in details.items() if path in left}


def examine_metadata(folder: Path, metadata: Path, default_caption: str | None) -> tuple[Facts, Looks]:
    """Return what is known of the pictures that a metadata file names in a folder.

    Raises:
        UserError: it is broken, or names none of them.
    """
    texts = metadata_json.captions_of(metadata, folder)
    part = Part(folder, folder.resolve().name, 1, default_caption, False, sorted(texts))
    given = CaptionFiles(first_lines={path: text for path, text in texts.items() if text})
    facts, looks = examine(folder, [part], [given], DEFAULT_EXTENSIONS)
    return replace(facts, metadata=metadata, stray_captions={}, office_files={}), looks


def with_masks(facts: Facts, folder: Path | None, *, is_alpha: bool) -> Facts:
    """Return the facts with what is known of the pictures' masks, in a folder or in their transparency, if asked for.

    Raises:
        UserError: both are asked for; there is no such folder, or it holds the pictures too.
    """
    if folder is None and not is_alpha:
        return facts
    if folder is not None and is_alpha:
        raise UserError("--masks and --alpha-mask both say which places are learned; leave out one of them.")
    matches = Matches({}, (), {})
    paths: dict[Path, Path | None] = {picture.path: None for picture in facts.readable if picture.has_transparency}
    if folder is not None:
        matches = masks.match_files(folder, facts.folder, [picture.path for picture in facts.pictures])
        paths = {path: mask for path, mask in matches.of.items() if path not in matches.doubtful}
    with_mask = [picture for picture in facts.readable if picture.path in paths]
    found = _in_threads(lambda picture: _mask(picture, paths[picture.path]), with_mask, "reading masks")
    mask_of = {picture.path: mask for picture, mask in zip(with_mask, found, strict=True)}
    return replace(
        facts,
        pictures=[replace(picture, mask=mask_of.get(picture.path)) for picture in facts.pictures],
        has_masks=True,
        unused_masks=matches.unused,
        doubtful_masks=matches.doubtful,
    )


def _mask(picture: Picture, path: Path | None) -> PictureMask:
    try:
        return PictureMask(path, _open_mask(picture, path)[1])
    except UnreadablePicture as error:
        return PictureMask(path, None, error.reason)


def _open_mask(picture: Picture, path: Path | None) -> tuple[Image.Image, MaskLook]:
    record = ImageRecord(picture.path, "", picture.size)
    return masks.look_at_alpha(record) if path is None else masks.look_at(path)


def count_tokens(texts: Sequence[str]) -> list[int]:
    """Return how many tokens the text encoder would be given of each text, without start and end."""
    return [len(ids) - 2 for ids in tokenizer.build()(list(texts))["input_ids"]] if texts else []


def _inspect(path: Path) -> inspection.Look | UnreadablePicture:
    try:
        return inspection.inspect(path)
    except UnreadablePicture as error:
        return error


def _in_threads(function: Callable[[_Given], _Made], values: Sequence[_Given], title: str) -> list[_Made]:
    """Return what a function makes of each value; Pillow lets other threads run while it decodes."""
    with ThreadPoolExecutor(_num_threads()) as pool:
        return list(tqdm(pool.map(function, values), total=len(values), desc=title, disable=None, leave=False))


def _num_threads() -> int:
    return min(8, os.cpu_count() or 1)


def _picture(path: Path, group: Group, look: inspection.Look | UnreadablePicture, captions: CaptionFiles) -> Picture:
    caption, file = captions.first_lines.get(path), captions.files.get(path)
    if isinstance(look, UnreadablePicture):
        return Picture(path, group, problem=look.reason, caption=caption, caption_file=file)
    return Picture(
        path, group, "", look.size, look.content_hash, look.sharpness, look.has_transparency, look.num_frames,
        caption, file,
    )  # fmt: skip


def _strays(part: Part, captions: CaptionFiles) -> tuple[dict[Path, Path], dict[Path, Path]]:
    read = set(captions.files.values())
    files = [path for path in part.folder.iterdir() if path not in read and path.name[0] != "." and path.is_file()]
    return strays(files, [path for path in part.pictures if path not in captions.files], extensions())


def _alike(pictures: Sequence[Picture], looks: Looks) -> dict[Path, Path]:
    copies = duplicates(pictures)
    paths = [picture.path for picture in pictures if not picture.problem and picture.path not in copies]
    found = inspection.alike([looks[path].hash_bits for path in paths], [looks[path].thumbnail for path in paths])
    return {paths[number]: paths[earlier] for number, earlier in found.items()}


# ---- what is told --------------------------------------------------------------------------------------------------


def page(facts: Facts, findings: Sequence[Finding], *, num_examples: int | None) -> str:
    """Return the findings as text, by severity.

    Args:
        num_examples: how many places of each finding are shown; None: all.
    """
    lines = [_summary(facts)]
    for severity in SEVERITIES:
        own = [finding for finding in findings if finding.severity == severity]
        if own:
            lines += ["", _TITLES[severity]]
        for finding in own:
            lines += ["", f"  {finding.message}", f"    what to do: {finding.fix}"]
            shown = finding.places[:num_examples]
            lines += [f"      {_shown(facts, place.path)}{place.detail and ': '}{place.detail}" for place in shown]
            if left := len(finding.places) - len(shown):
                lines.append(f"      and {left:,} more (--all shows every one)")
    counts = Counter(finding.severity for finding in findings)
    told = ", ".join(_count(counts[severity], severity) for severity in SEVERITIES)
    return "\n".join([*lines, "", told if findings else "nothing found that should be changed"])


def _summary(facts: Facts) -> str:
    counts = Counter(picture.group for picture in facts.pictures)
    folders = [f"{group.name} ({number:,} x {group.repeats})" for group, number in counts.items()]
    more = f" and {len(folders) - 8} more" if len(folders) > 8 else ""
    names = f" in {', '.join(folders[:8])}{more}" if facts.groups else ""
    return f"{facts.folder}: {_count(len(facts.pictures), 'picture')}{names}"


def _shown(facts: Facts, path: Path) -> str:
    return (path.relative_to(facts.folder) if path.is_relative_to(facts.folder) else path).as_posix()


def as_json(facts: Facts, findings: Sequence[Finding], code: int) -> dict[str, Any]:
    """Return the findings for programs, in the shape that docs/check.md promises; paths are relative to the folder."""
    counts = Counter(finding.severity for finding in findings)
    of_group = Counter(picture.group for picture in facts.pictures)
    return {
        "folder": str(facts.folder),
        "pictures": len(facts.pictures),
        "folders": [
            {"name": group.name, "repeats": group.repeats, "pictures": number} for group, number in of_group.items()
        ],
        "counts": {severity: counts[severity] for severity in SEVERITIES},
        "exit_code": code,
        "findings": [
            {
                "severity": finding.severity,
                "kind": finding.kind,
                "message": finding.message,
                "fix": finding.fix,
                "places": [{"path": _shown(facts, place.path), "detail": place.detail} for place in finding.places],
            }
            for finding in findings
        ],
    }


def write_sheets(path: Path, facts: Facts, findings: Iterable[Finding]) -> list[Path]:
    """Write every picture with its caption and what was found of it, 240 to a file; return the files."""
    notes: dict[Path, list[str]] = defaultdict(list)
    for finding in findings:
        for place in finding.places:
            notes[place.path].append(f"{finding.kind}: {place.detail}" if place.detail else finding.kind)

    def entry(picture: Picture) -> Entry:
        caption = picture.caption or picture.group.words or ""
        return Entry(_small(picture), _shown(facts, picture.path), caption, _notes_on(picture, facts, notes))

    return _write_pages(path, entry, facts.pictures)


def _write_pages(path: Path, entry: Callable[[_Given], Entry], shown: Sequence[_Given]) -> list[Path]:
    """Write a contact sheet of the entries made of what is shown, 240 to a file; return the files."""
    written = []
    for number, begin in enumerate(range(0, len(shown), _PER_SHEET), start=1):
        entries = _in_threads(entry, shown[begin : begin + _PER_SHEET], "drawing")
        file = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        contact_sheet(entries).save(file)
        written.append(file)
    return written


def _small(picture: Picture) -> Image.Image | None:
    if picture.problem:
        return None
    image = open_image(picture.path)
    image.thumbnail((200, 200))
    if picture.mask is not None and picture.mask.look is not None:
        return tinted(image, _open_mask(picture, picture.mask.path)[0])
    return image


def write_preview(cfg: CheckConfig, path: Path, facts: Facts) -> list[str]:
    """Write the sheet of every crop, the most cut picture first; return what to tell of it."""
    pictures = facts.readable
    if not pictures:
        return ["crops           none: there is no readable picture"]
    subset = Subset(augmentation=Augmentation(face_portions=cfg.face_crop_aug_range))
    buckets = Buckets(
        cfg.resolution, cfg.bucket_min, cfg.bucket_max, cfg.bucket_step, cfg.bucket_rule == "sd-scripts",
        cfg.bucket_no_upscale,
    )  # fmt: skip
    rules = DatasetRules((subset,), cfg.resolution, buckets if cfg.buckets else None)
    records = [ImageRecord(picture.path, "", picture.size) for picture in pictures]
    crops, notes = plan_crops(rules, [subset], records)
    by_loss = sorted(zip(records, crops, strict=True), key=lambda pair: -pair[1].lost_area)

    def entry(pair: tuple[ImageRecord, CropPlan]) -> Entry:
        record, crop = pair
        (width, height), (to_width, to_height) = record.size, crop.shape
        text = f"{width}x{height} to {to_width}x{to_height}"
        return Entry(
            crop_view(open_image(record.path), crop), _shown(facts, record.path), text, _crop_notes(record, crop)
        )

    files = _write_pages(path, entry, by_loss)
    return [
        *(f"crops           {file}" for file in files),
        *(f"  {note}" for note in [*shape_lines(records, crops), *notes]),
    ]


def _crop_notes(record: ImageRecord, crop: CropPlan) -> list[str]:
    factor = crop.resize[0] / record.size[0]
    cut = [f"{crop.lost_area:.0%} cut away"] if crop.lost_area >= 0.02 else []
    return [*cut, *([f"enlarged {factor:.1f} times"] if factor >= 1.05 else [])]


def _notes_on(picture: Picture, facts: Facts, notes: dict[Path, list[str]]) -> list[str]:
    caption_file = picture.caption_file or facts.stray_captions.get(picture.path)
    return [*notes.get(picture.path, []), *(notes.get(caption_file, []) if caption_file else [])]


# ---- the repaired copy ---------------------------------------------------------------------------------------------


def write_copy(folder: Path, facts: Facts, looks: Looks) -> str:
    """Write the repaired copy and return what was done."""
    copies = duplicates(facts.readable)
    group_of = {picture.path: picture.group for picture in facts.pictures}
    left_out = {copy for copy, first in copies.items() if group_of[copy] == group_of[first]}
    kept = [picture for picture in facts.readable if picture.path not in left_out]
    if not kept:
        raise UserError(f"--fix {folder}: there is no readable picture to copy.")
    sources = [_source(picture, facts, looks[picture.path]) for picture in kept]
    planned = repair.plan(sources)
    repair.write(planned, folder, num_threads=_num_threads())
    converted = [source for source in sources if source.is_converted]
    reasons = Counter(reason for source in converted for reason in looks[source.picture].conversions)
    renamed = [copy for copy in planned if copy.caption and copy.caption.name != _caption_name(copy.source)]
    lines = [
        f"repaired copy   {folder}",
        f"  {_count(len(kept), 'picture')} copied, {len(converted):,} of them converted to PNG"
        + (f" ({', '.join(f'{reason}: {number}' for reason, number in reasons.items())})" if reasons else ""),
        f"  left out: {_count(len(left_out), 'duplicate')}, {len(facts.pictures) - len(facts.readable):,} unreadable, "
        f"{len(facts.foreign) + len(facts.unused):,} that are not read or lie where training does not look",
    ]
    if renamed:
        lines.append(f"  {_count(len(renamed), 'caption file')} renamed")
    return "\n".join([*lines, f"  what is left to do: lorasmith check {quoted(folder)}"])


def _caption_name(source: repair.Source) -> str:
    return "" if source.caption is None else source.caption.name


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _source(picture: Picture, facts: Facts, look: inspection.Look) -> repair.Source:
    group = picture.group
    own_name = group.path == facts.folder and group.words is not None  # a single DreamBooth folder keeps its name
    place = PurePath(group.path.resolve().name) if own_name else PurePath(group.path.relative_to(facts.folder))
    stray = facts.stray_captions.get(picture.path)
    empty = {path for found in facts.captions for path in found.empty}
    caption = stray or (None if picture.caption_file in empty else picture.caption_file)
    extension = facts.accepted[-1] if stray or caption is None else caption.suffix.lower()
    return repair.Source(picture.path, place, caption, extension, bool(look.conversions))
