"""`lorasmith tag`: write tags beside each picture, or all into one metadata file, by a tagger of the WD14 family.

    lorasmith tag photos
    lorasmith tag photos --threshold 0.5 --blacklist "lowres, signature" --output meta.json

What is there already is left alone. The same command, started again, goes on.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from lorasmith.config import TagConfig
from lorasmith.data import labelling, tag_metadata
from lorasmith.data.images import set_pixel_limit
from lorasmith.data.labelling import Outcome, TextFiles
from lorasmith.data.tag_metadata import TagMetadata
from lorasmith.data.tags import ScoredTag, TagRules, choose, key, read_list, read_replacements, with_missing
from lorasmith.errors import UserError
from lorasmith.taggers.base import TAGS, Tagger, TaggerOptions, loader


def run(cfg: TagConfig) -> int:
    """Tag the folder; return the exit code: 0, 1 if pictures were left out, 130 / 143 when stopped."""
    if cfg.folder is None:
        raise UserError("missing: DIR, the folder of pictures. For example: lorasmith tag photos")
    load, rules = loader(cfg.tagger, TAGS), rules_of(cfg)
    if cfg.output is not None:
        tag_metadata.check_path(cfg.output)
    set_pixel_limit(cfg.max_megapixels)
    pictures, notes = labelling.find_pictures(cfg.folder, recursive=cfg.recursive)
    shard = labelling.choose_shard(cfg.shard)
    place: _Place
    if cfg.output is None:
        files = labelling.text_files(pictures, cfg.extension)
        pictures, notes = list(files.of), notes + labelling.sharing_note(files.sharing)
        place = _Beside(files, f"beside the pictures in {cfg.folder}")
    else:
        path = tag_metadata.of_shard(cfg.output, shard)
        place = _Inside(TagMetadata(path, cfg.folder), f"in {path}")
    own = shard.of(pictures)
    wanted = [picture for picture in own if cfg.existing != "skip" or not place.has_tags(picture)]

    def keep(picture: Path, scored: Sequence[ScoredTag]) -> None:
        tags = choose(scored, rules)
        if not tags:
            raise UserError(f"{picture}: no tag reaches the threshold; lower it")
        older = place.text(picture) if cfg.existing == "append" else ""
        place.write(picture, with_missing(older, tags, cfg.separator) if older else cfg.separator.join(tags))

    outcome = Outcome()
    if wanted:
        options = TaggerOptions(cfg.model, cfg.providers, min(rules.general_threshold, rules.character_threshold))
        with labelling.enough_memory("the model: give a smaller --model, or --providers cpu"):
            tagger: Tagger = load(options)
        try:
            outcome = labelling.label(wanted, tagger, keep, batch_size=cfg.batch_size, shard=shard)
        finally:
            place.save()
    done = f"pictures tagged {place.name}"
    print(labelling.summary(outcome, shard, done, len(own) - len(wanted), notes))
    return outcome.exit_code


def rules_of(cfg: TagConfig) -> TagRules:
    """Return what is asked for; one threshold stands for those that are not given."""
    return TagRules(
        general_threshold=cfg.threshold if cfg.general_threshold is None else cfg.general_threshold,
        character_threshold=cfg.threshold if cfg.character_threshold is None else cfg.character_threshold,
        has_rating=cfg.rating,
        keeps_underscores=cfg.underscores == "keep",
        order=cfg.order,
        blacklist=frozenset(key(tag) for tag in read_list(cfg.blacklist)),
        always_first=[key(tag) for tag in read_list(cfg.always_first)],
        replacements=read_replacements(cfg.replace),
    )


class _Place(Protocol):
    """Where tags go."""

    name: str

    def has_tags(self, picture: Path) -> bool: ...
    def text(self, picture: Path) -> str: ...
    def write(self, picture: Path, text: str) -> None: ...
    def save(self) -> None: ...


class _Beside:
    """Text files beside the pictures."""

    def __init__(self, files: TextFiles, name: str) -> None:
        self._files, self.name = files, name

    def has_tags(self, picture: Path) -> bool:
        return picture in self._files.existing

    def text(self, picture: Path) -> str:
        return labelling.read_text(self._files.of[picture]) if self.has_tags(picture) else ""

    def write(self, picture: Path, text: str) -> None:
        labelling.write_text(self._files.of[picture], text if "\n" in text else f"{text}\n")

    def save(self) -> None:
        """There is nothing left to write."""


class _Inside:
    """One metadata file."""

    def __init__(self, metadata: TagMetadata, name: str) -> None:
        self._metadata, self.name = metadata, name

    def has_tags(self, picture: Path) -> bool:
        return bool(self._metadata.tags(picture))

    def text(self, picture: Path) -> str:
        return self._metadata.tags(picture)

    def write(self, picture: Path, text: str) -> None:
        self._metadata.set_tags(picture, text)

    def save(self) -> None:
        self._metadata.save()
