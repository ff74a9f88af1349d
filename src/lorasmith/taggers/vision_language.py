"""Models that see and talk, through transformers' AutoModelForImageTextToText: SmolVLM, Qwen-VL, LLaVA, Florence-2.

A prompt is what the model is asked; the answer is the caption.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from lorasmith.taggers import _generation
from lorasmith.taggers.base import CAPTIONS, CaptionerOptions

MAKES = CAPTIONS
DEFAULT_MODEL = "HuggingFaceTB/SmolVLM-500M-Instruct"
_QUESTION = "Describe this picture in one sentence: what is shown, its colours, its background and its style."
# Models that are not talked to but given a task.
_TASKS = {"florence2": "<DETAILED_CAPTION>"}


def load(options: CaptionerOptions) -> "VisionLanguage":
    """Return a model that sees and talks, of a folder or hub id.

    Raises:
        UserError: it is nowhere, incomplete, or not of this kind.
    """
    folder = _generation.folder_of(options.model or DEFAULT_MODEL)
    model, processor = _generation.load(AutoModelForImageTextToText, AutoProcessor, folder, options)
    return VisionLanguage(model, processor, options)


class VisionLanguage:
    """Captions pictures; see `load`."""

    def __init__(self, model: Any, processor: Any, options: CaptionerOptions) -> None:
        self._model, self._processor, self._options = model, processor, options
        self._text = self._prompt()
        processor.tokenizer.padding_side = "left"  # the answers begin where the prompts end
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token

    def _prompt(self) -> str:
        """Return the text that the model is given with each picture."""
        prompt = self._options.prompt
        if self._processor.chat_template is None:
            return prompt or _TASKS.get(self._model.config.model_type, "")
        content = [{"type": "image"}, {"type": "text", "text": prompt or _QUESTION}]
        return self._processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        inputs = self._processor(
            images=[[image] for image in images], text=[self._text] * len(images), padding=True, return_tensors="pt"
        ).to(self._options.device, self._options.dtype)
        # an encoder takes the question: the answer then begins with its start token alone
        begin = 1 if self._model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        _generation.check_length(self._model, self._options, begin)
        tokens = self._model.generate(**inputs, **_generation.arguments(self._options, images))[:, begin:]
        return self._processor.batch_decode(tokens, skip_special_tokens=True)
