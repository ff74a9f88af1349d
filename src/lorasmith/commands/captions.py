"""`lorasmith captions DIR`: merges the caption and tag files of a folder into one metadata file, and cleans them.

    lorasmith captions photos --output meta.json --clean

The pictures are not opened, and no file of the user is ever changed.
"""

import os
import shutil
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from lorasmith.checkpoint import atomic_file, synced_folder
from lorasmith.command_line import quoted
from lorasmith.config import CaptionsConfig
from lorasmith.data import metadata_files
from lorasmith.data.caption_cleaning import (
    Change,
    Cleaner,
    Rules,
    add_first,
    fold,
    frequencies,
    limit,
    load_rules,
    split_tags,
)
from lorasmith.data.caption_files import (
    DEFAULT_EXTENSIONS,
    CaptionFiles,
    accepted_extensions,
    caption_problems,
    read_caption_files,
    refuse,
)
from lorasmith.data.images import advice_for_foreign, folders_within, foreign_pictures_in, pictures_in, require_folder
from lorasmith.data.metadata_files import Entry
from lorasmith.data.sources.metadata_json import find_pictures
from lorasmith.errors import UserError

_CAPTIONS, _TAGS = DEFAULT_EXTENSIONS
_NUM_EXAMPLES, _NUM_FREQUENT, _NUM_LISTED = 3, 30, 50
_SECONDS_BEFORE_BAR = 2.0
_show = partial(tqdm, delay=_SECONDS_BEFORE_BAR, disable=None, leave=False)


def run(cfg: CaptionsConfig) -> int:
    """Merge, clean, tell what changed, and write what was asked for."""
    place = cfg.folder or cfg.input
    if place is None:
        raise UserError(
            "missing: DIR, the folder of pictures. For example: lorasmith captions photos --output meta.json"
        )
    if cfg.folder is not None:
        require_folder(cfg.folder)
    _check_options(cfg, place)
    cleaner = Cleaner(_rules(cfg))
    gathered = _gathered(cfg)
    cleaned, changes = clean(
        gathered.entries, cleaner, added=_words(cfg.add_tags), min_count=cfg.min_count, max_tags=cfg.max_tags
    )
    texts = {} if cfg.write_files is None else _texts_to_write(cfg.write_files, place, gathered, cleaned)
    print(page(place, gathered, cleaned, changes, added=_words(cfg.add_tags)))
    if cfg.dry_run:
        print("\nnothing is written (--dry-run)")
        return 0
    print()
    if cfg.output is not None:
        kept = write_metadata(cfg.output, cleaned)
        print(f"written  {cfg.output} ({_count(len(cleaned), 'entry', 'entries')})" + (kept and f"; before: {kept}"))
        pictures = "FOLDER" if cfg.folder is None else quoted(cfg.folder)
        print(f"to train: lorasmith train --captions {quoted(cfg.output)} --images {pictures} ...")
    if cfg.write_files is not None:
        print(_write_texts(cfg.write_files, place, texts, len(gathered.pictures)))
    return 0


# ---- options -------------------------------------------------------------------------------------------------------


def _check_options(cfg: CaptionsConfig, folder: Path) -> None:
    """Refuse what contradicts itself, and outputs that cannot be written; before anything is read."""
    if cfg.output is None and cfg.write_files is None and not cfg.dry_run:
        raise UserError(
            "nothing says where the result goes; give --output meta.json, --write-files NEW_FOLDER, or --dry-run to "
            "see what would change."
        )
    if cfg.rules is not None and not cfg.clean:
        raise UserError(f"--rules {cfg.rules} says how to clean, but cleaning is off; add --clean.")
    if cfg.output is not None:
        _check_output(cfg.output, is_overwritten=cfg.overwrite)
    if cfg.write_files is not None and not _is_same(cfg.write_files, folder) and os.path.lexists(cfg.write_files):
        raise UserError(
            f"--write-files {cfg.write_files}: this exists already, and nothing is overwritten; give a new folder, or "
            f"{folder} itself for pictures without a text file."
        )
    added = {fold(tag) for tag in _words(cfg.add_tags)}
    both = [tag for tag in _words(cfg.remove_tags) if fold(tag) in added]
    if both:
        raise UserError(f"add_tags and remove_tags both name {', '.join(both)}; leave out one of them.")
    if cfg.max_tags is not None and len(added) > cfg.max_tags:
        raise UserError(f"add_tags names {len(added)} tags, but max_tags = {cfg.max_tags} leaves room for fewer.")


def _check_output(path: Path, *, is_overwritten: bool) -> None:
    kinds = (metadata_files.JSON, metadata_files.JSONL)
    if path.suffix.lower() not in kinds:
        raise UserError(f"--output {path}: expected a name that ends with {' or '.join(kinds)}.")
    if path.is_dir() or not path.absolute().parent.is_dir():
        reason = "this is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise UserError(f"--output {path}: {reason}; give the path of a file that may be written.")
    if os.path.lexists(path) and not is_overwritten:
        raise UserError(
            f"--output {path}: this exists already, and nothing is overwritten; give another name, or --overwrite, "
            "which keeps the old one as .bak."
        )


def _is_same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _has_paths(cfg: CaptionsConfig) -> str:
    """Return how new keys are written: `full` paths, `file` names, or `stem`s without the extension."""
    if cfg.full_path:
        return "full"
    return "file" if cfg.output is not None and metadata_files.is_lines(cfg.output) else "stem"


def _extensions(cfg: CaptionsConfig) -> tuple[str | None, str | None]:
    """Return the extensions of caption and of tag files; a kind is not read where the other has its usual one."""
    caption, tag = (
        None if given is None else accepted_extensions(given)[0] for given in (cfg.caption_extension, cfg.tag_extension)
    )
    if caption is not None and caption == tag:
        raise UserError(f"caption_extension and tag_extension are both {tag}; a file holds one or the other.")
    return (
        None if cfg.read == "tags" else caption or (None if tag == _CAPTIONS else _CAPTIONS),
        None if cfg.read == "captions" else tag or (None if caption == _TAGS else _TAGS),
    )


def _rules(cfg: CaptionsConfig) -> Rules:
    """Return the tables of rules, with what the command line says besides."""
    rules = load_rules(cfg.rules) if cfg.clean else Rules()
    pairs = dict(_pair(text) for text in cfg.replace)
    return replace(
        rules,
        keep=(*rules.keep, *_words(cfg.add_tags)),
        remove=(*rules.remove, *_words(cfg.remove_tags)),
        rename={**rules.rename, **pairs},
        replace={**rules.replace, **pairs},
    )


def _pair(text: str) -> tuple[str, str]:
    old, _, new = (part.strip() for part in text.partition(":"))
    if not old or not new or ":" in new or "," in text:
        raise UserError(
            f"--replace {text!r}: expected what to replace, a colon, and what by, such as grey:gray; to leave tags out "
            "there is --remove-tags, and tags with a colon can be renamed in a file of --rules."
        )
    return old, new


def _words(given: Iterable[str]) -> list[str]:
    """Return the tags that are given, one by one or with commas between."""
    return list({fold(tag): tag for text in given for tag in split_tags(text)}.values())


# ---- what there is -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gathered:
    """What a folder and an older metadata file say.

    keys: picture -> the key of its entry. notes: what is worth saying of what was found, and what is not used.
    """

    pictures: list[Path]
    keys: dict[Path, str]
    entries: dict[str, Entry]
    notes: list[str] = field(default_factory=list)


def _gathered(cfg: CaptionsConfig) -> Gathered:
    if cfg.folder is None:
        assert cfg.input is not None
        return Gathered([], {}, metadata_files.read(cfg.input))
    return gather(cfg.folder, _extensions(cfg), cfg.input, is_recursive=cfg.recursive, has_paths=_has_paths(cfg))


def gather(
    folder: Path, extensions: tuple[str | None, str | None], older: Path | None, *, is_recursive: bool, has_paths: str
) -> Gathered:
    """Return the entries of an older metadata file, updated and completed by the text files beside the pictures.

    Args:
        extensions: of caption files and of tag files; None: such are not read.
        has_paths: how new keys are written; see `_has_paths`.

    Raises:
        UserError: there are no pictures, or text files are not UTF-8, or the older file is no sound metadata file.
    """
    entries = {} if older is None else metadata_files.read(older)
    places = folders_within(folder) if is_recursive else [folder]
    by_place = {place: found for place in places if (found := pictures_in(place))}
    pictures = [picture for found in by_place.values() for picture in found]
    if not pictures:
        raise UserError(_nothing_found(folder, is_recursive=is_recursive))
    keys = _known_keys(older, entries, folder, pictures)
    notes = [] if older is None else [_older_note(older, len(entries), len(keys))]
    new = _new_keys(folder, by_place, has_paths)
    keys |= {picture: new[picture] for picture in pictures if picture not in keys}
    captions, tags = (_read_all(by_place, extension, all_lines=extension == extensions[1]) for extension in extensions)
    refuse(caption_problems(CaptionFiles(wrong_encoding=found.wrong_encoding) for found in (captions, tags)))
    for picture in pictures:
        old = entries.get(keys[picture], Entry())
        entries[keys[picture]] = replace(
            old,
            caption=captions.first_lines.get(picture) or old.caption,
            tags=_joined(tags.first_lines.get(picture, "")) or old.tags,
        )
    notes += _notes(folder, places, captions, tags, extensions)
    return Gathered(pictures, keys, entries, notes)


def _known_keys(
    older: Path | None, entries: Mapping[str, Entry], folder: Path, pictures: list[Path]
) -> dict[Path, str]:
    """Return the keys that pictures have in an older file, whichever way these are written."""
    if older is None:
        return {}
    real = {place: place.resolve() for place in {picture.parent for picture in pictures}}
    by_path = {real[picture.parent] / picture.name: picture for picture in pictures}
    known: dict[Path, str] = {}
    for key, path in find_pictures(older, entries, folder).items():
        real.setdefault(path.parent, path.parent.resolve())
        if picture := by_path.get(real[path.parent] / path.name):
            known[picture] = key
    return known


def _new_keys(folder: Path, by_place: Mapping[Path, Sequence[Path]], has_paths: str) -> dict[Path, str]:
    """Return a key for each picture by which no other one is found."""
    keys: dict[Path, str] = {}
    for place, pictures in by_place.items():
        names, stems = {path.name for path in pictures}, Counter(path.stem for path in pictures)
        above = place.absolute() if has_paths == "full" else place.relative_to(folder)
        for path in pictures:
            is_short = has_paths == "stem" and stems[path.stem] == 1 and path.stem not in names
            keys[path] = (above / (path.stem if is_short else path.name)).as_posix()
    return keys


def _read_all(by_place: Mapping[Path, Sequence[Path]], extension: str | None, *, all_lines: bool) -> CaptionFiles:
    together = CaptionFiles()
    if extension is None:
        return together
    for place, pictures in by_place.items():
        found = read_caption_files(place, pictures, [extension], all_lines=all_lines, show=_show)
        together.files |= found.files
        together.first_lines |= found.first_lines
        together.wrong_encoding += found.wrong_encoding
        together.several_lines += found.several_lines
        together.unused += [path for path in found.unused if path.suffix.lower() == extension]
    return together


def _joined(lines: str) -> str:
    """Return tags that stand on several lines on one."""
    return ", ".join(filter(None, (line.strip(" \t,") for line in lines.split("\n")))) if "\n" in lines else lines


def _nothing_found(folder: Path, *, is_recursive: bool) -> str:
    inside = 0 if is_recursive else sum(len(pictures_in(place)) for place in folders_within(folder))
    if inside:
        advice = f"the folders in it hold {_count(inside, 'picture')}: add --recursive."
    elif foreign := foreign_pictures_in(folder):
        advice = f"{_some(foreign)}: pictures of a kind that is not read; {advice_for_foreign(foreign)}."
    else:
        advice = "check the path."
    return f"no pictures found in {folder}; {advice}"


def _older_note(older: Path, num_entries: int, num_known: int) -> str:
    left = num_entries - num_known
    more = f"; {_count(left, 'other')} without a picture here, kept as well" if left else ""
    return f"{older.name}: {_count(num_entries, 'entry', 'entries')}, {num_known:,} for these pictures{more}"


def _notes(
    folder: Path,
    places: Sequence[Path],
    captions: CaptionFiles,
    tags: CaptionFiles,
    extensions: tuple[str | None, str | None],
) -> list[str]:
    notes = []
    for found, extension, what in zip((captions, tags), extensions, ("captions", "tags"), strict=True):
        if extension is not None:
            notes.append(f"{_count(len(set(found.files.values())), f'{extension} file')} read as {what}")
        if found.unused:
            number = _count(len(found.unused), f"{extension} file")
            notes.append(f"{number} without a picture of that name, not used ({_some(found.unused)})")
    if captions.several_lines:
        number = _count(len(captions.several_lines), "caption file")
        notes.append(f"only the first line is used of {number} ({_some(captions.several_lines)})")
    if len(places) == 1:
        inside = sum(len(pictures_in(place)) for place in folders_within(folder) if place != folder)
        notes += [f"{_count(inside, 'picture')} in folders inside, not used; --recursive takes them"] if inside else []
    foreign = [path for place in places for path in foreign_pictures_in(place)]
    if foreign:
        notes.append(
            f"{_count(len(foreign), 'picture')} of a kind that is not read ({_some(foreign)}); "
            f"{advice_for_foreign(foreign)}"
        )
    return notes


# ---- what becomes of it --------------------------------------------------------------------------------------------

Changes = dict[str, Counter[tuple[str, str]]]  # rule -> (before, after) -> how often


def clean(
    entries: Mapping[str, Entry], cleaner: Cleaner, *, added: Sequence[str], min_count: int, max_tags: int | None
) -> tuple[dict[str, Entry], Changes]:
    """Return the entries with all rules applied, and what each rule changed; what none touches stays as it is."""
    captions: list[str] = []
    lists: list[list[str]] = []
    changes: Changes = defaultdict(Counter)
    is_touched: list[bool] = []
    for entry in _show(entries.values(), desc="cleaning"):
        caption, in_caption = cleaner.caption(entry.caption)
        tags, in_tags = cleaner.tags(entry.tags)
        tags, in_front = add_first(tags, added) if added else (tags, [])
        captions.append(caption)
        lists.append(tags)
        is_touched.append(bool(in_tags or in_front))
        _note(changes, [*in_caption, *in_tags, *in_front])
    lists, left_out = limit(lists, kept=added, min_count=min_count, max_tags=max_tags)
    result = {}
    for (key, entry), caption, tags, touched, own in zip(
        entries.items(), captions, lists, is_touched, left_out, strict=True
    ):
        _note(changes, own)
        result[key] = replace(entry, caption=caption, tags=", ".join(tags) if touched or own else entry.tags)
    return result, changes


def _note(changes: Changes, more: Iterable[Change]) -> None:
    for change in more:
        changes[change.rule][change.before, change.after] += 1


# ---- what is told --------------------------------------------------------------------------------------------------


def page(
    place: Path, gathered: Gathered, cleaned: Mapping[str, Entry], changes: Changes, *, added: Sequence[str]
) -> str:
    """Return what was found and what changed, as text; tags that all pictures get are none of their own.

    place: the folder of pictures, or the file whose entries are counted where there is none.
    """
    of_all = {fold(tag) for tag in added}
    entries: dict[object, Entry] = {picture: cleaned[gathered.keys[picture]] for picture in gathered.pictures}
    number = _count(len(entries), "picture")
    if not entries:
        entries = {**cleaned}
        number = _count(len(cleaned), "entry", "entries")
    has_caption = {name for name, entry in entries.items() if entry.caption}
    has_tags = {name for name, entry in entries.items() if not of_all.issuperset(map(fold, split_tags(entry.tags)))}
    described = has_caption | has_tags
    bare = [name for name in entries if name not in described]
    lines = [
        f"{place}: {number}; {len(has_caption):,} with caption, {len(has_tags):,} with tags, "
        f"{len(bare):,} with neither",
        *(f"  {note}" for note in gathered.notes),
    ]
    lines += ["", *(_table(changes) if changes else ["no changes"])]
    counts = frequencies(split_tags(entry.tags) for entry in cleaned.values())
    if counts:
        frequent = ", ".join(f"{tag} {number:,}" for tag, number in counts.most_common(_NUM_FREQUENT))
        lines += ["", f"most frequent of {_count(len(counts), 'tag')}", *_wrapped(frequent)]
    if bare:
        lines += [
            "",
            "without caption and tags" + (" of their own" if added else ""),
            *(f"  {name}" for name in bare[:_NUM_LISTED]),
        ]
        lines += [f"  and {len(bare) - _NUM_LISTED:,} more"] if len(bare) > _NUM_LISTED else []
    return "\n".join(lines)


def _table(changes: Changes) -> list[str]:
    """Return a row for each rule: how often it changed something, and what most often."""
    width = max(map(len, changes))
    rows = ["changes"]
    for rule, counts in changes.items():
        examples = [_example(*pair) for pair, _ in counts.most_common(_NUM_EXAMPLES)]
        rows.append(f"  {rule:<{width}} {sum(counts.values()):>9,}   {'; '.join(examples)}")
    return rows


def _example(before: str, after: str) -> str:
    if not after:
        return f"- {_shortened(before)}"
    return f"{_shortened(before)} -> {_shortened(after)}" if before else f"+ {_shortened(after)}"


def _shortened(text: str) -> str:
    shown = repr(text)[1:-1] if text != " ".join(text.split()) else text  # line ends and double spaces are to be seen
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _count(number: int, noun: str, nouns: str | None = None) -> str:
    return f"{number:,} {noun if number == 1 else nouns or f'{noun}s'}"


def _some(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - 3:,} more" if len(paths) > 3 else ""
    return ", ".join(path.name for path in paths[:3]) + more


# ---- what is written -----------------------------------------------------------------------------------------------


def write_metadata(path: Path, entries: Mapping[str, Entry]) -> str:
    """Write a metadata file, whole or not at all; return where the older one is kept, "" if there was none."""
    kept = _backup_of(path) if path.exists() else None
    with atomic_file(path) as temporary:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(metadata_files.lines_to_write(path, entries))
        if kept is not None:
            shutil.copy2(path, kept)
    return "" if kept is None else str(kept)


def _backup_of(path: Path) -> Path:
    kept, number = path.with_name(f"{path.name}.bak"), 1
    while os.path.lexists(kept):
        number += 1
        kept = path.with_name(f"{path.name}.bak{number}")
    return kept


def _texts_to_write(target: Path, folder: Path, gathered: Gathered, entries: Mapping[str, Entry]) -> dict[Path, str]:
    """Return the text of each file to write, by its path in the target; beside pictures none that have a text file."""
    is_beside = _is_same(target, folder)
    taken = _text_files(gathered.pictures) if is_beside else set()
    texts: dict[Path, str] = {}
    for picture in gathered.pictures:
        text = entries[gathered.keys[picture]].text
        if not text or (picture.parent, picture.stem) in taken:
            continue
        file = picture.relative_to(folder).with_suffix(_TAGS)
        if texts.setdefault(file, text) != text:
            raise UserError(
                f"--write-files {target}: {file} would be the text file of several pictures, but their captions "
                f"differ ({picture.name} and another); rename one of the pictures."
            )
    return texts


def _text_files(pictures: Iterable[Path]) -> set[tuple[Path, str]]:
    """Return folder and stem of every text file beside the pictures."""
    found = set()
    for place in {picture.parent for picture in pictures}:
        found |= {(place, path.stem) for path in place.iterdir() if path.suffix.lower() in DEFAULT_EXTENSIONS}
    return found


def _write_texts(target: Path, folder: Path, texts: Mapping[Path, str], num_pictures: int) -> str:
    number = _count(len(texts), "text file")
    if _is_same(target, folder):
        for file, text in _show(texts.items(), desc="writing"):
            with (folder / file).open("x", encoding="utf-8", newline="\n") as opened:  # x: never over another
                opened.write(f"{text}\n")
        return f"written  {number} beside pictures that had none ({_count(num_pictures, 'picture')} in all)"
    with synced_folder(target) as temporary:
        for place in {file.parent for file in texts}:
            (temporary / place).mkdir(parents=True, exist_ok=True)
        for file, text in _show(texts.items(), desc="writing"):
            (temporary / file).write_bytes(f"{text}\n".encode())
    return f"written  {number} in {target}, for {_count(num_pictures, 'picture')}"
