"""What captioners of transformers have in common: loading without surprises, and draws that belong to the picture."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from lorasmith.errors import UserError
from lorasmith.hub import model_folder
from lorasmith.seeds import derive
from lorasmith.taggers.base import CaptionerOptions

# No .bin and no .py: nothing that is fetched is ever executed.
_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "*.spm")
_REQUIRED = (
    ("config.json",),
    ("preprocessor_config.json", "processor_config.json"),
    _TOKENIZERS,
    ("*.safetensors",),
)


def folder_of(name: str) -> Path:
    """Return the folder of a captioner of transformers.

    Raises:
        UserError: it is nowhere, or lacks a file.
    """
    return model_folder("--model", name, _PATTERNS, _REQUIRED)


def kind_of(folder: Path) -> str:
    """Return what a model's config calls its kind: `blip`, `idefics3`, `qwen2_vl`, ...

    Raises:
        UserError: the config is no JSON object.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} is damaged ({error}); get the model again.") from error
    return str(config.get("model_type", "unknown")) if isinstance(config, dict) else "unknown"


def load(model_class: Any, processor_class: Any, folder: Path, options: CaptionerOptions) -> tuple[Any, Any]:
    """Return model and processor of a folder, complete and ready to generate.

    Raises:
        UserError: something else, damaged, or without all weights: transformers would fill those with random numbers.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        processor = processor_class.from_pretrained(folder, local_files_only=True)
        model, info = model_class.from_pretrained(
            folder, dtype=options.dtype, use_safetensors=True, output_loading_info=True, local_files_only=True
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # many kinds, from many files of many forms
        lines = str(error).strip().splitlines()
        raise UserError(
            f"--model {options.model or folder}: this cannot be loaded as a captioner here "
            f"({lines[0] if lines else type(error).__name__}); give a model that transformers reads without code of "
            "its own, or another --captioner."
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"--model {options.model or folder}: {len(missing)} weights are not in its files, such as {missing[0]}; "
            "get the model again, or give one of this kind."
        )
    return model.to(options.device).eval(), processor


def arguments(options: CaptionerOptions, images: Sequence[Image.Image]) -> dict[str, Any]:
    """Return how `generate` is to be called for these pictures, whatever sampling the model's own files ask for."""
    processors = LogitsProcessorList()
    if options.top_p is not None:
        processors.append(NucleusDraws(options.top_p, [picture_seed(options.seed, image) for image in images]))
    return {
        "max_new_tokens": options.max_length,
        "min_new_tokens": options.min_length,
        "num_beams": options.beams,
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "logits_processor": processors,
    }


def check_length(model: Any, options: CaptionerOptions, num_tokens: int) -> None:
    """Check that a caption of the greatest length has room after so many tokens: models have a number of positions.

    Raises:
        UserError: it has not, so that the model would fail in the middle of a caption, or talk nonsense.
    """
    limit = model.config.get_text_config(decoder=True).to_dict().get("max_position_embeddings")
    if limit is not None and num_tokens + options.max_length > limit:
        raise UserError(
            f"--max-length {options.max_length}: the model has room for {limit} tokens, of which prompt and picture "
            f"take {num_tokens}; give at most {max(1, limit - num_tokens)}, or a shorter --prompt."
        )


def picture_seed(seed: int, image: Image.Image) -> int:
    """Return a seed that follows from the picture's pixels."""
    digest = hashlib.blake2b(image.tobytes(), digest_size=8).digest()
    return derive(seed, "caption", *image.size, int.from_bytes(digest, "big"))


class NucleusDraws(LogitsProcessor):
    """Nucleus sampling (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751) with a generator for each picture.

    torch's own draws one number after another for a whole batch, so a caption would depend on its neighbours. Here each
    row draws from (its seed, number of the token) by the Gumbel-max trick: the largest of log p + Gumbel noise is
    distributed as p. Every other word is then ruled out, so that greedy search takes the one drawn.
    """

    def __init__(self, top_p: float, seeds: Sequence[int]) -> None:
        self._top_p, self._seeds, self._num_tokens = top_p, seeds, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, T), (B, V) -> (B, V)
        ordered, places = scores.float().sort(dim=-1, descending=True, stable=True)
        shares = ordered.softmax(dim=-1)
        ordered = ordered.masked_fill(shares.cumsum(dim=-1) - shares >= self._top_p, float("-inf"))
        nucleus = torch.full_like(ordered, float("-inf")).scatter(-1, places, ordered)
        noise = torch.stack([self._gumbel(seed, scores.shape[-1]) for seed in self._seeds]).to(scores.device)
        self._num_tokens += 1
        drawn = (nucleus + noise).argmax(dim=-1, keepdim=True)  # (B, 1)
        return torch.full_like(scores, float("-inf")).scatter(-1, drawn, 0.0)

    def _gumbel(self, seed: int, size: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive(seed, "token", self._num_tokens))
        return torch.empty(size).exponential_(generator=generator).log_().neg_()
