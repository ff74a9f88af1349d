"""Which programs load which LoRA files, and what they leave out: facts as a table, each with the versions it rests on.

A file is described by its traits; a program's verdict is the worst over these.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from lorasmith.formats.dialects import AnyLora, kind_of

# Program -> what its column rests on. Run: loaded in tests; read: its source was read.
CLIENTS = {
    "diffusers": "0.42.1, run",
    "stable-diffusion.cpp": "in stable-diffusion-cpp-python 0.4.7, run",
    "InvokeAI": "6.14.2, its loader run",
    "ComfyUI": "2026, read",
    "A1111": "1.5 and forks, read",
    "Forge": "2024, read",
    "SD.Next": "its A1111 parts, read",
    "sd-scripts": "gen_img, read",
}
# From good to bad.
VERDICTS = {
    "ok": "loads all of it",
    "unknown": "not established",
    "part": "loads a part",
    "wrong": "loads it as plain LoRA: other pictures",
    "none": "loads nothing of it, without an error",
    "refused": "refuses the file",
}
_SHORT = {"+": "ok", "?": "unknown", "p": "part", "w": "wrong", "-": "none", "x": "refused"}

# Trait -> one letter for each program, in the order of CLIENTS.
_TABLE = {
    "kohya names": "++++++++",
    "no alpha": "++++++++",
    "text encoder without text_model": "+ppppppp",
    "text encoder called te1": "++p+++??",
    "LDM names for the U-Net": "x+-++???",
    "convolutions stored as matrices": "x+++++??",
    "lycoris_ names": "x--+????",
    "dotted names of diffusers and PEFT": "+pxp-p+-",
    "dotted names of diffusers 0.21": "+p??????",
    "attention processors": "++?+????",
    "raw PEFT": "--??????",
    "numbered pairs": "????????",
    "Tucker LoCon": "x+x++++?",
    "LoHa": "x++++++?",
    "LoKr": "x++++++?",
    "DoRA": "ww++?++?",
    "full": "x++++++?",
    "OFT": "x-x++?+?",
    "BOFT": "x-x+????",
    "IA3": "xxx-+?+?",
    "GLoRA": "x-x++++?",
    "norm": "x-+++++?",
    "bundled embedding": "x+xp+?+?",
    "another model family": "????????",
}
# What `lorasmith convert` puts right, as it writes what every program reads.
MENDABLE = _TABLE.keys() - {
    "kohya names", "no alpha", "Tucker LoCon", "LoHa", "LoKr", "DoRA", "full", "OFT", "BOFT", "IA3", "GLoRA", "norm",
    "another model family",
}  # fmt: skip
_DIALECT_TRAITS = {
    "kohya": "kohya names", "d8ahazard": "kohya names", "ldm": "LDM names for the U-Net", "lycoris": "lycoris_ names",
    "diffusers": "dotted names of diffusers and PEFT", "diffusers-0.21": "dotted names of diffusers 0.21",
    "diffusers-0.14": "attention processors", "peft": "raw PEFT", "cloneofsimo": "numbered pairs",
    "list": "numbered pairs",
}  # fmt: skip


def _any_key(pattern: str) -> Callable[[AnyLora], bool]:
    return lambda lora: any(re.match(pattern, name) for name in lora.names.values())


def _has_flat_convolutions(lora: AnyLora) -> bool:
    return lora.family == "sd1" and any(
        re.search(r"lora_unet_\w+_proj_(in|out)\.lora_down", name) and tensor.dim() == 2
        for name, tensor in lora.tensors.items()
    )


_TRAITS: dict[str, Callable[[AnyLora], bool]] = {
    "no alpha": lambda lora: not any(name.endswith(".alpha") for name in lora.tensors),
    "text encoder without text_model": _any_key(r"lora_te1?_encoder_layers_"),
    "text encoder called te1": lambda lora: lora.family != "sdxl" and _any_key("lora_te1_")(lora),
    "convolutions stored as matrices": _has_flat_convolutions,
    "bundled embedding": lambda lora: "a bundled embedding" in lora.extras.values(),
    "another model family": lambda lora: lora.family in ("flux", "sd3", "another"),
}


@dataclass(frozen=True)
class Verdict:
    """What a program makes of a file, and the traits that are why."""

    verdict: str
    because: tuple[str, ...]


def traits(lora: AnyLora) -> list[str]:
    """Return what of a file decides which programs load it."""
    layers = lora.layers().values()
    kinds = {str(kind_of(own)) for own in layers} | {"DoRA" for own in layers if "dora_scale" in own}
    return [
        _DIALECT_TRAITS[lora.dialect],
        *(trait for trait, has in _TRAITS.items() if has(lora)),
        *sorted(kinds & _TABLE.keys()),
    ]


def verdicts(lora: AnyLora) -> dict[str, Verdict]:
    """Return what each program makes of a file."""
    own, order = traits(lora), list(VERDICTS)
    found = {}
    for column, client in enumerate(CLIENTS):
        each = {trait: _SHORT[_TABLE[trait][column]] for trait in own}
        worst = max(each.values(), key=order.index)
        because = () if worst == "ok" else tuple(trait for trait, verdict in each.items() if verdict == worst)
        found[client] = Verdict(worst, because)
    return found
