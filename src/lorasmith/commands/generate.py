"""`lorasmith generate`: pictures from a base model and LoRAs.

    lorasmith generate "a photo of a robot" --base v1-5.safetensors --lora robot.safetensors --strength 0.8

All is checked before the model is loaded, and each picture is written as soon as it is drawn.
"""

import difflib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps

import lorasmith
from lorasmith import merging, model_families, prompt_syntax, prompts
from lorasmith.checkpoint import Checkpoint, file_sha256, open_checkpoint
from lorasmith.command_line import harmless
from lorasmith.config import GenerateConfig
from lorasmith.data.buckets import Size
from lorasmith.data.images import open_image
from lorasmith.errors import UserError
from lorasmith.formats import embeddings
from lorasmith.memory import set_attention
from lorasmith.merging import Addition, Strength
from lorasmith.metadata import model_hash
from lorasmith.model_families import AdapterPlace
from lorasmith.models.base import LatentDiffusion, ModelFacts
from lorasmith.models.embeddings import Embeddings
from lorasmith.picture_files import PictureFolder, parameters
from lorasmith.processes import choose_device
from lorasmith.progress import counted
from lorasmith.prompt_syntax import LoraTag
from lorasmith.prompts import Prompt
from lorasmith.sampling import Beginning, Wish, check_settings, draw, drawn_steps, sampler_named
from lorasmith.seeds import derive
from lorasmith.training_run.loading import DTYPES
from lorasmith.training_run.preparation import check_device, choose_precision

Value = TypeVar("Value")
_LORA_SUFFIXES = (".safetensors", ".pt", ".ckpt", ".bin")
_LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Picture:
    """One picture to draw: its prompt without LoRAs, and these in their order; `size` in pixels (w, h)."""

    prompt: str
    negative: str
    size: Size
    seed: int
    steps: int
    guidance: float
    sampler: str
    loras: tuple[LoraTag, ...]

    @property
    def settings(self) -> tuple[Size, int, float, str]:
        """What pictures must have in common to be drawn at once."""
        return self.size, self.steps, self.guidance, self.sampler


def run(cfg: GenerateConfig) -> int:
    """Draw all pictures and return the exit code, 0."""
    if not cfg.base:
        raise UserError("missing: --base, the base model. For example: --base v1-5-pruned.safetensors")
    check_device(cfg.device)
    device = torch.device(choose_device(cfg.device))
    precision = choose_precision(cfg.precision, device)
    with open_checkpoint(cfg.base) as checkpoint:
        facts = model_families.describe(checkpoint, prediction=cfg.prediction, vae=cfg.vae)
        found, notes = embeddings.read(cfg.embeddings, width=facts.text_width)
        loras = Loras(cfg, checkpoint)
        first_seed = random.SystemRandom().randrange(2**32) if cfg.seed is None else cfg.seed
        init, mask = (None if path is None else open_image(path) for path in (cfg.init, cfg.mask))
        if init is not None and mask is not None and init.size != mask.size:
            raise UserError(
                f"--mask {cfg.mask} is {mask.width}x{mask.height}, and {cfg.init} is {init.width}x{init.height}; give "
                "a mask of the picture's size."
            )
        pictures = _pictures(cfg, facts, first_seed, init, loras)
        folder = PictureFolder(cfg.output, cfg.name, cfg.form)
        for line in [f"{cfg.base}: {facts.title}, predicts {facts.prediction}", *facts.notes, *notes, *loras.told()]:
            print(harmless(line))
        if cfg.seed is None and any(one.seed == first_seed for one in pictures):
            print(f"seed {first_seed}, a random one; give it with --seed to draw the same again")
        common = _facts_of_all(cfg, checkpoint, loras)
        try:
            model = _load(cfg, checkpoint, facts, precision, device, found)
            shown = counted(
                _drawn(cfg, model, pictures, init, mask, loras), len(pictures), "drawing", is_shown=cfg.progress
            )
            for one, picture in shown:
                text = parameters(_shown_prompt(one), one.negative, {**_facts_of(cfg, one), **common})
                folder.add(picture, text, _fields(cfg, one))
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
                raise
            raise UserError(_out_of_memory(cfg, pictures, precision, device, error)) from error
    print(f"{cfg.output}: {len(pictures)} pictures")
    return 0


# --- what to draw -----------------------------------------------------------------------------------------------------


def _pictures(
    cfg: GenerateConfig, facts: ModelFacts, first_seed: int, init: Image.Image | None, loras: "Loras"
) -> list[Picture]:
    """Return all pictures, checked; of the size of the one that is drawn on from, where none is said."""
    size = cfg.size or facts.resolution
    if init is not None and cfg.size is None:
        width, height = (max(side // facts.latent_factor, 1) * facts.latent_factor for side in init.size)
        size = width, height
    found = [picture for prompt in _prompts(cfg) for picture in _of_prompt(cfg, size, prompt, first_seed, loras)]
    for one in found:
        if init is not None and not drawn_steps(one.steps, cfg.denoise):
            raise UserError(f"--denoise {cfg.denoise:g} of {one.steps} steps is less than one; give more of either.")
    for one in found:
        if one.seed > _LARGEST_SEED:
            raise UserError(f"seed {one.seed} is too large; seeds go up to {_LARGEST_SEED}.")
    for size, steps, _, sampler in dict.fromkeys(one.settings for one in found):
        check_settings(facts, size, steps, sampler, cfg.sigmas)
    return found


def _prompts(cfg: GenerateConfig) -> list[Prompt]:
    if cfg.prompts is None:
        if not cfg.prompt:
            raise UserError('missing: what to draw. For example: lorasmith generate "a photo of a cat" --base ...')
        return [prompts.parse(line) for line in cfg.prompt]
    if not prompts.is_file([str(cfg.prompts)]):
        raise UserError(f"--prompts {cfg.prompts}: expected a file that ends in .txt, .toml or .json.")
    return prompts.read_file(cfg.prompts)


def _of_prompt(cfg: GenerateConfig, size: Size, prompt: Prompt, first_seed: int, loras: "Loras") -> Iterator[Picture]:
    """Return the pictures of one prompt; all its variants are drawn from the same seeds."""
    texts = prompt_syntax.variants(prompt.text) if cfg.all_variants else [prompt.text]
    width, height = size
    for text in texts:
        for number in range(cfg.images):
            seed = _or(prompt.seed, first_seed) + number
            negative = _or(prompt.negative, cfg.negative)
            if not cfg.all_variants:
                text = prompt_syntax.chosen(prompt.text, random.Random(derive(seed, "variants of a prompt")))
            negative = prompt_syntax.chosen(negative, random.Random(derive(seed, "variants of a negative prompt")))
            shown, tags = prompt_syntax.take_loras(text)
            yield Picture(
                prompt=shown,
                negative=negative,
                size=(_or(prompt.width, width), _or(prompt.height, height)),
                seed=seed,
                steps=_or(prompt.steps, cfg.steps),
                guidance=_or(prompt.guidance, cfg.guidance),
                sampler=sampler_named(_or(prompt.sampler, cfg.sampler)),
                loras=loras.used(tags),
            )


def _or(value: Value | None, otherwise: Value) -> Value:
    return otherwise if value is None else value


class Loras:
    """The LoRAs that are given, and those that prompts name, read and checked when first asked for.

    Raises:
        UserError: one does not fit the model, or two have the same name.
    """

    def __init__(self, cfg: GenerateConfig, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._family, self._places = "", dict[str, AdapterPlace]()
        self._folder = cfg.lora_folder
        self._files = _by_name(cfg.lora)
        if cfg.lora_folder is not None:
            if not cfg.lora_folder.is_dir():
                raise UserError(f"--lora-folder {cfg.lora_folder}: there is no such folder.")
            lying = [path for path in sorted(cfg.lora_folder.rglob("*")) if path.suffix in _LORA_SUFFIXES]
            self._files = {**_by_name(lying), **self._files}
        self._read: dict[str, Addition] = {}
        plain = cfg.strength or [1.0] * len(cfg.lora)
        strengths = zip(cfg.lora, cfg.unet_strength or plain, cfg.text_encoder_strength or plain, strict=True)
        self._given = [LoraTag(path.stem, unet, text) for path, unet, text in strengths]
        for tag in self._given:
            self._addition(tag.name)

    def used(self, tags: Sequence[LoraTag]) -> tuple[LoraTag, ...]:
        """Return what a picture is drawn with: those given, at a strength that its prompt says, and others it names.

        Raises:
            UserError: a prompt names one that there is not, or names one twice.
        """
        named: dict[str, LoraTag] = {}
        for tag in tags:
            if tag.name in named:
                raise UserError(f"a prompt names <lora:{tag.name}> twice; leave one of them out.")
            self._addition(tag.name)
            named[tag.name] = tag
        found = {tag.name: tag for tag in self._given} | named
        return tuple(tag for tag in found.values() if tag.unet or tag.text_encoder)

    def additions(self, tags: Sequence[LoraTag]) -> list[Addition]:
        """Return these LoRAs at their strengths."""
        strengths = [(self._read[tag.name], Strength(tag.unet, tag.text_encoder)) for tag in tags]
        return [addition.at(strength, self._places) for addition, strength in strengths]

    def hashes(self) -> dict[str, str]:
        """Return the hash of each LoRA that is used, as WebUI shows it: 12 digits of that of its tensors."""
        return {name: _lora_hash(addition.file.files[0])[:12] for name, addition in self._read.items()}

    def told(self) -> list[str]:
        """Return a line for each LoRA."""
        return [
            f"{one.file.path}: {len(one.factors)} layers"
            + (f", {len(one.unknown)} that the model does not have" if one.unknown else "")
            for one in self._read.values()
        ]

    def _addition(self, name: str) -> Addition:
        if name not in self._read:
            if name not in self._files:
                near = difflib.get_close_matches(name, self._files, n=1)
                where = "among --lora" + (f" or in {self._folder}" if self._folder else "; give --lora-folder")
                hint = f"did you mean {near[0]}?" if near else f"it is looked for {where}."
                raise UserError(f"<lora:{name}>: there is no LoRA of that name; {hint}")
            if not self._family:
                self._family, self._places, _ = model_families.adapter_places(self._checkpoint)
            self._read[name] = merging.plan(self._files[name], self._family, self._places, Strength())
        return self._read[name]


def _by_name(paths: Sequence[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        if path.stem in found:
            raise UserError(
                f"{found[path.stem]} and {path} have the same name, {path.stem}, so a prompt cannot say which is "
                "meant; rename one of them, or give it alone."
            )
        found[path.stem] = path
    return found


def _lora_hash(path: Path) -> str:
    return model_hash(path.read_bytes()) if path.suffix == ".safetensors" else file_sha256(path)


# --- drawing ----------------------------------------------------------------------------------------------------------


def _load(
    cfg: GenerateConfig,
    checkpoint: Checkpoint,
    facts: ModelFacts,
    precision: str,
    device: torch.device,
    found: Embeddings,
) -> LatentDiffusion:
    model = model_families.load(
        checkpoint,
        dtype=DTYPES[precision],
        device=device,
        vae=cfg.vae,
        prediction=facts.prediction,
        clip_skip=cfg.clip_skip,
        ema=cfg.ema,
        max_token_length=None,
        weighted_captions=True,
        embeddings=found,
    )
    if cfg.zero_terminal_snr:
        model.schedule = model.schedule.with_zero_terminal_snr()
    set_attention(model, cfg.attention)
    return model


def _drawn(
    cfg: GenerateConfig,
    model: LatentDiffusion,
    pictures: Sequence[Picture],
    init: Image.Image | None,
    mask: Image.Image | None,
    loras: Loras,
) -> Iterator[tuple[Picture, Image.Image]]:
    """Yield each picture when it is drawn, in their order."""
    for tags, same in groupby(pictures, key=lambda one: one.loras):
        with merging.applied(model, loras.additions(tags), is_folded=cfg.fold):
            for (size, steps, guidance, sampler), alike in groupby(same, key=lambda one: one.settings):
                rest, beginning = list(alike), None if init is None else _beginning(cfg, model, init, mask, size)
                while rest:
                    batch, rest = rest[: cfg.batch_size], rest[cfg.batch_size :]
                    drawn = draw(
                        model,
                        _wishes(model, batch),
                        seeds=[one.seed for one in batch],
                        size=size,
                        steps=steps,
                        guidance=guidance,
                        sampler=sampler,
                        sigmas=cfg.sigmas,
                        rescale=cfg.guidance_rescale,
                        beginning=beginning,
                    )
                    yield from zip(batch, drawn, strict=True)


def _beginning(
    cfg: GenerateConfig, model: LatentDiffusion, init: Image.Image, mask: Image.Image | None, size: Size
) -> Beginning:
    """Return what to draw on from: the picture made as large as is needed, and what is too much cut off its sides."""
    fitted = np.asarray(ImageOps.fit(init.convert("RGB"), size, Image.Resampling.LANCZOS), dtype=np.float32)
    pixels = torch.from_numpy(fitted).permute(2, 0, 1)[None] / 127.5 - 1
    if mask is None:
        return Beginning(model.encode_image(pixels), cfg.denoise)
    latent_size = (size[0] // model.latent_factor, size[1] // model.latent_factor)
    shares = ImageOps.fit(mask.convert("L"), size, Image.Resampling.BOX).resize(latent_size, Image.Resampling.BOX)
    return Beginning(
        model.encode_image(pixels), cfg.denoise, torch.from_numpy(np.asarray(shares, np.float32))[None, None] / 255
    )


@torch.no_grad()
def _wishes(model: LatentDiffusion, batch: Sequence[Picture]) -> list[Wish]:
    """Return what each picture is to show; every text is encoded alone, so none depends on another's length."""
    texts = dict.fromkeys(text for one in batch for text in (one.negative, *dict(prompt_syntax.composed(one.prompt))))
    encoded = {text: model.encode_text([text]) for text in texts}
    wishes = []
    for one in batch:
        parts = prompt_syntax.composed(one.prompt)
        is_guided = one.guidance > 1 or len(parts) > 1
        wishes.append(
            Wish([(encoded[text], weight) for text, weight in parts], encoded[one.negative] if is_guided else None)
        )
    return wishes


def _out_of_memory(
    cfg: GenerateConfig, pictures: Sequence[Picture], precision: str, device: torch.device, error: BaseException
) -> str:
    width, height = max((one.size for one in pictures), key=lambda size: size[0] * size[1])
    ways = [
        *([f"a lower --batch-size than {cfg.batch_size}"] if cfg.batch_size > 1 else []),
        *(["--precision bf16, which takes half"] if precision == "fp32" else []),
        *(["--attention sdpa"] if cfg.attention == "plain" else []),
        f"a smaller --size than {width},{height}",
        "closing other programs",
    ]
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return (
        f"{device} has too little memory for this. What to try, in this order: {'; '.join(ways)}. The pictures that "
        f"were drawn are in {cfg.output}. ({reason})"
    )


# --- what is written --------------------------------------------------------------------------------------------------

_WEBUI_SAMPLERS = {
    "dpm++": "DPM++ 2M", "ddim": "DDIM", "euler": "Euler", "euler_a": "Euler a", "heun": "Heun", "dpm_2": "DPM2",
    "dpm_2_a": "DPM2 a", "lms": "LMS", "pndm": "PLMS", "unipc": "UniPC",
}  # fmt: skip


def _shown_prompt(one: Picture) -> str:
    """Return the prompt as WebUI takes it, with all LoRAs in it."""
    return " ".join([one.prompt, *(_tag(tag) for tag in one.loras)])


def _tag(tag: LoraTag) -> str:
    strengths = [tag.unet] if tag.unet == tag.text_encoder else [tag.text_encoder, tag.unet]
    return f"<lora:{tag.name}:{':'.join(f'{strength:g}' for strength in strengths)}>"


def _facts_of(cfg: GenerateConfig, one: Picture) -> dict[str, str]:
    return {
        "Steps": str(one.steps),
        "Sampler": _WEBUI_SAMPLERS.get(one.sampler, one.sampler),
        **({} if cfg.sigmas == "normal" else {"Schedule type": cfg.sigmas.capitalize()}),
        "CFG scale": f"{one.guidance:g}",
        "Seed": str(one.seed),
        "Size": f"{one.size[0]}x{one.size[1]}",
    }


def _facts_of_all(cfg: GenerateConfig, checkpoint: Checkpoint, loras: Loras) -> dict[str, str]:
    """Return what is written into every picture after what is its own."""
    facts = {"Model": _model_name(cfg)}
    if checkpoint.path.is_file():
        facts = {"Model hash": file_sha256(checkpoint.path)[:10], **facts}
    if cfg.vae is not None:
        facts["VAE"] = Path(cfg.vae).name
    if cfg.clip_skip > 1:
        facts["Clip skip"] = str(cfg.clip_skip)
    if cfg.guidance_rescale:
        facts["CFG Rescale"] = f"{cfg.guidance_rescale:g}"
    if cfg.init is not None:
        facts["Denoising strength"] = f"{cfg.denoise:g}"
    if hashes := loras.hashes():
        facts["Lora hashes"] = ", ".join(f"{name}: {digits}" for name, digits in hashes.items())
    return {**facts, "Version": f"lorasmith {lorasmith.__version__}"}


def _model_name(cfg: GenerateConfig) -> str:
    path = Path(cfg.base)
    return path.name if path.is_dir() else path.stem


def _fields(cfg: GenerateConfig, one: Picture) -> dict[str, str]:
    return {
        "seed": str(one.seed),
        "prompt": one.prompt,
        "model": _model_name(cfg),
        "sampler": one.sampler,
        "steps": str(one.steps),
        "guidance": f"{one.guidance:g}",
        "width": str(one.size[0]),
        "height": str(one.size[1]),
    }
