"""Small random captioners of the real classes, and taggers whose scores are the mean colours; all made in code."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

WORDS = [
    *"abcdefgh",
    "the",
    "cat",
    "dog",
    "red",
    "on",
    "sofa",
    "photo",
    "of",
    "Describe",
    "this",
    "User",
    "Assistant",
    ":",
]
SIDE = 32
_TEMPLATE = (
    "{% for m in messages %}User: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}Assistant:"
)


def write_blip(folder: Path, seed: int = 0) -> Path:
    """Write a BLIP of a few thousand weights."""
    vocabulary = folder / "vocab.txt"
    folder.mkdir(parents=True)
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str.lower, WORDS)]))
    tokenizer = BertTokenizer(vocab=str(vocabulary))
    size = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    words: dict[str, Any] = dict(
        vocab_size=len(tokenizer), encoder_hidden_size=32, max_position_embeddings=64, projection_dim=16,
        bos_token_id=2, eos_token_id=3, sep_token_id=3, pad_token_id=0, **size,
    )  # fmt: skip
    sight: dict[str, Any] = dict(image_size=SIDE, patch_size=8, projection_dim=16, **size)
    config = BlipConfig(text_config=words, vision_config=sight, projection_dim=16, image_text_hidden_size=16)
    image_processor = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return _write(folder, BlipForConditionalGeneration(config), BlipProcessor(image_processor, tokenizer), seed)


def write_idefics3(folder: Path, seed: int = 8) -> Path:
    """Write a model of SmolVLM's kind, with its chat template."""
    specials = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    specials += [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    tokenizer = _tokenizer(specials)
    sight = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": 8,
    }  # fmt: skip
    config = Idefics3Config(
        vision_config=sight, text_config=_llama(tokenizer), scale_factor=2, image_token_id=_image_token(tokenizer),
    )  # fmt: skip
    image_processor = Idefics3ImageProcessorPil(
        size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=True
    )
    processor = Idefics3Processor(image_processor, tokenizer, image_seq_len=4, chat_template=_TEMPLATE)
    return _write(folder, Idefics3ForConditionalGeneration(config), processor, seed)


def write_llava(folder: Path, seed: int = 0) -> Path:
    """Write a model of LLaVA's kind, with its chat template."""
    tokenizer = _tokenizer(["<image>"])
    sight = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8, "projection_dim": 16,
    }  # fmt: skip
    config = LlavaConfig(vision_config=sight, text_config=_llama(tokenizer), image_token_index=_image_token(tokenizer))
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(
        image_processor, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=_TEMPLATE,
        num_additional_image_tokens=1,
    )  # fmt: skip
    return _write(folder, LlavaForConditionalGeneration(config), processor, seed)


def write_florence2(folder: Path, seed: int = 0) -> Path:
    """Write a model of Florence-2's kind, which has tasks instead of a chat template."""
    tokenizer = _tokenizer(["<image>"])
    sight = {
        "depths": (1, 1), "patch_size": (7, 3), "patch_stride": (4, 2), "patch_padding": (3, 1),
        "patch_prenorm": (False, True), "embed_dim": (16, 32), "num_heads": (2, 2), "num_groups": (2, 2),
        "window_size": 4, "projection_dim": 32,
    }  # fmt: skip
    words = {
        "model_type": "bart", "vocab_size": len(tokenizer), "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
        "decoder_start_token_id": 2, "forced_eos_token_id": None,
    }  # fmt: skip
    config = Florence2Config(vision_config=sight, text_config=words, image_token_id=_image_token(tokenizer))
    image_processor = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_seq_length=17
    )
    processor = Florence2Processor(image_processor, tokenizer)
    return _write(folder, Florence2ForConditionalGeneration(config), processor, seed)


def _image_token(tokenizer: PreTrainedTokenizerFast) -> int:
    number = tokenizer.convert_tokens_to_ids("<image>")
    assert isinstance(number, int)
    return number


def _llama(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip


def _tokenizer(specials: Sequence[str]) -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", "<pad>", *WORDS]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    return tokenizer


def _write(folder: Path, model: Any, processor: Any, seed: int) -> Path:
    transformers.logging.set_verbosity_error()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            weight.copy_(scale + 0.4 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_tagger(
    folder: Path,
    tags: Sequence[tuple[str, int, tuple[float, float, float, float]]],
    *,
    side: int | None = 8,
    batch: int | None = None,
    header: str = "tag_id,name,category,count",
    channels: int = 3,
    clips: bool = True,
) -> Path:
    """Write a WD14-like graph: a tag's score is its weights (red, green, blue, constant) times the mean colour.

    Args:
        side, batch: what the graph's input fixes; None: anything.
        clips: keep the scores in [0, 1]; else they are ten times as large.
    """
    folder.mkdir(parents=True)
    weights = np.array([one[2] for one in tags], np.float32).T  # (4, tags)
    blue_first = np.ascontiguousarray(weights[[2, 1, 0]][:channels]) / 255
    nodes = [
        helper.make_node("ReduceMean", ["input", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], ["product"]),
        helper.make_node("Add", ["product", "constant"], ["sum"]),
        helper.make_node("Clip", ["sum", "low", "high"], ["output"])
        if clips
        else helper.make_node("Mul", ["sum", "ten"], ["output"]),
    ]
    values = {
        "axes": np.array([1, 2], np.int64), "weights": blue_first, "constant": weights[3],
        "low": np.float32(0), "high": np.float32(1), "ten": np.float32(10),
    }  # fmt: skip
    height, width = ("h", "w") if side is None else (side, side)
    taken = helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch or "N", height, width, channels])
    given = helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch or "N", len(tags)])
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "tagger", [taken], [given], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    with (folder / "selected_tags.csv").open("w", encoding="utf-8", newline="") as file:
        file.write(header + "\n")
        writer = csv.writer(file)
        for number, (name, category, _) in enumerate(tags):
            writer.writerow([number, name, category, 100])
    return folder
