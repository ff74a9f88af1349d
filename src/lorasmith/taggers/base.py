"""The seam of what names pictures: captioners (a text for each picture) and taggers (tags with scores).

A plug is a module with one function:

    load(options) -> object; called with a list of upright RGB pictures, it returns as many results

A captioner's `load` takes `CaptionerOptions` and its results are texts; a tagger's takes `TaggerOptions`, and its
results are lists of `ScoredTag`. Ours say which they are with `MAKES`. A result may depend on its picture and the
options only, never on its neighbours: captions must not change with the batch size, the order or the shard.
"""

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image

from lorasmith import plugins
from lorasmith.data.tags import ScoredTag
from lorasmith.devices import DTYPES, check_device, choose_device, choose_precision
from lorasmith.errors import UserError

CAPTIONS, TAGS = "captions", "tags"
_COMMANDS = {CAPTIONS: ("--captioner", "lorasmith caption"), TAGS: ("--tagger", "lorasmith tag")}


@dataclass(frozen=True)
class CaptionerOptions:
    """What a captioner is loaded with.

    model: a folder or a hub id; None: the captioner's own default. max_length, min_length: new tokens of a caption.
    top_p: None for the likeliest words, else nucleus sampling with draws that follow from `seed` and the picture.
    prompt: None: the captioner's own default.
    """

    model: str | None
    device: torch.device
    dtype: torch.dtype
    max_length: int
    min_length: int
    beams: int
    top_p: float | None
    seed: int
    prompt: str | None


@dataclass(frozen=True)
class TaggerOptions:
    """What a tagger is loaded with.

    model: a folder or a hub id; None: the tagger's own default. providers: where to compute, in the tagger's own words.
    lowest_score: tags below need not be returned, but for ratings, of which all are.
    """

    model: str | None
    providers: str
    lowest_score: float


class Captioner(Protocol):
    def __call__(self, images: Sequence[Image.Image]) -> list[str]: ...


class Tagger(Protocol):
    def __call__(self, images: Sequence[Image.Image]) -> list[list[ScoredTag]]: ...


def loader(name: str, makes: str) -> Callable[[Any], Any]:
    """Return the `load` of a captioner or tagger: a file of this folder (`vision-language`), or a dotted name.

    Raises:
        UserError: there is no such plug, it has no `load`, or it makes the other kind.
    """
    flag = _COMMANDS[makes][0]
    try:
        plug = plugins.find("taggers", name if "." in name else name.replace("-", "_"))
    except UserError as error:
        raise UserError(f"{flag} {name}: {error}") from error
    if not inspect.ismodule(plug) or not callable(vars(plug).get("load")):
        raise UserError(f"{flag} {name}: expected a module with a function load(options), found {plug!r:.80}.")
    made = vars(plug).get("MAKES", makes)
    if made != makes:
        raise UserError(f"{flag} {name}: this makes {made}, not {makes}; it belongs to `{_COMMANDS[made][1]}`.")
    return plug.load


def choose_home(device: str, precision: str) -> tuple[torch.device, torch.dtype]:
    """Return where a captioner computes, and in which precision; of several processes each has a GPU of its own.

    Raises:
        UserError: there is no such device, or it cannot compute in this precision.
    """
    check_device(device)
    name = choose_device(device)
    if name == "cuda":
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    home = torch.device(name)
    return home, DTYPES[choose_precision(precision, home)]
