"""`lorasmith generate`: pictures from a base model and LoRAs.

    lorasmith generate "a photo of a robot" --base v1-5.safetensors --lora robot.safetensors --strength 0.8

All is checked before the model is loaded, and each picture is written as soon as it is drawn.
"""

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from lorasmith import prompt_syntax, prompts
from lorasmith.command_line import harmless
from lorasmith.config import GenerateConfig
from lorasmith.data.images import open_image
from lorasmith.devices import DTYPES
from lorasmith.errors import UserError
from lorasmith.merging import Strength
from lorasmith.models.base import ModelFacts
from lorasmith.picture_files import PictureFolder, check_pattern, parameters
from lorasmith.picture_run.asking import asked_prompts, telling_of_mistakes
from lorasmith.picture_run.controls import Controls
from lorasmith.picture_run.drawing import Source, drawn, load, open_base, telling_of_memory
from lorasmith.picture_run.facts import facts_of, facts_of_all, fields_of, shown_prompt
from lorasmith.picture_run.highres import Highres
from lorasmith.picture_run.loras import Loras
from lorasmith.picture_run.pictures import Picture, check_pictures
from lorasmith.progress import counted
from lorasmith.prompts import Prompt
from lorasmith.sampling import Drawing, check_settings, drawn_steps
from lorasmith.seeds import derive


def run(cfg: GenerateConfig) -> int:
    """Draw all pictures and return the exit code, 0."""
    with open_base(cfg) as base:
        loras = Loras(base.checkpoint, _given(cfg), cfg.lora_folder)
        source = _source(cfg)
        masks = _masks(cfg)
        usual = _usual(cfg, base.facts, source)
        controls = Controls(cfg, base.checkpoint, base.facts)
        highres = None if cfg.highres_scale is None else Highres(cfg, base.facts)

        def asked_for(usual: Drawing, asked: Sequence[Prompt]) -> list[Picture]:
            return _pictures(cfg, base.facts, usual, asked, loras, controls, highres)

        pictures = [] if cfg.interactive else asked_for(usual, _prompts(cfg))
        folder = PictureFolder(cfg.output, cfg.name, cfg.form)
        for line in [*base.told(cfg.base), *loras.told()]:
            print(harmless(line))
        if cfg.seed is None and any(one.seed == usual.seed for one in pictures):
            print(f"seed {usual.seed}, a random one; give it with --seed to draw the same again")
        written = f"The pictures that were drawn are in {cfg.output}."
        with telling_of_memory(cfg, base, pictures or [usual], written):
            controls.load(DTYPES[base.precision], base.device)
            model = load(cfg, base, controls.nets())

        def draw_all(pictures: Sequence[Picture]) -> list[Path]:
            """Draw pictures and return the files that they are written to."""
            common, files = {**controls.facts(), **facts_of_all(cfg, base.checkpoint)}, []
            if masks:
                common = {"Lora masks": ", ".join(f"{name}: {file.name}" for name, file in _mask_files(cfg)), **common}
            with telling_of_memory(cfg, base, pictures, written):
                found = drawn(
                    cfg,
                    model,
                    pictures,
                    loras,
                    is_folded=cfg.fold,
                    source=source,
                    controls=controls,
                    highres=highres,
                    masks=masks,
                )
                for one, picture in counted(found, len(pictures), "drawing", is_shown=cfg.progress):
                    own = facts_of(cfg, one, loras) | ({} if highres is None else highres.facts(one))
                    fields = {**fields_of(cfg, one), "width": str(picture.width), "height": str(picture.height)}
                    text = parameters(shown_prompt(one), one.negative, {**own, **common})
                    files.append(folder.add(picture, text, fields, one.file))
            return files

        count = 0 if cfg.interactive else len(draw_all(pictures))
        for prompt in asked_prompts() if cfg.interactive else ():
            with telling_of_mistakes():
                for file in draw_all(asked_for(_usual(cfg, base.facts, source), [prompts.parse(prompt)])):
                    print(harmless(str(file)))
                    count += 1
    print(f"{cfg.output}: {count} {'picture' if count == 1 else 'pictures'}")
    return 0


def _given(cfg: GenerateConfig) -> list[tuple[Path, Strength]]:
    """Return the LoRAs that all pictures are drawn with, with their strengths."""
    plain = cfg.strength or [1.0] * len(cfg.lora)
    strengths = map(Strength, cfg.unet_strength or plain, cfg.text_encoder_strength or plain)
    return list(zip(cfg.lora, strengths, strict=True))


def _mask_files(cfg: GenerateConfig) -> list[tuple[str, Path]]:
    """Return the masks of LoRAs by their names."""
    return [(lora.stem, mask) for lora, mask in zip(cfg.lora, cfg.lora_mask, strict=False) if mask != Path("none")]


def _masks(cfg: GenerateConfig) -> dict[str, Image.Image]:
    """Return the masks of LoRAs by their names, read."""
    return {name: open_image(mask) for name, mask in _mask_files(cfg)}


def _source(cfg: GenerateConfig) -> Source | None:
    """Return what is drawn on from, read.

    Raises:
        UserError: a file is no picture, or the mask is not of the picture's size.
    """
    if cfg.init is None:
        return None
    init, mask = open_image(cfg.init), None if cfg.mask is None else open_image(cfg.mask)
    if mask is not None and init.size != mask.size:
        raise UserError(
            f"--mask {cfg.mask} is {mask.width}x{mask.height}, and {cfg.init} is {init.width}x{init.height}; give "
            "a mask of the picture's size."
        )
    return Source(init, mask)


def _usual(cfg: GenerateConfig, facts: ModelFacts, source: Source | None) -> Drawing:
    """Return what is drawn where a prompt does not say otherwise, checked; without a seed, with a random one.

    It is of the size of the picture that is drawn on from, where none is said.
    """
    size = cfg.size or facts.resolution
    if source is not None and cfg.size is None:
        width, height = (max(side // facts.latent_factor, 1) * facts.latent_factor for side in source.picture.size)
        size = width, height
    check_settings(facts, size, cfg.steps, cfg.sampler, cfg.sigmas)
    seed = random.SystemRandom().randrange(2**32) if cfg.seed is None else cfg.seed
    return Drawing("", cfg.negative, size, seed, cfg.steps, cfg.guidance, cfg.sampler)


def _pictures(
    cfg: GenerateConfig,
    facts: ModelFacts,
    usual: Drawing,
    asked: Sequence[Prompt],
    loras: Loras,
    controls: Controls,
    highres: Highres | None,
) -> list[Picture]:
    """Return all pictures that prompts ask for, checked."""
    found = [picture for prompt in asked for picture in _of_prompt(cfg, usual, prompt, loras)]
    for one in found:
        if one.denoise is not None and not drawn_steps(one.steps, one.denoise):
            raise UserError(f"--denoise {one.denoise:g} of {one.steps} steps is less than one; give more of either.")
        if one.negative_guidance is not None and one.guidance <= 1:
            raise UserError(
                f"prompt {one.prompt!r}: a guidance scale of the negative prompt alone is for pictures with guidance, "
                f"and {one.guidance:g} is none; give a scale above 1, or leave it out."
            )
    check_pictures(found, facts, cfg.sigmas)
    if masked := dict(_mask_files(cfg)):
        for tags in dict.fromkeys(one.loras for one in found):
            loras.check_regions(tags, masked)
    for steps in {one.steps if one.denoise is None else drawn_steps(one.steps, one.denoise) for one in found}:
        controls.check_steps(steps)
    if highres is not None:
        for one in found:
            highres.check(one)
            controls.check_steps(highres.drawn_steps(one.steps))
    return found


def _prompts(cfg: GenerateConfig) -> list[Prompt]:
    if cfg.prompts is None:
        if not cfg.prompt:
            raise UserError('missing: what to draw. For example: lorasmith generate "a photo of a cat" --base ...')
        return [prompts.parse(line) for line in cfg.prompt]
    if cfg.prompts == Path("-"):
        return prompts.read_lines(f"--prompts {cfg.prompts}", sys.stdin.read())
    if not prompts.is_file([str(cfg.prompts)]):
        raise UserError(f"--prompts {cfg.prompts}: expected a file that ends in .txt, .toml or .json, or - .")
    return prompts.read_file(cfg.prompts)


def _of_prompt(cfg: GenerateConfig, usual: Drawing, prompt: Prompt, loras: Loras) -> Iterator[Picture]:
    """Return the pictures of one prompt; all its variants are drawn from the same seeds."""
    asked = usual.shared_settings(prompt)
    if prompt.file is not None:
        check_pattern(f"prompt {prompt.text!r}: --f {prompt.file}", prompt.file)
    own = {
        "negative_guidance": cfg.negative_guidance if prompt.negative_guidance is None else prompt.negative_guidance,
        "denoise": _denoise(cfg, prompt),
        "file": prompt.file,
    }
    for seed, text in _seeds_and_texts(cfg, asked, _seeds(cfg, asked, prompt)):
        shown, tags = prompt_syntax.take_loras(text)
        draws = random.Random(derive(seed, "variants of a negative prompt"))
        for negative in prompt_syntax.chosen(asked.negative, draws):
            if named := prompt_syntax.take_loras(negative)[1]:
                raise UserError(
                    f"<lora:{named[0].name}> stands in a negative prompt, where no LoRA can; put it into the prompt, "
                    "with a strength below 0 if it is to act the other way."
                )
            drawing = replace(asked, prompt=shown, negative=negative, seed=seed)
            yield Picture(**vars(drawing), loras=loras.used(tags, prompt.strengths), **own)


def _seeds_and_texts(cfg: GenerateConfig, asked: Drawing, seeds: Sequence[int]) -> Iterator[tuple[int, str]]:
    if cfg.all_variants:
        yield from ((seed, text) for text in prompt_syntax.variants(asked.prompt) for seed in seeds)
        return
    for seed in seeds:
        draws = random.Random(derive(seed, "variants of a prompt"))
        yield from ((seed, text) for text in prompt_syntax.chosen(asked.prompt, draws))


def _seeds(cfg: GenerateConfig, asked: Drawing, prompt: Prompt) -> Sequence[int]:
    """Return the seeds of a prompt's pictures: those that it lists, or one and those after it.

    Raises:
        UserError: it lists another number of seeds than there are to be pictures.
    """
    if len(prompt.seeds or ()) < 2:
        return range(asked.seed, asked.seed + cfg.images)
    assert prompt.seeds is not None
    if cfg.images not in (1, len(prompt.seeds)):
        raise UserError(
            f"prompt {prompt.text!r} has {len(prompt.seeds)} seeds, and --images {cfg.images} asks for another number "
            "of pictures; leave one of them out."
        )
    return prompt.seeds


def _denoise(cfg: GenerateConfig, prompt: Prompt) -> float | None:
    """Return the share of the steps that are drawn on from a picture, None where there is none.

    Raises:
        UserError: a prompt says it, and there is none.
    """
    if cfg.init is not None:
        return cfg.denoise if prompt.denoise is None else prompt.denoise
    if prompt.denoise is not None:
        raise UserError(
            f"prompt {prompt.text!r}: --t {prompt.denoise:g} is for drawing on from a picture; give it with --init, "
            "or leave --t out."
        )
    return None
