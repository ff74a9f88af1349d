"""The folder that a LoRA can be published from: the file, sample pictures, and a page about them (README.md).

All that would be made public is in it, and nothing else, so one can look first.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

_OURS = "<!-- Made by lorasmith, anew at the end of each run; remove this line to keep what you write. -->"


@dataclass(frozen=True)
class Card:
    """What a page about a LoRA says.

    base: its model, by hub id or by name. samples: prompts with their pictures. facts: name -> value, for a table.
    """

    title: str
    base: str
    is_on_hub: bool
    description: str
    license: str | None
    trigger_phrase: str | None
    samples: Sequence[tuple[str, Image.Image]]
    facts: Mapping[str, Any]


def write_card(folder: Path, lora: Path, card: Card) -> bool:
    """Fill `folder` with the LoRA, the samples and the page; return False if a page that is the user's was kept."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(lora, folder / lora.name)
    images = folder / "images"
    images.mkdir(exist_ok=True)
    names = [f"sample-{number:02d}.png" for number in range(len(card.samples))]
    for old in images.glob("sample-*.png"):
        if old.name not in names:
            old.unlink()
    for name, (_, picture) in zip(names, card.samples, strict=True):
        picture.save(images / name)
    page = folder / "README.md"
    if page.is_file() and _OURS not in page.read_text(encoding="utf-8"):
        return False
    page.write_text(_page(card, lora.name, names), encoding="utf-8")
    return True


def _page(card: Card, file: str, images: Sequence[str]) -> str:
    header: dict[str, Any] = {
        "library_name": "diffusers",
        "tags": ["stable-diffusion", "text-to-image", "lora", "diffusers", "lorasmith"],
    }
    if card.is_on_hub:
        header |= {"base_model": card.base, "base_model_relation": "adapter"}
    if card.license:
        header["license"] = card.license
    if card.trigger_phrase:
        header["instance_prompt"] = card.trigger_phrase
    if images:
        header["widget"] = [
            {"text": prompt, "output": {"url": f"images/{name}"}}
            for name, (prompt, _) in zip(images, card.samples, strict=True)
        ]
    # JSON values are YAML too, and nothing that a user wrote can break out of them.
    front = "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in header.items())
    pictures = "\n\n".join(
        f"![sample](images/{name})\n\n`{_plain(prompt)}`"
        for name, (prompt, _) in zip(images, card.samples, strict=True)
    )
    rows = "\n".join(f"| {_plain(name)} | {_plain(value)} |" for name, value in card.facts.items())
    paragraphs = [
        f"---\n{front}\n---",
        _OURS,
        f"# {_plain(card.title)}",
        _plain(card.description),
        f"A LoRA for {_plain(card.base)}." + (f" Say `{_plain(card.trigger_phrase)}`." if card.trigger_phrase else ""),
        pictures,
        f"## Use\n\nA1111 / Forge: `models/Lora`; ComfyUI: `models/loras`; diffusers:\n\n```python\n"
        f'pipeline.load_lora_weights("FOLDER_OR_REPO", weight_name={json.dumps(file)})\n```',
        f"## Training\n\n| | |\n|---|---|\n{rows}",
    ]
    return "\n\n".join(text for text in paragraphs if text) + "\n"


def _plain(value: Any) -> str:
    """Return text that Markdown shows as it is, on one line."""
    text = " ".join(str(value).split())
    for old, new in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "'")):
        text = text.replace(old, new)
    return text
