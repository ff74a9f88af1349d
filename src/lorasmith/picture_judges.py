"""Models that see how alike pictures are, and how well they show a text: CLIP, DINO, and the embedded model's judge.

    judge = load(find("openai/clip-vit-large-patch14", "--judge"), device)

CLIP compares pictures with texts too; DINO sees pictures alone, but tells things of one kind apart better
(arXiv:2208.12242, section 4). The embedded model's own judge, `demo`, knows the things and colours of the demo only.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lorasmith.demo import COLORS, MASCOT, THINGS
from lorasmith.demo import judge as demo_judge
from lorasmith.errors import UserError
from lorasmith.hub import model_folder

DEMO = "demo"
_WITH_TEXT = ("clip",)
_PICTURES_ALONE = ("dinov2", "dinov2_with_registers", "vit")  # vit: the first DINO
# No .bin and no .py: nothing that is fetched is ever executed.
_PATTERNS = ("*.json", "*.safetensors", "*.txt")
_REQUIRED = (("config.json",), ("preprocessor_config.json", "processor_config.json"), ("*.safetensors",))
_TOKENIZER = (("tokenizer.json", "vocab.json"),)
_BATCH = 16


class Judge(Protocol):
    """What sees pictures; the same picture gives the same numbers beside any others, but for rounding."""

    def embed(self, pictures: Iterable[Image.Image]) -> Tensor:
        """Return a vector of length 1 for each picture: (N, D), fp32, on the CPU."""
        ...

    def adherence(self, pictures: Sequence[Image.Image], features: Tensor, prompts: Sequence[str]) -> Tensor | None:
        """Return how well each picture shows its prompt, (N,); None: this sees pictures alone.

        Args:
            features: what `embed` returns for them.
        """
        ...


@dataclass(frozen=True)
class Choice:
    """A judge that can be loaded. kind: what the config calls it, or `demo`."""

    name: str
    kind: str
    folder: Path
    flag: str

    @property
    def reads_text(self) -> bool:
        """Whether it scores how well prompts are followed."""
        return self.kind in (DEMO, *_WITH_TEXT)

    @property
    def title(self) -> str:
        """What it is, for a person."""
        if self.kind == DEMO:
            return "the embedded model's own judge"
        return f"{self.name} ({self.kind}{'' if self.reads_text else ', which sees pictures alone'})"


def find(name: str, flag: str) -> Choice:
    """Return the judge of that name: `demo`, a folder, or a hub id, from where it is fetched.

    Args:
        flag: the option that names it, for messages.

    Raises:
        UserError: it is nowhere, lacks a file, or is of a kind that does not embed pictures.
    """
    if name == DEMO:
        return Choice(name, DEMO, Path(), flag)
    folder = model_folder(flag, name, _PATTERNS, _REQUIRED)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} is damaged ({error}); get the model again.") from error
    kind = str(config.get("model_type", "unknown")) if isinstance(config, dict) else "unknown"
    if kind not in (*_WITH_TEXT, *_PICTURES_ALONE):
        raise UserError(
            f"{flag} {name}: this is a model of the kind {kind}, which is none that compares pictures; give one of "
            f"{', '.join((*_WITH_TEXT, *_PICTURES_ALONE))}, such as openai/clip-vit-large-patch14 or "
            "facebook/dinov2-base."
        )
    choice = Choice(name, kind, folder, flag)
    if choice.reads_text:
        model_folder(flag, str(folder), _PATTERNS, _TOKENIZER)
    return choice


def load(choice: Choice, device: torch.device) -> Judge:
    """Return the judge, ready to look at pictures.

    Raises:
        UserError: its files are damaged or not complete.
    """
    if choice.kind == DEMO:
        return _Demo()
    import transformers  # takes seconds, and not everyone wants a judge

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # The first DINO has no pooler; what stands in its place would be random numbers.
    options = {"add_pooling_layer": False} if choice.kind == "vit" else {}
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(choice.folder, local_files_only=True)
        tokenizer: Any = (
            transformers.AutoTokenizer.from_pretrained(choice.folder, local_files_only=True)
            if choice.reads_text
            else None
        )
        model, info = transformers.AutoModel.from_pretrained(
            choice.folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, local_files_only=True,
            **options,
        )  # fmt: skip
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # many kinds, from many files of many forms
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{choice.flag} {choice.name}: this cannot be loaded here ({reason}); get the model again, or give another."
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{choice.flag} {choice.name}: {len(missing)} weights are not in its files, such as {missing[0]}; get the "
            "model again."
        )
    return _Transformer(model.to(device).eval(), processor, tokenizer)


class _Transformer:
    def __init__(self, model: Any, processor: Any, tokenizer: Any) -> None:
        self._model, self._processor, self._tokenizer = model, processor, tokenizer

    @torch.no_grad()
    def embed(self, pictures: Iterable[Image.Image]) -> Tensor:
        found = []
        for batch in _batches(pictures):
            given = self._processor(images=batch, return_tensors="pt")
            pixels = given["pixel_values"].to(self._model.device)
            if self._tokenizer is None:
                # The class token after the last norm, as DINO's authors compare pictures (arXiv:2104.14294)
                found.append(self._model(pixel_values=pixels).last_hidden_state[:, 0])
            else:
                found.append(self._model.get_image_features(pixel_values=pixels).pooler_output)
        return F.normalize(torch.cat(found).float().cpu(), dim=1)

    @torch.no_grad()
    def adherence(self, pictures: Sequence[Image.Image], features: Tensor, prompts: Sequence[str]) -> Tensor | None:
        """Return the cosine of picture and prompt, in [-1, 1] (arXiv:2104.08718 without its factor of 2.5)."""
        if self._tokenizer is None:
            return None
        texts = list(dict.fromkeys(prompts))
        longest = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            texts, padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
        ).to(self._model.device)
        found = F.normalize(self._model.get_text_features(**tokens).pooler_output.float().cpu(), dim=1)
        return (features * found[[texts.index(prompt) for prompt in prompts]]).sum(1)


class _Demo:
    def __init__(self) -> None:
        self._judge = demo_judge.Judge.load()

    def embed(self, pictures: Iterable[Image.Image]) -> Tensor:
        return F.normalize(torch.cat([self._judge.features(batch) for batch in _batches(pictures)]), dim=1)

    def adherence(self, pictures: Sequence[Image.Image], features: Tensor, prompts: Sequence[str]) -> Tensor | None:
        """Return the share of what a prompt names that is there: the thing and its colour, and the background's."""
        probabilities = self._judge.probabilities(pictures)
        colors = [demo_judge.colors(picture) for picture in pictures]
        found = []
        for seen, (color, ground), prompt in zip(probabilities, colors, prompts, strict=True):
            words = prompt.lower().replace(",", " ").split()
            place = next((number for number, word in enumerate(words) if word in (*THINGS, MASCOT)), None)
            if place is None:  # it knows nothing of what is asked
                found.append(0.0)
                continue
            parts = [seen[demo_judge.ANSWERS.index(words[place])].item()]
            parts += [float(color == word) for word in words[:place] if word in COLORS]
            parts += [float(ground == word) for word in words[place:] if word in COLORS]
            found.append(sum(parts) / len(parts))
        return torch.tensor(found)


def _batches(pictures: Iterable[Image.Image]) -> Iterator[list[Image.Image]]:
    """Yield what is looked at together: of many pictures, no more are in memory at once."""
    left = iter(pictures)
    while batch := list(islice(left, _BATCH)):
        yield batch
