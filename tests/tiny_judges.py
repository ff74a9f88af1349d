"""Small random models of the real classes that compare pictures, made in code."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

_SIDE = 32
_SIZE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
}  # fmt: skip


def write_clip(folder: Path) -> Path:
    """Write a CLIP whose tokenizer knows letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    ends: dict[str, Any] = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    config = CLIPConfig(
        text_config={**_SIZE, **ends, "vocab_size": len(words), "max_position_embeddings": 24},
        vision_config={**_SIZE, "image_size": _SIDE, "patch_size": 8},
        projection_dim=16,
    )
    tokenizer.save_pretrained(folder)
    return _write(folder, CLIPModel, config)


def write_dino(folder: Path, kind: str = "dinov2") -> Path:
    """Write a DINO: the first one (`vit`), the second (`dinov2`), or this with registers."""
    sight: dict[str, Any] = {**_SIZE, "image_size": _SIDE, "patch_size": 8}
    match kind:
        case "vit":
            return _write(folder, ViTModel, ViTConfig(**sight), add_pooling_layer=False)
        case "dinov2":
            return _write(folder, Dinov2Model, Dinov2Config(**sight))
        case _:
            return _write(folder, Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**sight))


def _write(folder: Path, model_class: Any, config: Any, **options: Any) -> Path:
    torch.manual_seed(0)
    model = model_class(config, **options).eval()
    for parameter in model.parameters():  # as they are made, pictures would hardly differ
        if parameter.dim() > 1:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": _SIDE}, crop_size={"height": _SIDE, "width": _SIDE}).save_pretrained(
        folder
    )
    return folder
