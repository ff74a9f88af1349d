"""What is written of a picture into its file and its name."""

from contextlib import suppress
from pathlib import Path

import lorasmith
from lorasmith.cache_folder import default_place, open_cache
from lorasmith.checkpoint import Checkpoint, file_sha256
from lorasmith.config import DrawConfig
from lorasmith.errors import UserError
from lorasmith.file_facts import FileFacts
from lorasmith.picture_run.loras import Loras
from lorasmith.picture_run.pictures import Picture
from lorasmith.prompt_syntax import LoraTag

_WEBUI_SAMPLERS = {
    "dpm++": "DPM++ 2M", "ddim": "DDIM", "euler": "Euler", "euler_a": "Euler a", "heun": "Heun", "dpm_2": "DPM2",
    "dpm_2_a": "DPM2 a", "lms": "LMS", "pndm": "PLMS", "unipc": "UniPC",
}  # fmt: skip
_KARRAS_UNLESS_SAID = ("dpm++", "dpm_2", "dpm_2_a")  # by WebUI, which calls our normal sigmas uniform


def shown_prompt(one: Picture) -> str:
    """Return the prompt as WebUI takes it, with all LoRAs in it."""
    return " ".join([one.prompt, *(_tag(tag) for tag in one.loras)])


def _tag(tag: LoraTag) -> str:
    strengths = [tag.unet] if tag.unet == tag.text_encoder else [tag.text_encoder, tag.unet]
    return f"<lora:{tag.name}:{':'.join(f'{strength:g}' for strength in strengths)}>"


def facts_of(cfg: DrawConfig, one: Picture, loras: Loras) -> dict[str, str]:
    """Return what is written into this picture of its own, by WebUI's names."""
    hashes = ", ".join(f"{name}: {digits}" for name, digits in loras.hashes(one.loras).items())
    return {
        "Steps": str(one.steps),
        "Sampler": _WEBUI_SAMPLERS.get(one.sampler, one.sampler),
        **_schedule_type(cfg.sigmas, one.sampler),
        "CFG scale": f"{one.guidance:g}",
        "Seed": str(one.seed),
        "Size": f"{one.size[0]}x{one.size[1]}",
        **({} if one.denoise is None else {"Denoising strength": f"{one.denoise:g}"}),
        **({} if one.negative_guidance is None else {"Negative guidance": f"{one.negative_guidance:g}"}),
        **({"Lora hashes": hashes} if hashes else {}),
    }


def _schedule_type(sigmas: str, sampler: str) -> dict[str, str]:
    if sigmas == "normal":
        return {"Schedule type": "Uniform"} if sampler in _KARRAS_UNLESS_SAID else {}
    return {"Schedule type": sigmas.capitalize()}


def facts_of_all(cfg: DrawConfig, checkpoint: Checkpoint) -> dict[str, str]:
    """Return what is written into every picture after what is its own."""
    facts = {"Model": model_name(cfg)}
    if checkpoint.path.is_file():
        facts = {"Model hash": known_sha256(checkpoint.path)[:10], **facts}
    if cfg.vae is not None:
        facts["VAE"] = Path(cfg.vae).name
    if cfg.clip_skip > 1:
        facts["Clip skip"] = str(cfg.clip_skip)
    if cfg.zero_terminal_snr:
        facts["Noise Schedule"] = "Zero Terminal SNR"
    if cfg.guidance_rescale:
        facts["CFG Rescale"] = f"{cfg.guidance_rescale:g}"
    if cfg.pag_scale:
        facts |= {"PAG Scale": f"{cfg.pag_scale:g}", "PAG Layers": " ".join(cfg.pag_layers)}
    return {**facts, "RNG": "CPU", "Version": f"lorasmith {lorasmith.__version__}"}  # WebUI draws noise on the GPU else


def known_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, which is found out once and kept in the cache folder: models are gigabytes."""
    cache = None
    with suppress(UserError):  # that folder holds other things; without it this only takes longer
        cache = open_cache(default_place(), lambda _: None)
    if cache is None:
        return file_sha256(path)
    facts = FileFacts(cache / "facts", "sha256")
    if path in (known := facts.known([path])):
        return known[path]
    found = file_sha256(path)
    with suppress(OSError, UserError):
        facts.remember({path: found})
    return found


def model_name(cfg: DrawConfig) -> str:
    """Return what the base model is called."""
    path = Path(cfg.base)
    return path.name if path.is_dir() else path.stem


def fields_of(cfg: DrawConfig, one: Picture) -> dict[str, str]:
    """Return what fields in a pattern of file names stand for."""
    return {
        "seed": str(one.seed),
        "prompt": one.prompt,
        "model": model_name(cfg),
        "sampler": one.sampler,
        "steps": str(one.steps),
        "guidance": f"{one.guidance:g}",
        "width": str(one.size[0]),
        "height": str(one.size[1]),
    }
