"""BLIP (Li et al. 2022, https://arxiv.org/abs/2201.12086): the captioner of the document; short captions, quick.

A prompt is how each caption begins: "a photograph of".
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BlipForConditionalGeneration, BlipProcessor

from lorasmith.errors import UserError
from lorasmith.taggers import _generation
from lorasmith.taggers.base import CAPTIONS, CaptionerOptions

MAKES = CAPTIONS
DEFAULT_MODEL = "Salesforce/blip-image-captioning-large"


def load(options: CaptionerOptions) -> "Blip":
    """Return BLIP of a folder or hub id.

    Raises:
        UserError: it is nowhere, incomplete, or no BLIP.
    """
    folder = _generation.folder_of(options.model or DEFAULT_MODEL)
    kind = _generation.kind_of(folder)
    if kind != "blip":
        raise UserError(
            f"--model {options.model}: this is a model of the kind {kind}, not BLIP; try --captioner vision-language."
        )
    return Blip(*_generation.load(BlipForConditionalGeneration, BlipProcessor, folder, options), options)


class Blip:
    """Captions pictures; see `load`."""

    def __init__(self, model: BlipForConditionalGeneration, processor: Any, options: CaptionerOptions) -> None:
        self._model, self._processor, self._options = model, processor, options

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        prompt = self._options.prompt
        text = {"text": [prompt] * len(images)} if prompt else {}
        inputs = self._processor(images=list(images), return_tensors="pt", **text)
        inputs = inputs.to(self._options.device, self._options.dtype)
        _generation.check_length(self._model, self._options, inputs["input_ids"].shape[1] if prompt else 1)
        tokens = self._model.generate(**inputs, **_generation.arguments(self._options, images))
        return self._processor.batch_decode(tokens, skip_special_tokens=True)
