"""The LoRAs that pictures are drawn with: found by name, checked against the model, at the strengths that are asked."""

import difflib
from collections.abc import Collection, Sequence
from pathlib import Path

from lorasmith import merging, model_families
from lorasmith.checkpoint import Checkpoint, file_sha256
from lorasmith.errors import UserError
from lorasmith.formats import kohya
from lorasmith.merging import Addition, Strength
from lorasmith.metadata import model_hash
from lorasmith.model_families import AdapterPlace
from lorasmith.prompt_syntax import LoraTag

_SUFFIXES = (*kohya.SUFFIXES, ".bin")


class Loras:
    """The LoRAs that are given, and those that prompts name, read and checked when first asked for.

    Args:
        given: files with the strengths that all pictures have, in the order in which they are put on.
        folder: of those that prompts may name besides; None: there is none.

    Raises:
        UserError: one does not fit the model, or two have the same name.
    """

    def __init__(self, checkpoint: Checkpoint, given: Sequence[tuple[Path, Strength]], folder: Path | None) -> None:
        self._checkpoint = checkpoint
        self._family, self._places = "", dict[str, AdapterPlace]()
        self._folder = folder
        self._files = _by_name([path for path, _ in given])
        if folder is not None:
            if not folder.is_dir():
                raise UserError(f"--lora-folder {folder}: there is no such folder.")
            lying = [path for path in sorted(folder.rglob("*")) if path.suffix in _SUFFIXES]
            self._files = {**_by_name(lying), **self._files}
        self._read: dict[str, Addition] = {}
        self._hashes: dict[str, str] = {}
        self._given = [LoraTag(path.stem, strength.unet, strength.text_encoder) for path, strength in given]
        for tag in self._given:
            self._addition(tag.name)

    def used(self, tags: Sequence[LoraTag], strengths: Sequence[float] | None = None) -> tuple[LoraTag, ...]:
        """Return what a picture is drawn with: those given, at a strength that its prompt says, and others it names.

        Args:
            strengths: of those given, in their order, in place of their own.

        Raises:
            UserError: a prompt names one that there is not, or says twice how strong one is.
        """
        given = self._given
        if strengths is not None:
            if len(strengths) != len(given):
                raise UserError(
                    f"--am {','.join(f'{one:g}' for one in strengths)} has {len(strengths)} strengths for "
                    f"{len(given)} LoRAs of --lora; give one for each, in the same order."
                )
            given = [LoraTag(tag.name, strength, strength) for tag, strength in zip(given, strengths, strict=True)]
        named: dict[str, LoraTag] = {}
        for tag in tags:
            if tag.name in named:
                raise UserError(f"a prompt names <lora:{tag.name}> twice; leave one of them out.")
            if strengths is not None and any(tag.name == one.name for one in given):
                raise UserError(f"--am and <lora:{tag.name}> both say how strong it is; leave one of them out.")
            self._addition(tag.name)
            named[tag.name] = tag
        found = {tag.name: tag for tag in given} | named
        return tuple(tag for tag in found.values() if tag.unet or tag.text_encoder)

    def additions(self, tags: Sequence[LoraTag]) -> list[Addition]:
        """Return these LoRAs at their strengths."""
        strengths = [(self._read[tag.name], Strength(tag.unet, tag.text_encoder)) for tag in tags]
        return [addition.at(strength, self._places) for addition, strength in strengths]

    def check_regions(self, tags: Sequence[LoraTag], masked: Collection[str]) -> None:
        """Check that these LoRAs, of which some have masks, can have them.

        Raises:
            UserError: one has to be folded.
        """
        numbers = [number for number, tag in enumerate(tags) if tag.name in masked]
        merging.check_regions(self.additions(tags), self._places, numbers)

    def hashes(self, tags: Sequence[LoraTag]) -> dict[str, str]:
        """Return the hash of each of these LoRAs, as WebUI shows it: 12 digits of that of its tensors."""
        for tag in tags:
            if tag.name not in self._hashes:
                self._hashes[tag.name] = _lora_hash(self._read[tag.name].file.files[0])[:12]
        return {tag.name: self._hashes[tag.name] for tag in tags}

    def told(self) -> list[str]:
        """Return a line for each LoRA."""
        return [
            f"{one.file.path}: {len(one.factors)} layers"
            + (f", {len(one.unknown)} that the model does not have" if one.unknown else "")
            for one in self._read.values()
        ]

    def _addition(self, name: str) -> Addition:
        if name not in self._read:
            if name not in self._files:
                near = difflib.get_close_matches(name, self._files, n=1)
                where = "among --lora" + (f" or in {self._folder}" if self._folder else "; give --lora-folder")
                hint = f"did you mean {near[0]}?" if near else f"it is looked for {where}."
                raise UserError(f"<lora:{name}>: there is no LoRA of that name; {hint}")
            if not self._family:
                self._family, self._places, _ = model_families.adapter_places(self._checkpoint, of_plain_models=True)
            self._read[name] = merging.plan(self._files[name], self._family, self._places, Strength())
        return self._read[name]


def _by_name(paths: Sequence[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        if path.stem in found:
            raise UserError(
                f"{found[path.stem]} and {path} have the same name, {path.stem}, so a prompt cannot say which is "
                "meant; rename one of them, or give it alone."
            )
        found[path.stem] = path
    return found


def _lora_hash(path: Path) -> str:
    return model_hash(path.read_bytes()) if path.suffix == ".safetensors" else file_sha256(path)
