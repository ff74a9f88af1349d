"""The options of the commands that draw pictures."""

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from lorasmith.config.values import (
    NUMBERS,
    FileName,
    Numbers,
    Place,
    PlaceOrHubId,
    Section,
    Share,
    Size,
    counted,
    is_changed,
)


def share_of_steps(text: str) -> tuple[float, float]:
    """Return from where to where a share of the steps goes, such as 0,0.6.

    Raises:
        ValueError: it is none.
    """
    try:
        start, end = (float(part) for part in text.split(","))
    except ValueError:
        start, end = 0.0, 0.0
    if not 0 <= start < end <= 1:
        raise ValueError(f"{text!r}: expected two numbers of 0 to 1, the smaller first, such as 0,0.6")
    return start, end


def canny_thresholds(text: str) -> tuple[float, float] | None:
    """Return the thresholds of the edges that a preprocessor finds, such as canny:50,150; None: it finds none.

    Raises:
        ValueError: there is no such preprocessor.
    """
    if text in ("none", "canny"):
        return None if text == "none" else (100.0, 200.0)  # as the ControlNets for edges were trained
    name, _, numbers = text.partition(":")
    try:
        low, high = (float(part) for part in numbers.split(","))
    except ValueError:
        low, high = 0.0, 0.0
    if name != "canny" or not 0 < low <= high < math.inf:
        raise ValueError(f"{text!r}: expected none, canny, or canny with thresholds, the lower first: canny:100,200")
    return low, high


def _check_share(text: str) -> str:
    share_of_steps(text)
    return text


def _check_preprocessor(text: str) -> str:
    canny_thresholds(text)
    return text


def _check_axes(names: list[str]) -> list[str]:
    if unknown := [name for name in names if name not in ("lora", "strength", "prompt", "seed")]:
        raise ValueError(f"{unknown[0]!r} is no axis of a grid; there are lora, strength, prompt and seed")
    return names


Axes = Annotated[list[str], AfterValidator(_check_axes)]
ShareOfSteps = Annotated[str, AfterValidator(_check_share)]
Preprocessor = Annotated[str, AfterValidator(_check_preprocessor)]
Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], NUMBERS]


class DrawConfig(Section):
    """What all commands that draw pictures have."""

    base: PlaceOrHubId = Field(
        default="", description="Base model: a .safetensors, .ckpt or .pt file, a diffusers folder, or a hub id."
    )
    vae: PlaceOrHubId | None = Field(default=None, description="Another VAE instead of the base model's own.")
    prediction: Literal["epsilon", "v_prediction"] | None = Field(
        default=None, description="What the U-Net predicts; read from the file where it says so."
    )
    zero_terminal_snr: bool = Field(
        default=False, description="Begin in noise alone, for models that were trained with zero terminal SNR."
    )
    ema: bool = Field(default=False, description="Use the checkpoint's EMA weights where it has both kinds.")
    clip_skip: Annotated[int, Field(ge=1, le=12)] = Field(
        default=1, description="Take the text encoder's n-th layer from the end."
    )
    embeddings: list[Place] = Field(
        default=[], description="Textual-inversion files, or folders of these, whose names prompts may use."
    )
    negative: str = Field(default="", description="Negative prompt.")
    size: Size | None = Field(
        default=None, description="Size of the pictures in pixels; left out, what the model was trained at."
    )
    steps: Annotated[int, Field(ge=1, le=1000)] = Field(default=20, description="Sampler steps.")
    guidance: Annotated[float, Field(ge=0)] = Field(default=7.5, description="Classifier-free guidance scale.")
    guidance_rescale: Share = Field(
        default=0.0, description="Share of guidance's added contrast that is taken back; 0.7 for zero terminal SNR."
    )
    pag_scale: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="Scale of perturbed-attention guidance, for firmer shapes, commonly 3; 0: none, else half as slow "
        "again.",
    )
    pag_layers: list[str] = Field(
        default=["mid"],
        description="Which self-attentions of the U-Net it perturbs: mid, down, up, down_blocks.1 and the like.",
    )
    sampler: str = Field(
        default="dpm++", description="Sampler: ddim, euler, euler_a, dpm++, unipc, heun, pndm and more."
    )
    sigmas: Literal["normal", "karras", "exponential", "beta"] = Field(
        default="normal", description="How the noise is spread over the steps; not every sampler has each."
    )
    batch_size: PositiveInt = Field(
        default=1, description="Pictures drawn at once: faster and more memory, the same pictures."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="Precision of the model; auto is bf16 on a GPU that has it, else fp32."
    )
    attention: Literal["sdpa", "plain", "sliced"] = Field(
        default="sdpa",
        description="Attention implementation: torch's own, plain products, or a head at a time, for less memory.",
    )
    channels_last: bool | None = Field(
        default=None,
        description="Lay out pictures with their channels last, as convolutions on GPUs like it; left out: on a GPU.",
    )
    compile: bool = Field(
        default=False,
        description="Compile the U-Net, on an NVIDIA GPU into CUDA graphs: slow to begin, faster for many pictures.",
    )
    vae_tiling: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Encode and decode pictures in overlapping tiles, for less memory: auto above 1536 x 1536 pixels, "
        "on above 512 on a side.",
    )
    on_out_of_memory: Literal["retry", "stop"] = Field(
        default="retry",
        description="Where memory runs out: draw the same again with less (smaller batches, attention in slices, the "
        "VAE on the CPU), or stop.",
    )
    device: str = Field(default="auto", description="Where to draw: auto, cpu, cuda, cuda:1, mps.")
    progress: bool = Field(default=True, description="Show a progress bar.")

    @model_validator(mode="after")
    def _check_drawing(self) -> "DrawConfig":
        if self.zero_terminal_snr and self.sigmas == "beta":
            raise ValueError(
                "sigmas beta are spread evenly up to the largest, which is out of reach with zero_terminal_snr: hardly "
                "a step is left for the picture; give normal, karras or exponential"
            )
        if not self.pag_scale and is_changed(self, "pag_layers"):
            raise ValueError("pag_layers is for perturbed-attention guidance; give pag_scale too, or leave it out")
        if not self.pag_layers:
            raise ValueError("pag_layers is empty; name a self-attention, such as mid, or leave it out")
        return self


class GenerateConfig(DrawConfig):
    """Draw pictures with a base model and LoRAs."""

    prompt: list[str] = Field(
        default=[],
        description="What to draw: one or several texts, each with options such as `--n blurred --w 512 --d 7` "
        "(docs/generate.md says all that may stand in one).",
        json_schema_extra={"positional": "PROMPT"},
    )
    prompts: Place | None = Field(
        default=None, description="A .txt, .toml or .json file of prompts; - for lines that are piped in."
    )
    interactive: bool = Field(
        default=False,
        description="Ask for prompts, one after the other, and draw each at once; the model stays loaded.",
    )
    lora: list[Place] = Field(
        default=[], description="LoRA files of any program, put on in this order; `<lora:name:0.8>` in a prompt too."
    )
    strength: Numbers = Field(
        default=[], description="How strongly each LoRA is put on, one number for each, below 0 too; left out: 1."
    )
    unet_strength: Numbers = Field(default=[], description="The same for the U-Net alone, in place of strength.")
    text_encoder_strength: Numbers = Field(
        default=[], description="The same for the text encoder alone, in place of strength."
    )
    lora_mask: list[Place] = Field(
        default=[],
        description="Picture for each LoRA, white where it acts; none for one that acts everywhere.",
    )
    lora_folder: Place | None = Field(
        default=None, description="Folder, with the folders in it, of the LoRAs that prompts may name."
    )
    fold: bool = Field(
        default=False, description="Fold the LoRAs into the weights while they are used: faster, the same pictures."
    )
    negative_guidance: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="Scale of its own for the negative prompt; left out, guidance leads away from it as it leads to "
        "the prompt.",
    )
    init: Place | None = Field(
        default=None, description="Picture to draw on from, instead of noise alone; cut to the size of the pictures."
    )
    mask: Place | None = Field(
        default=None, description="Picture that is white where init is to be drawn anew, and black where it stays."
    )
    denoise: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.6, description="Share of the steps that are drawn then: the more, the less is left of the picture."
    )
    control: list[PlaceOrHubId] = Field(
        default=[],
        description="ControlNets, which hold pictures to the shapes in another one: files, diffusers folders or hub "
        "ids; what several do is summed.",
    )
    control_picture: list[Place] = Field(
        default=[],
        description="Picture that each ControlNet is shown, or one for all; cut to the size of the pictures.",
    )
    control_preprocessor: list[Preprocessor] = Field(
        default=[],
        description="What is shown of each picture: none (all of it), or canny (its edges), with other thresholds "
        "canny:50,150; left out, none.",
    )
    control_weight: Numbers = Field(default=[], description="How strongly each ControlNet acts; left out: 1.")
    control_range: list[ShareOfSteps] = Field(
        default=[], description="Share of the steps in which each ControlNet acts, such as 0,0.6; left out: all."
    )
    highres_scale: Annotated[float, Field(gt=1, le=8)] | None = Field(
        default=None, description="Enlarge each picture by this, and draw on from it in a second pass (highres fix)."
    )
    highres_steps: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        default=None, description="Sampler steps of the second pass; left out, as many as of the first."
    )
    highres_denoise: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="Share of these steps that are drawn: the more, the more is made anew."
    )
    highres_upscaler: str = Field(
        default="latent",
        description="What enlarges: latent, lanczos, or your own function of a picture by its dotted name, "
        "my_module.enlarge.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(
        default=None, description="Seed of each prompt's first picture, the others count up; left out, a random one."
    )
    images: PositiveInt = Field(default=1, description="Pictures of each prompt.")
    all_variants: bool = Field(
        default=False, description="Draw all that `{a|b}` in prompts stands for, instead of one drawn from the seed."
    )
    output: Place = Field(default=Path("pictures"), description="Folder for the pictures; nothing in it is replaced.")
    name: FileName = Field(
        default="{number}-{seed}",
        description="File names, of {number}, {seed}, {prompt}, {model}, {sampler}, {steps}, {guidance}, {width}, "
        "{height}.",
    )
    form: Literal["png", "webp", "jpeg"] = Field(
        default="png", description="Form of the files; each holds what it was drawn from."
    )

    @model_validator(mode="after")
    def _check_together(self) -> "GenerateConfig":
        if self.prompt and self.prompts is not None:
            raise ValueError("prompt and prompts both say what to draw; leave one of them out")
        if self.interactive and (self.prompt or self.prompts is not None):
            raise ValueError("interactive asks for prompts, but some are given; leave out one or the other")
        for name in ("denoise", "mask"):
            if self.init is None and is_changed(self, name):
                raise ValueError(f"{name} is for drawing on from a picture; give it with --init, or leave {name} out")
        for name in ("highres_steps", "highres_denoise", "highres_upscaler"):
            if self.highres_scale is None and is_changed(self, name):
                raise ValueError(f"{name} is for a second pass; give it with --highres-scale, or leave {name} out")
        if self.highres_scale is not None and self.init is not None:
            raise ValueError("highres_scale and init do not go together; give --init with a larger --size instead")
        for name in ("strength", "unet_strength", "text_encoder_strength"):
            count = len(getattr(self, name))
            if count not in (0, len(self.lora)):
                raise ValueError(
                    f"{name} is given {counted(count, 'time')} for {counted(len(self.lora), 'LoRA')}; "
                    "give one for each, in the same order"
                )
        for name in ("control_picture", "control_preprocessor", "control_weight", "control_range"):
            count, nets = len(getattr(self, name)), len(self.control)
            is_needed = name == "control_picture" and nets > 0
            if count != nets and (count or is_needed) and not (is_needed and count == 1):
                raise ValueError(
                    f"{name} is given {counted(count, 'time')} for {counted(nets, 'ControlNet')} (control); give "
                    f"{'one picture for all, or ' if is_needed else ''}one for each, in the same order"
                )
        if self.lora_mask and len(self.lora_mask) != len(self.lora):
            raise ValueError(
                f"lora_mask is given {counted(len(self.lora_mask), 'picture')} for "
                f"{counted(len(self.lora), 'LoRA')}; give one for each, in the same order, or none as its name"
            )
        if self.lora_mask and (self.fold or self.compile):
            raise ValueError(
                f"lora_mask and {'fold' if self.fold else 'compile'} do not go together: weights into which a LoRA is "
                "folded are the same everywhere; leave out one of them"
            )
        if self.lora_mask and self.control:
            raise ValueError(
                "lora_mask and control do not go together: a ControlNet takes one text for the whole picture; leave "
                "out one of them"
            )
        if self.strength and self.unet_strength and self.text_encoder_strength:
            raise ValueError(
                "strength is not used where unet_strength and text_encoder_strength are both given; leave it out"
            )
        return self


class JudgeConfig(DrawConfig):
    """Score LoRAs by the pictures that they draw, and recommend one."""

    lora: list[Place] = Field(
        default=[],
        description="LoRA files of any program, or output folders of runs, of which all LoRAs are taken in the order "
        "of their steps.",
        json_schema_extra={"positional": "LORA"},
    )
    pictures: Place | None = Field(default=None, description="Folder of the training pictures, with the folders in it.")
    judge: PlaceOrHubId | None = Field(
        default=None,
        description="What compares pictures: the folder or hub id of a CLIP, or of a DINO, which sees pictures alone; "
        "`demo` for the embedded model's own.",
    )
    prompts: list[str] = Field(
        default=[], description="Prompts of what was trained, or a .txt, .toml or .json file of them."
    )
    unrelated_prompts: list[str] = Field(
        default=[],
        description="Prompts of other things, which should stay as they are, or a file of them; left out, eight "
        "(docs/judge.md).",
    )
    strengths: Numbers = Field(default=[1.0], description="How strongly each LoRA is put on: all are tried.")
    images: PositiveInt = Field(default=4, description="Pictures of each prompt; unrelated ones are drawn once.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=1, description="Seed of each prompt's first picture, the others count up."
    )
    output: Place = Field(
        default=Path("judged"),
        description="Folder for page, scores and pictures; where other ones lie in it, the next number is put after "
        "its name.",
    )

    @model_validator(mode="after")
    def _check_together(self) -> "JudgeConfig":
        if 0 in self.strengths:
            raise ValueError("strength 0 is the base model alone, which is drawn anyway; leave it out")
        if not self.strengths or len(set(self.strengths)) < len(self.strengths):
            raise ValueError("strengths are to be different numbers, at least one")
        return self


class GridConfig(DrawConfig):
    """Compare LoRAs, strengths, prompts and seeds in labelled grids of pictures, beside the base model."""

    lora: list[Place] = Field(
        default=[],
        description="LoRA files of any program, or folders, such as a run's output, of which all are taken in the "
        "order of their steps.",
        json_schema_extra={"positional": "LORA"},
    )
    strengths: Numbers = Field(
        default=[1.0], description="How strongly each LoRA is put on, below 0 too; all are drawn."
    )
    prompt: list[str] = Field(
        default=[], description="What to draw: one or several texts, each with options as for `lorasmith generate`."
    )
    prompts: Place | None = Field(default=None, description="A .txt, .toml or .json file of prompts.")
    seeds: Seeds = Field(default=[1], description="Seeds of each prompt's pictures.")
    images: PositiveInt = Field(
        default=1, description="Pictures of each prompt: their seeds count up from the only one of seeds."
    )
    show_base: bool = Field(default=True, description="Draw the base model alone too, beside the LoRAs.")
    columns: Axes = Field(
        default=[],
        description="What the columns are, from the outer to the inner: lora, strength, prompt, seed; left out, lora "
        "and strength.",
    )
    rows: Axes = Field(default=[], description="The same of the rows; left out, prompt and seed.")
    sheets: Axes = Field(
        default=[], description="The same of what has a sheet of its own for each; left out, what is in neither."
    )
    cell_size: Annotated[int, Field(ge=32)] | None = Field(
        default=None, description="Longer side of pictures on the sheets, at most; left out, as long as they are."
    )
    lora_folder: Place | None = Field(
        default=None, description="Folder, with the folders in it, of other LoRAs that prompts may name."
    )
    fold: bool = Field(
        default=False, description="Fold the LoRAs into the weights while they are used: faster, the same pictures."
    )
    output: Place = Field(
        default=Path("grid"),
        description="Folder for the page, the sheets and the pictures; where another grid lies in it, the next number "
        "is put after its name.",
    )

    @model_validator(mode="after")
    def _check_together(self) -> "GridConfig":
        if self.prompt and self.prompts is not None:
            raise ValueError("prompt and prompts both say what to draw; leave one of them out")
        for name in ("strengths", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} are to be different numbers, at least one")
        if self.show_base and 0 in self.strengths:
            raise ValueError("strength 0 is the base model, which is drawn anyway; leave it out, or add --no-show-base")
        if self.images > 1 and len(self.seeds) > 1:
            raise ValueError("images counts up from one seed, and seeds lists several; leave one of them out")
        named = [*self.columns, *self.rows, *self.sheets]
        if twice := [name for name in dict.fromkeys(named) if named.count(name) > 1]:
            raise ValueError(f"{twice[0]} is named twice in columns, rows and sheets; each stands in one place")
        return self
