"""Every option of every command, once.

One pydantic model a command, made of sections; one field an option with its type, default and one sentence of help.
The command line, TOML files, `docs/options.md` and the JSON Schema are all derived from these models. Option names are
unique over the sections of a command, so `--network.rank 8` and `--rank 8` mean the same.
"""

import difflib
import math
import os.path
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    model_validator,
)

from lorasmith.errors import UserError
from lorasmith.lr import parse_table

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


_COLORS = ("white", "black", "gray", "red", "green", "blue", "yellow")


class Section(BaseModel):
    """A group of options; an unknown name in it is an error."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


def _parse_size(value: Any) -> Any:
    """Accept 512, "512", "448,640", "448x640" and [448, 640] as (width, height) in pixels."""
    if isinstance(value, str):
        value = [part.strip() for part in value.lower().replace("x", ",").split(",")]
    if isinstance(value, int) or (isinstance(value, (list, tuple)) and len(value) == 1):
        side = value if isinstance(value, int) else value[0]
        value = [side, side]
    return value


def _check_size(size: tuple[int, int]) -> tuple[int, int]:
    for side in size:
        if side < 8 or side % 8:
            down, up = max(8, side // 8 * 8), (side // 8 + 1) * 8
            raise ValueError(f"{side} is not a multiple of 8, which the model's latents need; use {down} or {up}")
    return size


Size = Annotated[
    tuple[int, int],
    BeforeValidator(_parse_size),
    AfterValidator(_check_size),
    Field(json_schema_extra={"format": "width,height"}),
]


def _parse_range(value: Any) -> Any:
    """Accept "2,4" and [2, 4]."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _check_range(ends: tuple[float, float]) -> tuple[float, float]:
    if not 0 < ends[0] <= ends[1]:
        raise ValueError("expected two numbers above 0, the smaller first, such as 2,4")
    return ends


Range = Annotated[
    tuple[float, float],
    BeforeValidator(_parse_range),
    AfterValidator(_check_range),
    Field(json_schema_extra={"format": "low,high"}),
]


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


def _check_color(color: str) -> str:
    if color.lower() not in _COLORS and not re.fullmatch(r"#[0-9a-fA-F]{6}", color):
        raise ValueError(f"{color!r} is no colour that is known; give one like #ff8000, or one of {', '.join(_COLORS)}")
    return color.lower()


def _check_name(name: str) -> str:
    if not name.strip() or name.startswith(".") or set(name) & set('/\\:*?"<>|'):
        raise ValueError(
            f'{name!r} is no plain file name; the folder goes into --output, and a name has no / \\ : * ? " < > | '
            "and does not begin with a dot"
        )
    return name


def _check_repository_folder(folder: str) -> str:
    if "\\" in folder or not all(part.strip(".") for part in folder.split("/")):
        raise ValueError(f"{folder!r} is no folder in a repository; expected is one like loras/dog")
    return folder


def _check_separator(separator: str) -> str:
    if not separator:
        raise ValueError("an empty text separates nothing; give the separator that the captions have, such as a comma")
    return separator


def _check_token_length(length: int) -> int:
    if length not in (75, 150, 225):
        raise ValueError(f"{length} tokens of a caption cannot be used; give 75, 150 or 225")
    return length


def _check_axes(names: list[str]) -> list[str]:
    if unknown := [name for name in names if name not in ("lora", "strength", "prompt", "seed")]:
        raise ValueError(f"{unknown[0]!r} is no axis of a grid; there are lora, strength, prompt and seed")
    return names


def _check_steps_or_share(steps: float) -> float:
    if steps >= 1 and steps != int(steps):
        raise ValueError(f"{steps:g} is neither a whole number of steps nor, below 1, a share of the run")
    return steps


def _check_table(text: str) -> str:
    parse_table(text)
    return text


def _check_trackers(names: list[str]) -> list[str]:
    if unknown := [name for name in names if name not in ("wandb", "trackio")]:
        raise ValueError(f"{unknown[0]!r} is no tracker that is known; give wandb, trackio or both")
    return list(dict.fromkeys(names))


# A shell expands ~ at the start of a word only: not in --base=~/model, nor in a TOML file.
Place = Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(path)))]
PlaceOrHubId = Annotated[str, AfterValidator(os.path.expanduser)]
CacheDir = Annotated[Path, AfterValidator(lambda path: Path(os.path.abspath(os.path.expanduser(path))))]
FileName = Annotated[str, AfterValidator(_check_name)]
RepositoryFolder = Annotated[str, AfterValidator(_check_repository_folder)]
Color = Annotated[str, AfterValidator(_check_color), Field(json_schema_extra={"format": "color"})]
TokenLength = Annotated[int, AfterValidator(_check_token_length)]
Trackers = Annotated[list[str], AfterValidator(_check_trackers)]
Axes = Annotated[list[str], AfterValidator(_check_axes)]
Separator = Annotated[str, AfterValidator(_check_separator)]
Numbers = Annotated[list[float], Field(json_schema_extra={"format": "numbers"})]
ShareOfSteps = Annotated[str, AfterValidator(_check_share)]
Preprocessor = Annotated[str, AfterValidator(_check_preprocessor)]
Rate = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareLeftOut = Annotated[float, Field(ge=0, lt=1)]
StepsOrShare = Annotated[float, Field(ge=0), AfterValidator(_check_steps_or_share)]
LearningRateTable = Annotated[str, AfterValidator(_check_table)]


def _check_blocks(numbers: list[Any]) -> list[Any]:
    if len(numbers) not in (0, 25):
        raise ValueError(
            f"{len(numbers)} numbers; give 25, one for each of 12 input blocks, the middle one, and 12 output blocks"
        )
    return numbers


_NUMBERS = Field(json_schema_extra={"format": "numbers"})
Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], _NUMBERS]
BlockRanks = Annotated[list[Annotated[int, Field(ge=0)]], AfterValidator(_check_blocks), _NUMBERS]
BlockRates = Annotated[list[Rate], AfterValidator(_check_blocks), _NUMBERS]
BlockFactors = Annotated[list[NotNegative], AfterValidator(_check_blocks), _NUMBERS]


class ModelSection(Section):
    """The base model that the LoRA is trained for."""

    base: PlaceOrHubId = Field(
        default="",
        description="Base model: a .safetensors, .ckpt or .pt file, a diffusers folder, or a hub id (org/name).",
    )
    vae: PlaceOrHubId | None = Field(
        default=None, description="Another VAE instead of the base model's own: a file or a folder."
    )
    v2: bool | None = Field(
        default=None,
        description="Say that the base model is SD 2.x; read from the file when left out, checked when given.",
    )
    prediction: Literal["epsilon", "v_prediction"] | None = Field(
        default=None, description="What the U-Net predicts; read from the file where it says so."
    )
    ema: bool = Field(default=False, description="Use the checkpoint's EMA weights where it has both kinds.")
    clip_skip: Annotated[int, Field(ge=1, le=12)] = Field(
        default=1, description="Take the text encoder's n-th layer from the end."
    )
    embeddings: list[Place] = Field(
        default_factory=list,
        description="Textual-inversion files, or folders of these; where their names stand in captions and prompts, "
        "their vectors are used (docs/embeddings.md).",
    )
    base_loras: list[Place] = Field(
        default_factory=list,
        description="LoRA files to fold into the base model before training, so that the new one is trained on top.",
    )
    base_lora_ratios: Numbers = Field(default=[], description="A ratio for each of them; left out, 1.")


class NetworkSection(Section):
    """What is trained: the adapter and where it is attached."""

    adapter: str = Field(default="lora", description="Adapter type: a name from lorasmith.adapters or a dotted module.")
    adapter_options: list[str] = Field(
        default_factory=list,
        description="The adapter type's own options, as `option=value`, e.g. factor=8 for lokr (docs/adapters.md).",
    )
    network_module: str | None = Field(
        default=None,
        description="Train a network of another program in place of `adapter`: a module with sd-scripts' "
        "create_network, e.g. lycoris.kohya (docs/adapters.md).",
    )
    network_args: list[str] = Field(
        default_factory=list, description="That module's own arguments, as `key=value`, e.g. algo=lokr."
    )
    rank: PositiveInt = Field(default=4, description="Rank of the LoRA: more can express more and costs memory.")
    alpha: Rate | None = Field(
        default=None, description="The update is scaled by alpha / rank; left out, alpha = rank, which is scale 1."
    )
    train: Literal["both", "unet", "text_encoder"] = Field(
        default="both", description="Which parts get a LoRA: U-Net and text encoder, or one of them."
    )
    conv_rank: PositiveInt | None = Field(
        default=None,
        description="Put adapters on the U-Net's resnets and samplers too (LoCon): the rank of their 3x3 convolutions; "
        "their other layers get `rank`.",
    )
    conv_alpha: Rate | None = Field(default=None, description="The alpha of these; left out, alpha = conv_rank.")
    block_ranks: BlockRanks = Field(
        default=[],
        description="Ranks of the U-Net's 25 blocks (12 input, middle, 12 output) instead of `rank`; 0: no adapters.",
    )
    block_alphas: BlockRates = Field(default=[], description="Alphas of these blocks instead of `alpha`.")
    conv_block_ranks: BlockRanks = Field(default=[], description="The same for 3x3 convolutions, as `conv_rank`.")
    conv_block_alphas: BlockRates = Field(default=[], description="The same for 3x3 convolutions, as `conv_alpha`.")
    neuron_dropout: ShareLeftOut = Field(
        default=0.0, description="Share of the numbers between a LoRA's two factors that each step leaves out."
    )
    rank_dropout: ShareLeftOut = Field(
        default=0.0, description="Share of a LoRA's ranks that is left out, other ones for each sample."
    )
    module_dropout: ShareLeftOut = Field(
        default=0.0, description="Share of the layers whose adapter is left out, other ones for each step."
    )
    product_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="Decay of what an adapter adds to its layer's weight, not of its factors alone (docs/losses.md).",
    )
    max_norm: Rate | None = Field(
        default=None,
        description="After each step, scale what an adapter adds to its layer's weight down to this norm; commonly 1.",
    )
    weights: Place | None = Field(
        default=None, description="Start from this LoRA file; rank and alpha are taken from it, every name must match."
    )


class DataSection(Section):
    """The pictures and their captions."""

    images: Place | None = Field(
        default=None,
        description="Folder of pictures: a parent of DreamBooth folders (`N_identifier class`), one of them, "
        "or a plain folder; or what else `source` reads: tar shards, a Hugging Face data set.",
    )
    source: str = Field(
        default="auto",
        description="What the pictures lie in: auto, folder, metadata_json, huggingface, webdataset, or a module of "
        "your own by its dotted name.",
    )
    image_column: str | None = Field(
        default=None, description="Hugging Face data sets: the column of the pictures; left out, the only one of them."
    )
    caption_column: str | None = Field(
        default=None,
        description="Hugging Face data sets: the column of the captions; left out, text, caption or prompt.",
    )
    dataset_split: str = Field(default="train", description="Hugging Face data sets: the split to train on.")
    regularization: Place | None = Field(
        default=None, description="Folder of regularization pictures (prior preservation), laid out like `images`."
    )
    prior_loss_weight: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="Weight of the regularization pictures' loss."
    )
    prior_pictures: PositiveInt | None = Field(
        default=None,
        description="Let the base model draw regularization pictures into their folder first, until it holds so many.",
    )
    prior_prompt: str | None = Field(
        default=None,
        description="What is drawn, and the caption of these; left out, the class that the pictures' folder names.",
    )
    captions: Place | None = Field(
        default=None, description="Metadata file, JSON or JSONL, with captions and tags (the fine-tuning method)."
    )
    dataset_config: Place | None = Field(
        default=None,
        description="Dataset file, TOML or JSON as sd-scripts reads it: data sets and subsets with own folders and "
        "rules, instead of `images`; the options count where it says nothing.",
    )
    dataset_root: Place | None = Field(
        default=None,
        description="Folder that relative paths in the dataset file start from; left out, the working folder.",
    )
    recursive: bool = Field(default=False, description="Use the pictures of folders in folders too.")
    caption: str | None = Field(default=None, description="Caption for pictures that have none of their own.")
    caption_extension: str | None = Field(
        default=None, description="Extension of caption files; left out, `.caption` and then `.txt` are looked for."
    )
    repeats: PositiveInt = Field(
        default=1, description="How often each picture counts in an epoch, for plain folders and metadata JSON."
    )
    caption_prefix: str = Field(
        default="", description="Text put before every caption, with a space; it stays first when shuffling."
    )
    caption_suffix: str = Field(
        default="", description="Text put after every caption, with a space; it stays last when shuffling."
    )
    caption_separator: Separator = Field(default=",", description="What divides a caption into parts.")
    shuffle_caption: bool = Field(default=False, description="Shuffle the parts of each caption, anew for each sample.")
    keep_tokens: Annotated[int, Field(ge=0)] = Field(
        default=0, description="How many leading parts of a caption stay in place and are never left out."
    )
    keep_tokens_separator: str = Field(
        default="",
        description="A mark in captions, such as |||: the parts before it, and after a second one, stay in place and "
        "are never left out.",
    )
    secondary_separator: str = Field(
        default="",
        description="A mark in captions, such as ;;;, that holds parts together when shuffling or leaving out, and "
        "then becomes a caption_separator.",
    )
    wildcards: bool = Field(
        default=False,
        description="Take one variant of those in braces, {a|b}, and one line of caption files with several, anew for "
        "each sample.",
    )
    caption_dropout: Share = Field(default=0.0, description="Share of samples trained with an empty caption.")
    caption_dropout_every_epochs: Annotated[int, Field(ge=0)] = Field(
        default=0, description="In every n-th epoch all captions are empty; 0: in none."
    )
    tag_dropout: Share = Field(
        default=0.0, description="Share of a caption's parts left out, other parts for each sample."
    )
    token_warmup_steps: Annotated[float, Field(ge=0)] = Field(
        default=0,
        description="Steps over which the number of a caption's parts grows to all; below 1: a share of the run.",
    )
    token_warmup_min: PositiveInt = Field(
        default=1, description="With how many parts, besides those kept in place, the growth begins."
    )
    weighted_captions: bool = Field(
        default=False, description="Take (a:1.2), (a) and [a] in captions and prompts as weights of their words."
    )
    max_token_length: TokenLength = Field(
        default=75,
        description="How many tokens of a caption are used, 75, 150 or 225, in chunks of 75 that do not cut a word.",
    )
    resolution: Size | None = Field(
        default=None,
        description="Training size in pixels, one side or width,height; left out, the model's own (512 or 768).",
    )
    buckets: bool = Field(
        default=False, description="Sort pictures into buckets of like aspect ratio instead of one shape."
    )
    bucket_min: PositiveInt = Field(default=256, description="Smallest side of a bucket in pixels.")
    bucket_max: PositiveInt = Field(default=1024, description="Largest side of a bucket in pixels.")
    bucket_step: PositiveInt = Field(default=64, description="Bucket sides are multiples of this many pixels.")
    bucket_rule: Literal["less-crop", "sd-scripts"] = Field(
        default="less-crop",
        description="How a picture finds its bucket: less-crop weighs what is cropped away against what is trained; "
        "sd-scripts takes the buckets that sd-scripts takes.",
    )
    bucket_no_upscale: bool = Field(
        default=False,
        description="Never enlarge a picture: buckets come from the pictures' own sizes, whatever bucket_min and "
        "bucket_max.",
    )
    flip: bool = Field(
        default=False, description="Mirror half of the samples left to right; cached latents take twice the room then."
    )
    color: bool = Field(default=False, description="Vary hue and gamma weakly; needs uncached latents.")
    random_crop: bool = Field(
        default=False, description="Crop at a random place instead of the centre; needs uncached latents."
    )
    face_crop_aug_range: Range | None = Field(
        default=None,
        description="Crop around the face whose middle and size end a picture's name (`name_CX_CY_W_H.png`), so that "
        "the shorter side is so many times the face; two different numbers need uncached latents.",
    )
    alpha_color: Color = Field(
        default="white",
        description="Colour that is seen through transparent pictures.",
    )
    masks: Place | None = Field(
        default=None,
        description="Folder of masks, named as the pictures: white places are learned, black ones are not.",
    )
    alpha_mask: bool = Field(
        default=False, description="Take the pictures' transparency as their masks: opaque places are learned."
    )
    mask_loss: Literal["area", "all"] = Field(
        default="area",
        description="Take the mean loss of a masked sample over its mask's area, so that small masks teach as much as "
        "large ones, or over all places, as sd-scripts does.",
    )
    mask_background: Share = Field(
        default=0.0, description="How much masked-out places count in the loss, against 1 for the others."
    )
    max_megapixels: PositiveInt = Field(
        default=179,
        description="Refuse pictures of more million pixels: a small file can unpack to fill the memory.",
    )
    skip_unreadable: bool = Field(default=False, description="Leave unreadable pictures out instead of stopping.")
    cache_latents: bool | None = Field(
        default=None,
        description="Encode every picture once, not for every step; left out, on unless an augmentation gives other "
        "pixels each time.",
    )
    disk_cache: bool = Field(
        default=True,
        description="Keep what is encoded, and facts of pictures, in the cache folder for other runs (docs/caches.md).",
    )
    cache_dir: CacheDir | None = Field(
        default=None,
        description="The cache folder; left out, the environment's LORASMITH_CACHE, or where the system has caches.",
    )
    npz: bool = Field(
        default=False,
        description="Take latents from sd-scripts' .npz files beside the pictures where they fit (docs/prepare.md); "
        "nothing in these says which VAE made them.",
    )
    npz_dir: Place | None = Field(
        default=None, description="Folder of these files, laid out like that of the pictures, instead of beside them."
    )
    workers: Annotated[int, Field(ge=0)] = Field(
        default=2, description="Threads that prepare batches ahead; the number never changes the result."
    )


class OptimizerSection(Section):
    """The optimizer and its learning rates."""

    optimizer: str = Field(
        default="adamw", description="Optimizer: a name from docs/optimizers.md, or a class by its dotted name."
    )
    optimizer_args: list[str] = Field(
        default_factory=list, description="The optimizer's arguments, such as betas=0.9,0.99 eps=1e-6."
    )
    learning_rate: Rate | None = Field(
        default=None,
        description="Learning rate of every part that has none of its own; left out, 0.0001, or 1 with an optimizer "
        "that finds its own.",
    )
    unet_lr: NotNegative | None = Field(
        default=None, description="Learning rate of the U-Net's LoRA; 0: it stays as it is."
    )
    text_encoder_lr: NotNegative | None = Field(
        default=None, description="Learning rate of the text encoder's LoRA; 0: it stays as it is."
    )
    lora_plus_ratio: Rate | None = Field(
        default=None, description="LoRA+: how many times faster the half learns that begins at zero; commonly 16."
    )
    unet_lora_plus_ratio: Rate | None = Field(default=None, description="The same for the U-Net alone.")
    text_encoder_lora_plus_ratio: Rate | None = Field(default=None, description="The same for the text encoder alone.")
    block_lr: BlockFactors = Field(
        default=[],
        description="Factors of the learning rate of the U-Net's 25 blocks (12 input, middle, 12 output); 0: the block "
        "gets no adapters.",
    )
    weight_decay: NotNegative = Field(default=0.01, description="Weight decay.")
    weight_decay_exclude: list[str] = Field(
        default=["*.dora_scale"],
        description="Patterns of the saved names of tensors without weight decay; none after it: all have it.",
    )
    lr_schedule: Literal[
        "constant", "linear", "cosine", "cosine_restarts", "polynomial", "inverse_sqrt", "warmup_stable_decay",
        "piecewise",
    ] = Field(
        default="constant", description="How the learning rate goes down over the run, after the warm-up."
    )  # fmt: skip
    lr_warmup_steps: StepsOrShare = Field(
        default=0, description="Steps over which the learning rate rises from 0; below 1, a share of the run."
    )
    lr_decay_steps: StepsOrShare = Field(
        default=0.2, description="Last steps, in which warmup_stable_decay goes down; below 1, a share of the run."
    )
    lr_cycles: PositiveInt = Field(default=2, description="How often cosine_restarts goes down.")
    lr_power: Rate = Field(default=2.0, description="Power of polynomial; 1 is linear.")
    lr_timescale: PositiveInt | None = Field(
        default=None,
        description="Steps after which inverse_sqrt begins to go down markedly; left out, those of the warm-up, or "
        "10000.",
    )
    lr_min_ratio: Share = Field(
        default=0.0, description="Share of the learning rate at which schedules end that would go down to 0."
    )
    lr_table: LearningRateTable | None = Field(
        default=None,
        description="Multipliers for piecewise, each with the step (below 1, the share of the run) before which it "
        "holds, and one for the rest: 1:100,0.1:150,0.01.",
    )
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="Clip gradients to this norm; 0 turns it off."
    )


class TrainingSection(Section):
    """Length, batches, precision."""

    steps: PositiveInt | None = Field(default=None, description="Optimizer steps; left out together with epochs: 1600.")
    epochs: PositiveInt | None = Field(default=None, description="Passes over the data, instead of steps.")
    batch_size: PositiveInt = Field(default=1, description="Pictures per process and micro-batch.")
    gradient_accumulation: PositiveInt = Field(default=1, description="Micro-batches added up for one optimizer step.")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None,
        description="Save, draw and validate a moving average of the LoRA over some 1 / (1 - n) steps, such as 0.99, "
        "instead of the last step's; states hold both.",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="Precision of the frozen base model; auto is bf16 on a GPU that has it, else fp32."
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Recompute activations instead of keeping them: less memory, about 1.4 times the time.",
    )
    attention: Literal["sdpa", "plain"] = Field(default="sdpa", description="Attention implementation.")
    compile: Literal["inductor", "aot_eager", "eager"] | None = Field(
        default=None,
        description="Compile the model by torch.compile with this backend; each shape of batch takes minutes before its "
        "first step, results are equal to rounding.",
    )
    device: str = Field(default="auto", description="Where to train: auto, cpu, cuda, cuda:1, mps.")
    shard_base: bool | None = Field(
        default=None,
        description="Let each of several processes hold a part of the base model, for one too large for a single card; "
        "left out, where accelerate's configuration asks for FSDP (docs/processes.md).",
    )
    seed: Annotated[int, Field(ge=0)] = Field(
        default=42, description="Everything random in the run follows from this number."
    )


class LossSection(Section):
    """What training makes small, and the noise and timesteps that it is measured with (docs/losses.md)."""

    loss_type: Literal["l2", "l1", "huber", "smooth_l1"] = Field(
        default="l2", description="Squares of errors (l2), absolute values (l1), or squares of small ones only."
    )
    huber_c: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.1, description="Where huber and smooth_l1 turn from squares to absolute values."
    )
    huber_scale: Rate = Field(default=1.0, description="Factor of huber_c, in the schedules that have one.")
    huber_schedule: Literal["constant", "exponential", "snr"] = Field(
        default="snr", description="How huber_c follows the timestep."
    )
    min_snr_gamma: Rate | None = Field(
        default=None, description="Let timesteps of little noise count less: min-SNR weighting; commonly 5."
    )
    debiased_estimation: bool = Field(
        default=False, description="Weigh the loss by 1 / sqrt(SNR), or for v prediction by 1 / (SNR + 1)."
    )
    scale_v_pred_loss: bool = Field(
        default=False, description="Weigh a v prediction's loss as if the noise were predicted."
    )
    v_pred_like_loss: Rate | None = Field(
        default=None, description="Add so much of the loss that a v prediction would have; commonly 0.2."
    )
    zero_terminal_snr: bool = Field(
        default=False, description="Let the last timestep be noise alone; for models that predict v."
    )
    min_timestep: Annotated[int, Field(ge=0, lt=1000)] = Field(default=0, description="First timestep that is trained.")
    max_timestep: Annotated[int, Field(gt=0, le=1000)] = Field(
        default=1000, description="Timestep before which training ends, of 1000, the noisiest."
    )
    timestep_density: Literal["uniform", "logit_normal", "cosmap"] = Field(
        default="uniform", description="How often each timestep is trained: all alike, or those in the middle more."
    )
    timestep_logit_mean: float = Field(
        default=0.0, description="For logit_normal: above 0 noisier timesteps come more often, below 0 less."
    )
    timestep_logit_std: Rate = Field(default=1.0, description="For logit_normal: how widely timesteps are spread.")
    noise_offset: Rate | None = Field(
        default=None,
        description="Raise or lower the noise of whole channels by so much, to learn dark and bright; commonly 0.05.",
    )
    noise_offset_random: bool = Field(
        default=False, description="Draw the strength of noise_offset for each sample, from 0 up to it."
    )
    noise_offset_adaptive: float | None = Field(
        default=None, description="Add so many times a channel's mean, without its sign, to noise_offset."
    )
    pyramid_noise_levels: Annotated[int, Field(ge=1, le=10)] | None = Field(
        default=None, description="Add so many noises of lower and lower resolution (multires noise); commonly 6."
    )
    pyramid_noise_discount: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.3, description="How strong each of them is in proportion to the one before."
    )
    input_perturbation: Rate | None = Field(
        default=None,
        description="Show the model noise that differs by so much from what it is to predict; commonly 0.1.",
    )
    input_perturbation_random: bool = Field(
        default=False, description="Draw the strength of input_perturbation for each sample, from 0 up to it."
    )
    diff_output_preservation: bool = Field(
        default=False,
        description="Let what the base model makes of the regularization pictures be their target, so that it stays.",
    )


class ValidationSection(Section):
    """Pictures that are held out, to see whether what was learned holds for pictures that were not trained."""

    validation_split: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Share of the training pictures that is held out and never trained on."
    )
    validation_seed: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Another number holds out other pictures; left out, the run's seed."
    )
    validate_every_epochs: PositiveInt | None = Field(
        default=None, description="Measure the loss of the held-out pictures every n epochs."
    )
    validate_every_steps: PositiveInt | None = Field(
        default=None,
        description="Measure it every n steps; left out together with epochs: after each epoch. At the start and the "
        "end it is always measured.",
    )
    keep_best: PositiveInt | None = Field(
        default=None,
        description="Keep the n LoRAs with which the held-out pictures' loss was lowest, or as best_by says.",
    )
    stop_early: PositiveInt | None = Field(
        default=None, description="End the run when this has not become better in n measurements."
    )
    best_by: Literal["loss", "pictures"] = Field(
        default="loss",
        description="What keep_best and stop_early go by: the held-out pictures' loss, or the judge's score of the "
        "samples (docs/judge.md).",
    )
    judge: PlaceOrHubId | None = Field(
        default=None,
        description="What scores the samples for best_by = pictures: folder or hub id of a CLIP or DINO, or `demo`.",
    )


class SaveSection(Section):
    """Where results go and what the file says of itself."""

    output: Place | None = Field(default=None, description="Folder for the LoRA, states, logs, samples and report.")
    name: FileName | None = Field(
        default=None, description="Base name of the files; left out, `last`, `epoch-000001`, `step-00000100`."
    )
    format: Literal["safetensors", "pt", "ckpt"] = Field(default="safetensors", description="File format of the LoRA.")
    save_precision: Literal["float", "fp16", "bf16"] = Field(default="fp16", description="Precision of the saved LoRA.")
    save_every_epochs: PositiveInt | None = Field(default=None, description="Save a LoRA every n epochs.")
    save_every_steps: PositiveInt | None = Field(default=None, description="Save a LoRA every n steps.")
    saves: PositiveInt | None = Field(
        default=None, description="Save at least so many LoRAs over the run, after epochs evenly apart."
    )
    keep_last_epochs: PositiveInt | None = Field(
        default=None, description="Of the LoRAs saved after epochs, keep only the newest n."
    )
    keep_last_steps: PositiveInt | None = Field(
        default=None, description="Of the LoRAs saved after steps, keep only those of the last n steps."
    )
    state_every_steps: Annotated[int, Field(ge=0)] = Field(
        default=250,
        description="Save a resumable state every n steps, besides the one at each save and at the end; 0: never.",
    )
    keep_states: PositiveInt = Field(default=1, description="How many of the newest states to keep.")
    overwrite: bool = Field(
        default=False, description="Start afresh in a folder that holds another run, which is moved aside, not deleted."
    )
    title: str | None = Field(default=None, description="Title in the file's metadata; left out, the name.")
    author: str | None = Field(default=None, description="Author in the file's metadata.")
    description: str | None = Field(default=None, description="Description in the file's metadata.")
    license: str | None = Field(default=None, description="License in the file's metadata.")
    tags: str | None = Field(default=None, description="Comma-separated tags in the file's metadata.")
    trigger_phrase: str | None = Field(default=None, description="Trigger phrase in the file's metadata.")
    usage_hint: str | None = Field(default=None, description="Hint for use in the file's metadata.")
    merged_from: str | None = Field(
        default=None, description="In the file's metadata, the models that the base model was merged from."
    )
    preprocessor: str | None = Field(default=None, description="Preprocessor in the file's metadata.")
    thumbnail: Place | None = Field(
        default=None, description="A picture for the file's metadata, which some programs show; made small there."
    )
    comment: str | None = Field(default=None, description="Free text in the file's metadata.")
    metadata: Literal["full", "minimal"] = Field(
        default="full",
        description="What the file says of its training: all that UIs show, or only what programs need to load it.",
    )
    upload: str | None = Field(
        default=None,
        description="Upload the LoRA with its page and samples to this repository of the Hugging Face hub at the end "
        "(your-name/my-lora); private if it is new.",
    )
    upload_public: bool = Field(default=False, description="Let everyone see a repository that upload makes.")
    upload_folder: RepositoryFolder | None = Field(
        default=None, description="Folder in that repository for all that is uploaded; left out, its root."
    )
    upload_saves: bool = Field(
        default=False, description="Upload each LoRA that is saved on the way too, while training goes on."
    )
    upload_states: bool = Field(
        default=False,
        description="Upload the states too, to go on elsewhere, with the run's options, which name folders of this "
        "computer.",
    )
    share_captions: bool = Field(
        default=True, description="Write folder names and caption tags into the file's metadata, as UIs show them."
    )


class SampleSection(Section):
    """Pictures generated while training and for the report."""

    prompts: list[str] = Field(
        default_factory=list,
        description="Prompts to draw, with options such as `--w 512 --d 7`, or a .txt, .toml or .json file of them "
        "(docs/training-log.md); left out, two captions of the pictures.",
    )
    sample_every_steps: PositiveInt | None = Field(default=None, description="Draw the prompts every n steps.")
    sample_every_epochs: PositiveInt | None = Field(default=None, description="Draw the prompts every n epochs.")
    at_first: bool = Field(default=False, description="Draw the prompts before the first step, as before_after does.")
    before_after: bool = Field(default=True, description="Draw the prompts before and after training, for the report.")
    negative: str = Field(default="", description="Negative prompt.")
    sample_size: Size | None = Field(
        default=None, description="Size of the samples in pixels; left out, the training size."
    )
    sample_steps: Annotated[int, Field(ge=1, le=1000)] = Field(default=20, description="Sampler steps of the samples.")
    guidance: Annotated[float, Field(ge=0)] = Field(
        default=7.5, description="Classifier-free guidance scale of the samples."
    )
    sampler: str = Field(
        default="dpm++", description="Sampler of the samples: ddim, euler, euler_a, dpm++, unipc, heun, pndm and more."
    )
    sample_seed: Annotated[int, Field(ge=0)] = Field(
        default=1, description="Seed of the first sample; the others count up."
    )


class LogSection(Section):
    """What is shown and logged."""

    tensorboard: bool = Field(default=True, description="Write TensorBoard logs into the output folder.")
    trackers: Trackers = Field(
        default_factory=list, description="Log to these too, wandb or trackio; file names go there, places do not."
    )
    project: str = Field(default="lorasmith", description="Project that trackers put the run into.")
    run_name: str | None = Field(
        default=None, description="Name of the run there; left out, that of the LoRA or of the output folder."
    )
    progress: bool = Field(default=True, description="Show a progress bar; without a terminal, a line now and then.")


class TrainConfig(Section):
    """Train a LoRA on pictures."""

    dry_run: bool = Field(
        default=False, description="Print the plan and stop before a model is loaded or the output written."
    )
    resume: Place | None = Field(
        default=None,
        description="Go on with a stopped run: its output folder or one of its states; options come from it.",
    )
    model: ModelSection = Field(default_factory=ModelSection)
    network: NetworkSection = Field(default_factory=NetworkSection)
    data: DataSection = Field(default_factory=DataSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    loss: LossSection = Field(default_factory=LossSection)
    validation: ValidationSection = Field(default_factory=ValidationSection)
    save: SaveSection = Field(default_factory=SaveSection)
    samples: SampleSection = Field(default_factory=SampleSection)
    log: LogSection = Field(default_factory=LogSection)

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> "TrainConfig":
        for message in contradictions(self):
            raise ValueError(message)
        return self


def changing_augmentations(data: DataSection) -> list[str]:
    """Return the names of the augmentations that are on and give other pixels each time, so that none can be cached."""
    ends = data.face_crop_aug_range
    names = [name for name in ("color", "random_crop") if getattr(data, name)]
    return names + (["face_crop_aug_range"] if ends is not None and ends[0] != ends[1] else [])


_OF_ADAPTERS = {  # what a network module of another program is told in its own way
    "adapter", "adapter_options", "conv_rank", "conv_alpha", "block_ranks", "block_alphas", "conv_block_ranks",
    "conv_block_alphas", "rank_dropout", "module_dropout", "product_decay",
}  # fmt: skip
_OF_ADAPTERS_RATES = {"block_lr", "lora_plus_ratio", "unet_lora_plus_ratio", "text_encoder_lora_plus_ratio"}


def contradictions(cfg: TrainConfig) -> list[str]:
    """Return one sentence for each pair of options that cannot both be meant."""
    data, training, network, optimizer = cfg.data, cfg.training, cfg.network, cfg.optimizer
    blocks = network.block_ranks, network.block_alphas, network.conv_block_ranks, network.conv_block_alphas
    augmentations = changing_augmentations(data)
    in_file = [name for name in ("images", "regularization", "captions", "caption") if getattr(data, name) is not None]
    of_adapters = [
        *network.model_dump(exclude_defaults=True, include=_OF_ADAPTERS),
        *optimizer.model_dump(exclude_defaults=True, include=_OF_ADAPTERS_RATES),
    ]
    changing = _changed(network, "neuron_dropout", "rank_dropout", "module_dropout", "network_module")
    uploads = _changed(cfg.save, "upload_public", "upload_folder", "upload_saves", "upload_states")
    of_held_out, samples = options_of_held_out(cfg.validation), cfg.samples
    is_by_pictures = cfg.validation.best_by == "pictures"
    checks = {
        f"dataset_config names folders and captions by itself, but {' and '.join(in_file)} "
        f"{'is' if len(in_file) == 1 else 'are'} given too; leave out one or the other": data.dataset_config
        and in_file,
        "steps and epochs are both given; give one of them": training.steps and training.epochs,
        "masks and alpha_mask both say which places are learned; leave out one of them": data.masks and data.alpha_mask,
        f"cache_latents keeps each picture as it is, but {' and '.join(augmentations)} would change it every time; "
        "leave out one or the other": data.cache_latents and augmentations,
        f"npz files hold pictures as they were cut, but {' and '.join(augmentations)} would change them every time; "
        "leave out one or the other": data.npz and augmentations,
        "npz takes latents that were encoded once, but cache_latents is off, to encode them for every step; leave out "
        "one of them": data.npz and data.cache_latents is False,
        "npz_dir says where npz files are, but npz, to use them, is missing; add it, or leave the other out": (
            data.npz_dir and not data.npz and not cfg.resume
        ),
        "prompts are given, but nothing draws them: before_after is off, and sample_every_steps and "
        "sample_every_epochs are left out; give one of these, or leave out prompts": cfg.samples.prompts
        and not (
            cfg.samples.before_after
            or cfg.samples.at_first
            or cfg.samples.sample_every_steps
            or cfg.samples.sample_every_epochs
        ),
        "text_encoder_lr is given, but train = unet leaves the text encoder alone; leave out one of them": (
            optimizer.text_encoder_lr and network.train == "unet"
        ),
        "ranks, alphas and rates of the U-Net's blocks and convolutions are given, but train = text_encoder leaves the "
        "U-Net alone; leave out one or the other": network.train == "text_encoder"
        and any((*blocks, optimizer.block_lr, network.conv_rank)),
        "conv_alpha is for convolutions, but conv_rank and conv_block_ranks are left out; give one of these, or leave "
        "it out": network.conv_alpha and not (network.conv_rank or network.conv_block_ranks),
        "conv_block_alphas are for convolutions, but conv_rank and conv_block_ranks are left out; give one of them, or "
        "leave it out": network.conv_block_alphas and not (network.conv_rank or network.conv_block_ranks),
        "starting weights bring their ranks and alphas, so those of blocks and convolutions cannot be given too; leave "
        "out one or the other": network.weights and any((*blocks, network.conv_rank, network.conv_alpha)),
        "unet_lr is given, but train = text_encoder leaves the U-Net alone; leave out one of them": (
            optimizer.unet_lr and network.train == "text_encoder"
        ),
        "text_encoder_lora_plus_ratio is given, but train = unet leaves the text encoder alone; leave out one of "
        "them": optimizer.text_encoder_lora_plus_ratio and network.train == "unet",
        "unet_lora_plus_ratio is given, but train = text_encoder leaves the U-Net alone; leave out one of them": (
            optimizer.unet_lora_plus_ratio and network.train == "text_encoder"
        ),
        f"network_module = {network.network_module} makes its own adapters, so {' and '.join(of_adapters)} cannot be "
        "meant; leave out one or the other, and say in network_args what the module can do of it": (
            network.network_module and of_adapters
        ),
        f"compile makes fixed code of the model, but {' and '.join(changing)} would change it at every step; leave out "
        "one or the other": training.compile and changing,
        "network_args are for network_module, which is missing; give it, or leave them out": network.network_args
        and not network.network_module,
        **dict.fromkeys(_bucket_contradictions(data, are_in_file=data.dataset_config is not None), True),
        "saves and save_every_epochs both say after which epochs to save; leave out one of them": cfg.save.saves
        and cfg.save.save_every_epochs,
        "keep_last_epochs is for LoRAs saved after epochs, but save_every_epochs and saves are left out; give one of "
        "them, or leave it out": (
            cfg.save.keep_last_epochs and not (cfg.save.save_every_epochs or cfg.save.saves) and not cfg.resume
        ),
        "keep_last_steps is for LoRAs saved after steps, but save_every_steps is left out; give it, or leave the other "
        "out": cfg.save.keep_last_steps and not cfg.save.save_every_steps and not cfg.resume,
        **dict.fromkeys(_schedule_contradictions(optimizer), True),
        f"lr_warmup_steps = {optimizer.lr_warmup_steps:g} is not below steps = {training.steps}; "
        "lower the first or raise the second": training.steps and optimizer.lr_warmup_steps >= training.steps,
        f"captions names a metadata JSON, but source = {data.source} has captions of its own; leave out one of them": (
            data.captions and data.source not in ("auto", "metadata_json") and "." not in data.source
        ),
        "caption_extension is for caption files beside the pictures, but captions names a metadata JSON; "
        "leave out one of them": data.captions and data.caption_extension,
        "captions names a metadata JSON, but images, the folder of its pictures, is missing": (
            data.captions and not data.images and not cfg.resume
        ),
        "dataset_root is for the paths in a dataset file, but dataset_config, the file, is missing; give it, or leave "
        "the other out": data.dataset_root and not data.dataset_config and not cfg.resume,
        **dict.fromkeys(
            separator_contradictions(
                data.keep_tokens, data.keep_tokens_separator, data.caption_separator, data.secondary_separator
            ),
            True,
        ),
        "token_warmup_min says with how many parts the growth begins, but token_warmup_steps, how long it takes, is "
        "missing; give it, or leave the other out": (
            _is_changed(data, "token_warmup_min") and not data.token_warmup_steps and not cfg.resume
        ),
        "prior_pictures are drawn into the folder of regularization pictures, but regularization, that folder, is "
        "missing; give a place for them": data.prior_pictures and not data.regularization and not cfg.resume,
        "prior_prompt is for prior_pictures, how many are to be drawn; give that too, or leave the prompt out": (
            data.prior_prompt and not data.prior_pictures and not cfg.resume
        ),
        "cache_dir says where the cache folder is, but disk_cache is off; leave out one of them": (
            data.cache_dir and not data.disk_cache
        ),
        "prior_loss_weight is for regularization pictures, but regularization, their folder, is missing; "
        "give it, or leave the weight out": (
            not data.regularization and not data.dataset_config and _is_changed(data, "prior_loss_weight")
        ),
        f"images and regularization are the same folder, {data.images}; give regularization pictures of the class, "
        "not of the thing itself, in a folder of their own": (
            data.images
            and data.regularization
            and os.path.realpath(data.images) == os.path.realpath(data.regularization)
        ),
        f"{' and '.join(of_held_out)} {'is' if len(of_held_out) == 1 else 'are'} for held-out pictures, but "
        "validation_split, their share, is missing; give it, or leave the other out": (
            of_held_out and not cfg.validation.validation_split and not data.dataset_config and not cfg.resume
        ),
        f"{' and '.join(uploads)} {'is' if len(uploads) == 1 else 'are'} for upload, where to; give that too, or leave "
        f"{'it' if len(uploads) == 1 else 'them'} out": (uploads and not cfg.save.upload and not cfg.resume),
        "project and run_name are for trackers, but trackers, which of them, is missing; give it, or leave the other "
        "out": ((cfg.log.run_name or _is_changed(cfg.log, "project")) and not cfg.log.trackers and not cfg.resume),
        "judge scores the samples for best_by = pictures, which is left out; give both, or leave judge out": (
            cfg.validation.judge and not is_by_pictures and not cfg.resume
        ),
        "best_by = pictures needs judge, what scores them; give a CLIP or DINO with it": (
            is_by_pictures and cfg.validation.judge is None and not cfg.resume
        ),
        "best_by says what keep_best and stop_early go by; give one of these, or leave it out": (
            is_by_pictures and not (cfg.validation.keep_best or cfg.validation.stop_early) and not cfg.resume
        ),
        "best_by = pictures scores the samples, but sample_every_steps and sample_every_epochs are left out; give one "
        "of them": (
            is_by_pictures and not (samples.sample_every_steps or samples.sample_every_epochs) and not cfg.resume
        ),
        "best_by = pictures compares with samples of the untrained model, but before_after and at_first are off; give "
        "one of them": is_by_pictures and not (samples.before_after or samples.at_first) and not cfg.resume,
        "resume goes on with a run, but overwrite starts afresh; leave out one of them": (
            cfg.resume and cfg.save.overwrite
        ),
        **dict.fromkeys(_loss_contradictions(cfg.loss), True),
        "diff_output_preservation is for regularization pictures, but regularization, their folder, is missing; "
        "give it, or leave the other out": (
            cfg.loss.diff_output_preservation and not data.regularization and not data.dataset_config
        ),
    }
    return [message for message, is_wrong in checks.items() if is_wrong]


def options_of_held_out(validation: ValidationSection) -> list[str]:
    """Return the options that are given and mean nothing without held-out pictures."""
    others = {"validation_split", "best_by", "judge"}
    if validation.best_by == "pictures":
        others |= {"keep_best", "stop_early"}
    return list(validation.model_dump(exclude_defaults=True, exclude=others))


def _loss_contradictions(loss: LossSection) -> list[str]:
    huber = _changed(loss, "huber_c", "huber_scale", "huber_schedule")
    logit = _changed(loss, "timestep_logit_mean", "timestep_logit_std")
    offset = _changed(loss, "noise_offset_random", "noise_offset_adaptive")
    checks = {
        f"{' and '.join(huber)} shape{'s' * (len(huber) == 1)} the losses huber and smooth_l1, but loss_type = "
        f"{loss.loss_type}; change that, or leave the other out": huber and loss.loss_type in ("l2", "l1"),
        "huber_scale has no part in huber_schedule = snr; give another schedule, or leave the scale out": (
            _changed(loss, "huber_scale") and loss.huber_schedule == "snr"
        ),
        f"min_timestep = {loss.min_timestep} is not below max_timestep = {loss.max_timestep}; lower the first or "
        "raise the second": loss.min_timestep >= loss.max_timestep,
        f"{' and '.join(logit)} shape{'s' * (len(logit) == 1)} timestep_density = logit_normal, but it is "
        f"{loss.timestep_density}; change that, or leave the other out": logit
        and loss.timestep_density != "logit_normal",
        f"{' and '.join(offset)} change{'s' * (len(offset) == 1)} noise_offset, which is missing; give it, or leave "
        "the other out": offset and loss.noise_offset is None,
        "pyramid_noise_discount is for pyramid_noise_levels, how many there are; give that, or leave the other out": (
            _changed(loss, "pyramid_noise_discount") and loss.pyramid_noise_levels is None
        ),
        "input_perturbation_random is for input_perturbation, how strong it is at most; give that, or leave the other "
        "out": loss.input_perturbation_random and loss.input_perturbation is None,
    }
    return [message for message, is_wrong in checks.items() if is_wrong]


def _changed(section: Section, *names: str) -> list[str]:
    return [name for name in names if _is_changed(section, name)]


def separator_contradictions(
    keep_tokens: int, keep_tokens_separator: str, caption_separator: str, secondary_separator: str
) -> list[str]:
    """Return one sentence for each thing about the separators of captions that cannot be meant."""
    checks = {
        f"keep_tokens = {keep_tokens} and keep_tokens_separator = {keep_tokens_separator} both say which "
        "parts stay in place; leave out one of them": keep_tokens and keep_tokens_separator,
        f"secondary_separator = {secondary_separator} cannot be told from the other separators, "
        f"{caption_separator} {keep_tokens_separator}: one is in the other; give one of other characters": (
            secondary_separator
            and any(
                other and (other in secondary_separator or secondary_separator in other)
                for other in (caption_separator, keep_tokens_separator)
            )
        ),
        f"keep_tokens_separator = {keep_tokens_separator} is part of caption_separator = "
        f"{caption_separator}; give one that is not": keep_tokens_separator
        and keep_tokens_separator in caption_separator,
    }
    return [message for message, is_wrong in checks.items() if is_wrong]


def _bucket_contradictions(given: "DataSection | PrepareConfig", *, are_in_file: bool = False) -> list[str]:
    limits = [name for name in ("bucket_min", "bucket_max") if _is_changed(given, name)]
    changed = [name for name in _BUCKET_OPTIONS if _is_changed(given, name)]
    checks = {
        f"bucket_min = {given.bucket_min} is larger than bucket_max = {given.bucket_max}; swap them": (
            given.buckets and given.bucket_min > given.bucket_max
        ),
        f"bucket_step = {given.bucket_step} is not a multiple of 8; use 64, or 8 for the finest buckets": (
            given.bucket_step % 8
        ),
        f"{' and '.join(changed)} would change the buckets, but they are off; "
        "add buckets, or leave out the other": not given.buckets and not are_in_file and changed,
        f"bucket_no_upscale takes the buckets from the pictures' own sizes, so {' and '.join(limits)} would "
        "have no effect; leave out one or the other": given.bucket_no_upscale and limits,
    }
    return [message for message, is_wrong in checks.items() if is_wrong]


_SHAPED_BY = {  # option -> the schedules that it shapes
    "lr_decay_steps": ["warmup_stable_decay"],
    "lr_cycles": ["cosine_restarts"],
    "lr_power": ["polynomial"],
    "lr_timescale": ["inverse_sqrt"],
    "lr_min_ratio": ["linear", "cosine", "cosine_restarts", "polynomial", "warmup_stable_decay"],
    "lr_table": ["piecewise"],
}


def _schedule_contradictions(optimizer: OptimizerSection) -> list[str]:
    name = optimizer.lr_schedule
    messages = [
        f"{option} shapes lr_schedule = {' or '.join(names)}, but it is {name}; change that, or leave {option} out"
        for option, names in _SHAPED_BY.items()
        if name not in names and _is_changed(optimizer, option)
    ]
    if name == "piecewise" and optimizer.lr_table is None:
        messages.append(
            "lr_schedule = piecewise needs lr_table, its multipliers, such as 1:100,0.1:150,0.01; give that too"
        )
    return messages


def _is_changed(section: Section, name: str) -> bool:
    return getattr(section, name) != type(section).model_fields[name].default


class DemoConfig(Section):
    """Train a LoRA on the embedded model and show what it learned."""

    output: Place = Field(default=Path("lorasmith-demo"), description="Folder for the demo's results.")
    steps: PositiveInt = Field(default=400, description="Optimizer steps.")
    seed: Annotated[int, Field(ge=0)] = Field(
        default=42, description="Everything random in the demo follows from this number."
    )


_BUCKET_OPTIONS = ("bucket_min", "bucket_max", "bucket_step", "bucket_rule", "bucket_no_upscale")


class CheckConfig(Section):
    """Find what is wrong with a folder of pictures, before any training."""

    folder: Place | None = Field(
        default=None,
        description="Folder to look through: a parent of DreamBooth folders (`N_identifier class`), one of them, or a "
        "plain folder.",
        json_schema_extra={"positional": "DIR"},
    )
    resolution: Size = Field(
        default=(512, 512), description="Size that you will train at, in pixels, one side or width,height."
    )
    trigger: str | None = Field(
        default=None,
        description="Word that every caption should hold; left out, the identifier in each DreamBooth folder's name.",
    )
    captions: Place | None = Field(
        default=None, description="Metadata file, JSON or JSONL, with captions and tags instead of files for each."
    )
    caption: str | None = Field(default=None, description="Caption that you will give for pictures without one.")
    caption_extension: str | None = Field(
        default=None, description="Extension of caption files; left out, `.caption` and then `.txt` are looked for."
    )
    max_token_length: TokenLength = Field(
        default=75, description="How many tokens of a caption you will train: 75, 150 or 225."
    )
    every: bool = Field(default=False, alias="all", description="Show every picture of a finding, not three examples.")
    json_file: str | None = Field(
        default=None, alias="json", description="Write the findings to this JSON file, or to the screen with `-`."
    )
    masks: Place | None = Field(
        default=None, description="Folder of masks that you will train with, to look at and to show in sheets."
    )
    alpha_mask: bool = Field(default=False, description="The same for transparency that you will take as masks.")
    sheet: Place | None = Field(
        default=None, description="Write a contact sheet: every picture with its caption and what was found."
    )
    preview: Place | None = Field(
        default=None, description="Write a sheet of every crop: the whole picture, what is cut away in red."
    )
    recursive: bool = Field(default=False, description="Look at the pictures of folders in folders too.")
    buckets: bool = Field(default=False, description="Preview the crops of buckets of like aspect ratio.")
    bucket_min: PositiveInt = Field(default=256, description="Smallest side of a bucket in pixels.")
    bucket_max: PositiveInt = Field(default=1024, description="Largest side of a bucket in pixels.")
    bucket_step: PositiveInt = Field(default=64, description="Bucket sides are multiples of this many pixels.")
    bucket_rule: Literal["less-crop", "sd-scripts"] = Field(
        default="less-crop", description="How a picture finds its bucket, as you will train."
    )
    bucket_no_upscale: bool = Field(default=False, description="Never enlarge a picture.")
    face_crop_aug_range: Range | None = Field(
        default=None, description="Crop around the faces that pictures' names tell of, as you will train."
    )
    fix: Place | None = Field(
        default=None, description="Write a repaired copy of the pictures into this new folder; nothing else changes."
    )

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> "CheckConfig":
        options = ["buckets", *_BUCKET_OPTIONS, "face_crop_aug_range"]
        given = [name for name in options if _is_changed(self, name)]
        if given and not self.preview:
            raise ValueError(f"{' and '.join(given)} change what --preview shows; add it, or leave the other out")
        if buckets := [name for name in given if name in _BUCKET_OPTIONS and not self.buckets]:
            raise ValueError(f"{' and '.join(buckets)} change the buckets, but they are off; add --buckets")
        if self.captions and (self.caption_extension or self.recursive or self.fix):
            names = [name for name in ("caption_extension", "recursive", "fix") if getattr(self, name)]
            raise ValueError(
                f"{' and '.join(names)} can do nothing for captions in a metadata file, which names the pictures too; "
                "leave out one or the other"
            )
        return self


class CaptionsConfig(Section):
    """Merge caption files and tag files into one metadata file, and clean them."""

    folder: Place | None = Field(
        default=None,
        description="Folder of pictures; left out with input, the entries of that file alone are cleaned.",
        json_schema_extra={"positional": "DIR"},
    )
    output: Place | None = Field(default=None, description="Metadata file to write, .json or .jsonl.")
    input: Place | None = Field(
        default=None, description="Metadata file to begin with, JSON or JSONL: its entries are kept and updated."
    )
    read: Literal["both", "captions", "tags"] = Field(
        default="both", description="Which text files are read: those of captions, those of tags, or both."
    )
    caption_extension: str | None = Field(
        default=None, description="Extension of caption files; left out, .caption, unless that is the tag_extension."
    )
    tag_extension: str | None = Field(
        default=None, description="Extension of tag files; left out, .txt, unless that is the caption_extension."
    )
    recursive: bool = Field(default=False, description="Also the pictures in all folders inside.")
    full_path: bool = Field(default=False, description="Write the full path of each picture, not that in the folder.")
    clean: bool = Field(
        default=False,
        description="Clean captions and tags by the tables of rules that come along (docs/captions-metadata.md).",
    )
    rules: Place | None = Field(
        default=None, description="Tables of your own (TOML), which extend those that come along, or replace them."
    )
    remove_tags: list[str] = Field(default_factory=list, description="Tags to leave out.")
    replace: list[str] = Field(
        default_factory=list,
        description="Pairs such as grey:gray: whole tags, and whole words of captions, to replace.",
    )
    add_tags: list[str] = Field(
        default_factory=list, description="Tags that every picture gets, before its own; a trigger word goes here."
    )
    min_count: PositiveInt = Field(default=1, description="Leave out tags of fewer pictures than this.")
    max_tags: PositiveInt | None = Field(default=None, description="Keep at most this many tags of each picture.")
    write_files: Place | None = Field(
        default=None,
        description="Write captions and tags as .txt files into this new folder; or, if it is DIR, beside the pictures "
        "that have no text file.",
    )
    overwrite: bool = Field(default=False, description="Write over an existing output, of which a .bak is kept.")
    dry_run: bool = Field(default=False, description="Show what would change, and write nothing.")

    @model_validator(mode="after")
    def _check_together(self) -> "CaptionsConfig":
        of_files = ("read", "caption_extension", "tag_extension", "recursive", "full_path", "write_files")
        given = [name for name in of_files if _is_changed(self, name)]
        if self.folder is None and self.input is not None and given:
            raise ValueError(f"{' and '.join(given)} can do nothing without DIR; give the folder, or leave this out")
        for kind, other in (("captions", "tag_extension"), ("tags", "caption_extension")):
            if self.read == kind and _is_changed(self, other):
                raise ValueError(f"{other} can do nothing where only {kind} are read; leave out one of them")
        return self


def _check_shard(shard: str) -> str:
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError("expected part i of n parts, counted from 1: of four, 1/4, 2/4, 3/4 and 4/4")
    return shard


Shard = Annotated[str, AfterValidator(_check_shard)]
Existing = Literal["skip", "overwrite", "append"]


class CaptionConfig(Section):
    """Write a caption beside each picture, by a model that describes it."""

    folder: Place | None = Field(
        default=None, description="Folder of pictures.", json_schema_extra={"positional": "DIR"}
    )
    captioner: str = Field(
        default="blip", description="What describes: blip, vision-language, or a module of your own by its dotted name."
    )
    model: PlaceOrHubId | None = Field(
        default=None, description="Its model: a folder or a hub id; left out, the captioner's own choice."
    )
    prompt: str | None = Field(
        default=None,
        description="What the model is asked (vision-language), or how each caption begins (blip).",
    )
    batch_size: PositiveInt = Field(default=4, description="Pictures described at once.")
    max_length: PositiveInt = Field(default=75, description="Longest caption, in tokens of the model.")
    min_length: Annotated[int, Field(ge=0)] = Field(default=5, description="Shortest caption, in tokens of the model.")
    beams: PositiveInt = Field(
        default=1, description="Follow so many beginnings at once and take the likeliest caption."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="Draw each word among the likeliest that together have this share; left out, take the likeliest.",
    )
    seed: Annotated[int, Field(ge=0)] = Field(
        default=42, description="What is drawn for top_p follows from this number and the picture alone."
    )
    remove_phrases: PlaceOrHubId | None = Field(
        default=None,
        description="Cut phrases out of captions: `habits` for those that come along (`with the words ...`), or a file "
        "with a regular expression a line.",
    )
    caption_extension: str = Field(default=".caption", description="Extension of the files that are written.")
    recursive: bool = Field(default=False, description="Also the pictures in all folders inside.")
    existing: Existing = Field(
        default="skip",
        description="Pictures that have a caption: skip them, overwrite it, or append the new one to it.",
    )
    shard: Shard | None = Field(
        default=None, description="Do only part i of n parts, as in 2/4, so that several machines share the work."
    )
    device: str = Field(default="auto", description="Where to compute: auto, cpu, cuda, cuda:1, mps.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="Precision of the model; auto is bf16 on a GPU that has it, else fp32."
    )
    max_megapixels: PositiveInt = Field(default=179, description="Leave out pictures of more million pixels.")

    @model_validator(mode="after")
    def _check_together(self) -> "CaptionConfig":
        if self.top_p is not None and self.beams > 1:
            raise ValueError("beams look for the likeliest caption, top_p draws one; leave out one of them")
        if self.min_length > self.max_length:
            raise ValueError(f"min_length = {self.min_length} is above max_length = {self.max_length}")
        return self


class TagConfig(Section):
    """Write tags beside each picture, or all into one file, by a tagger of the WD14 family."""

    folder: Place | None = Field(
        default=None, description="Folder of pictures.", json_schema_extra={"positional": "DIR"}
    )
    tagger: str = Field(default="wd14", description="What tags: wd14, or a module of your own by its dotted name.")
    model: PlaceOrHubId | None = Field(
        default=None,
        description="Its model: a folder with model.onnx and selected_tags.csv, or a hub id; left out, the tagger's "
        "own choice.",
    )
    batch_size: PositiveInt = Field(default=4, description="Pictures scored at once.")
    threshold: Share = Field(default=0.35, description="Take the tags with at least this score.")
    general_threshold: Share | None = Field(
        default=None, description="Another threshold for all tags that are no characters'."
    )
    character_threshold: Share | None = Field(default=None, description="Another threshold for characters.")
    rating: bool = Field(default=False, description="Write the likeliest rating too, as the last tag.")
    underscores: Literal["spaces", "keep"] = Field(
        default="spaces", description="Write spaces for the underscores of tags (but of emoticons, ^_^), or keep them."
    )
    blacklist: str | None = Field(
        default=None, description="Tags that are never written: a list with commas, or a file with one a line."
    )
    replace: str | None = Field(
        default=None, description="Write other words for tags, OLD:NEW: a list with commas, or a file with one a line."
    )
    always_first: str | None = Field(
        default=None,
        description="Tags that, where they are found, stand first, in this order: a list with commas, or a file.",
    )
    order: Literal["confidence", "alphabetical", "category"] = Field(
        default="confidence",
        description="Order of the tags; category: characters, copyrights, artists, then the rest, each by confidence.",
    )
    separator: Separator = Field(default=", ", description="What stands between two tags.")
    extension: str = Field(default=".txt", description="Extension of the files that are written.")
    output: Place | None = Field(
        default=None, description="Write all tags into this .json or .jsonl file, instead of files beside the pictures."
    )
    recursive: bool = Field(default=False, description="Also the pictures in all folders inside.")
    existing: Existing = Field(
        default="skip", description="Pictures that have tags: skip them, overwrite the tags, or append those that lack."
    )
    shard: Shard | None = Field(
        default=None, description="Do only part i of n parts, as in 2/4, so that several machines share the work."
    )
    providers: str = Field(
        default="auto", description="Where onnxruntime computes: auto, or a list with commas such as cuda,cpu."
    )
    max_megapixels: PositiveInt = Field(default=179, description="Leave out pictures of more million pixels.")


_AGE_UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SIZE_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12}


def _check_age(age: str) -> str:
    seconds_of(age)
    return age


def _check_bytes(size: str) -> str:
    bytes_of(size)
    return size


def seconds_of(age: str) -> float:
    """Return a time such as 30d in seconds."""
    return _measured(age, _AGE_UNITS, "expected a number and m, h, d or w, such as 30d for 30 days")


def bytes_of(size: str) -> int:
    """Return a size such as 10GB in bytes."""
    return int(_measured(size, _SIZE_UNITS, "expected a number and MB, GB or TB, such as 10GB"))


def _measured(text: str, units: Mapping[str, int], expected: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-zA-Z]+)", text.strip())
    factor = None if found is None else next((n for unit, n in units.items() if unit.lower() == found[2].lower()), None)
    if found is None or factor is None:
        raise ValueError(expected)
    return float(found[1]) * factor


class CacheConfig(Section):
    """Show what the cache folder holds, or remove some of it."""

    action: Literal["ls", "prune"] | None = Field(
        default=None,
        description="What to do: list what there is, or remove what older_than, max_size or all say.",
        json_schema_extra={"positional": "ls|prune"},
    )
    cache_dir: CacheDir | None = Field(
        default=None,
        description="The cache folder; left out, the environment's LORASMITH_CACHE, or where the system has caches.",
    )
    kind: Literal["latents", "text", "facts"] | None = Field(
        default=None, description="Only latents of pictures, text embeddings, or facts of files."
    )
    older_than: Annotated[str, AfterValidator(_check_age)] | None = Field(
        default=None, description="Remove what was not used for so long, such as 30d (m, h, d, w)."
    )
    max_size: Annotated[str, AfterValidator(_check_bytes)] | None = Field(
        default=None, description="Remove what was not used for longest, until the rest is of this size, such as 10GB."
    )
    everything: bool = Field(default=False, alias="all", description="Remove all.")
    dry_run: bool = Field(default=False, description="Say what prune would remove, and remove nothing.")
    as_json: bool = Field(default=False, alias="json", description="List as JSON.")

    @model_validator(mode="after")
    def _check_together(self) -> "CacheConfig":
        rules = [name for name in ("older_than", "max_size") if getattr(self, name) is not None]
        if self.everything and rules:
            raise ValueError(f"all removes everything, but {' and '.join(rules)} would keep some; leave out one")
        given = [*rules, *(["all"] if self.everything else []), *(["dry_run"] if self.dry_run else [])]
        if self.action == "ls" and given:
            raise ValueError(f"{' and '.join(given)} is for prune, and ls only lists; leave it out")
        if self.action == "prune" and not (rules or self.everything):
            raise ValueError("say what prune is to remove: --older-than 30d, --max-size 10GB, or --all")
        if self.action == "prune" and self.as_json:
            raise ValueError("json is for ls; leave it out")
        return self


class ExtractConfig(Section):
    """Make a LoRA of what was changed in a model, compared with the model that it was made from."""

    tuned: PlaceOrHubId | None = Field(default=None, description="The changed model: a file or a diffusers folder.")
    base: PlaceOrHubId | None = Field(default=None, description="The model that it was made from.")
    output: Place | None = Field(default=None, description="LoRA file to write, .safetensors, .pt or .ckpt.")
    rank: PositiveInt | None = Field(default=None, description="Rank of every layer.")
    quality: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="Give each layer the rank that keeps this share of its change's energy, such as 0.99."
    )
    max_rank: PositiveInt | None = Field(default=None, description="No layer gets a higher rank than this for quality.")
    conv_rank: PositiveInt | None = Field(
        default=None,
        description="Extract the U-Net's other convolutions and time layers too, the 3x3 ones at this rank (for "
        "quality: at most); left out, only what a plain LoRA goes on.",
    )
    save_precision: Literal["float", "fp16", "bf16"] = Field(default="fp16", description="Precision of the saved LoRA.")
    overwrite: bool = Field(default=False, description="Replace an existing output.")

    @model_validator(mode="after")
    def _check_together(self) -> "ExtractConfig":
        if self.rank is not None and self.quality is not None:
            raise ValueError("rank and quality both say which rank layers get; leave out one")
        if self.max_rank is not None and self.quality is None:
            raise ValueError("max_rank limits what quality asks for; add --quality, or give --rank alone")
        return self


class ResizeConfig(Section):
    """Give a LoRA a lower rank, by what counts most in each layer."""

    lora: Place | None = Field(default=None, description="LoRA file to read.", json_schema_extra={"positional": "LORA"})
    output: Place | None = Field(default=None, description="LoRA file to write, .safetensors, .pt or .ckpt.")
    rank: PositiveInt | None = Field(default=None, description="Rank of every layer that has a higher one.")
    dynamic: Literal["energy", "ratio", "frobenius"] | None = Field(
        default=None,
        description="Give each layer a rank of its own, by value: the share of the squared norm or of the norm "
        "(frobenius) that it keeps, or how many times smaller than the largest singular value the kept ones may be.",
    )
    value: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="For dynamic: a share up to 1 such as 0.99, or for ratio a number from 1 such as 20."
    )
    save_precision: Literal["float", "fp16", "bf16"] | None = Field(
        default=None, description="Precision of the saved LoRA; left out, that of the one that is read."
    )
    overwrite: bool = Field(default=False, description="Replace an existing output.")

    @model_validator(mode="after")
    def _check_together(self) -> "ResizeConfig":
        if self.rank is not None and self.dynamic is not None:
            raise ValueError("rank and dynamic both say which rank layers get; leave out one")
        if (self.dynamic is None) != (self.value is None):
            raise ValueError("dynamic and value belong together, such as --dynamic energy --value 0.99; give both")
        if self.dynamic == "ratio" and self.value is not None and self.value < 1:
            raise ValueError(f"value is {self.value:g}, but for ratio it is a number from 1 on, such as 20")
        if self.dynamic in ("energy", "frobenius") and self.value is not None and self.value > 1:
            raise ValueError(f"value is {self.value:g}, but for {self.dynamic} it is a share up to 1, such as 0.99")
        return self


class MergeConfig(Section):
    """Merge LoRAs into a base model, or with each other."""

    model: PlaceOrHubId | None = Field(
        default=None,
        description="Base model to merge into: a .safetensors or .ckpt file, a diffusers folder, or a hub id.",
    )
    lora: list[Place] = Field(default=[], description="LoRA files, merged in this order.")
    ratio: Numbers = Field(
        default=[], description="How strongly each LoRA is added, one number for each, below 0 too; left out: 1."
    )
    unet_ratio: Numbers = Field(default=[], description="The same for the U-Net alone, in place of ratio.")
    text_encoder_ratio: Numbers = Field(
        default=[], description="The same for the text encoder alone, in place of ratio."
    )
    block_weights: list[str] = Field(
        default=[],
        description="For each LoRA 12, 17, 25 or 26 numbers with commas between them, which multiply the ratio of each "
        "block (docs/merge.md says which is which).",
    )
    output: Place | None = Field(
        default=None, description="File or folder to write; a file's ending, .safetensors or .ckpt, says its form."
    )
    precision: Literal["float", "fp16", "bf16"] = Field(
        default="float", description="Precision in which weights and changes are added."
    )
    save_precision: Literal["float", "fp16", "bf16"] | None = Field(
        default=None, description="Precision of the changed tensors in the file; left out, each keeps its own."
    )
    overwrite: bool = Field(default=False, description="Replace what is at output.")
    method: Literal["concat", "svd"] = Field(
        default="concat",
        description="Without a model, what becomes of the sum: exact, at the sum of the ranks, or cut to rank.",
    )
    rank: PositiveInt | None = Field(default=None, description="For svd: the highest rank that a layer gets.")
    verify: bool = Field(
        default=False,
        description="Afterwards compare the merged model's results with those of the base with the LoRAs attached.",
    )

    @model_validator(mode="after")
    def _check_together(self) -> "MergeConfig":
        if (self.method == "svd") != (self.rank is not None):
            raise ValueError("method svd and rank belong together, such as --method svd --rank 32; give both")
        if self.model is not None and self.method != "concat":
            raise ValueError(
                "method and rank are for merging LoRAs with each other; leave them out, or leave out model"
            )
        if self.model is None and (
            given := [n for n in ("block_weights", "precision", "verify") if _is_changed(self, n)]
        ):
            raise ValueError(f"{' and '.join(given)} can only be used with a base model; give --model, or leave it out")
        for name in ("ratio", "unet_ratio", "text_encoder_ratio", "block_weights"):
            count = len(getattr(self, name))
            if count not in (0, len(self.lora)):
                raise ValueError(
                    f"{name} is given {_counted(count, 'time')} for {_counted(len(self.lora), 'LoRA')}; "
                    "give one for each, in the same order"
                )
        if self.ratio and self.unet_ratio and self.text_encoder_ratio:
            raise ValueError("ratio is not used where unet_ratio and text_encoder_ratio are both given; leave it out")
        return self


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


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
        if not self.pag_scale and _is_changed(self, "pag_layers"):
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
            if self.init is None and _is_changed(self, name):
                raise ValueError(f"{name} is for drawing on from a picture; give it with --init, or leave {name} out")
        for name in ("highres_steps", "highres_denoise", "highres_upscaler"):
            if self.highres_scale is None and _is_changed(self, name):
                raise ValueError(f"{name} is for a second pass; give it with --highres-scale, or leave {name} out")
        if self.highres_scale is not None and self.init is not None:
            raise ValueError("highres_scale and init do not go together; give --init with a larger --size instead")
        for name in ("strength", "unet_strength", "text_encoder_strength"):
            count = len(getattr(self, name))
            if count not in (0, len(self.lora)):
                raise ValueError(
                    f"{name} is given {_counted(count, 'time')} for {_counted(len(self.lora), 'LoRA')}; "
                    "give one for each, in the same order"
                )
        for name in ("control_picture", "control_preprocessor", "control_weight", "control_range"):
            count, nets = len(getattr(self, name)), len(self.control)
            is_needed = name == "control_picture" and nets > 0
            if count != nets and (count or is_needed) and not (is_needed and count == 1):
                raise ValueError(
                    f"{name} is given {_counted(count, 'time')} for {_counted(nets, 'ControlNet')} (control); give "
                    f"{'one picture for all, or ' if is_needed else ''}one for each, in the same order"
                )
        if self.lora_mask and len(self.lora_mask) != len(self.lora):
            raise ValueError(
                f"lora_mask is given {_counted(len(self.lora_mask), 'picture')} for "
                f"{_counted(len(self.lora), 'LoRA')}; give one for each, in the same order, or none as its name"
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


class ConvertConfig(Section):
    """Write a LoRA as another program has it, or mend its names; or a base model as one file or a diffusers folder."""

    lora: Place | None = Field(
        default=None,
        description="LoRA to convert: a file of any program, or a folder of PEFT's; or a base model, for --to "
        "checkpoint or diffusers.",
        json_schema_extra={"positional": "LORA"},
    )
    to: Literal[
        "kohya", "diffusers", "peft", "cloneofsimo", "cloneofsimo-new", "d8ahazard", "ldm", "lycoris", "checkpoint"
    ] = Field(
        default="kohya",
        description="Whose form to write; kohya is what UIs read, and mends names too. Base models: checkpoint is one "
        "file, diffusers a folder.",
    )
    output: Place | None = Field(
        default=None, description="File to write; for peft, and for a base model as diffusers has it, a folder."
    )
    prediction: Literal["epsilon", "v_prediction"] | None = Field(
        default=None, description="What the U-Net of a base model predicts, where the model itself does not say."
    )
    save_precision: Literal["float", "fp16", "bf16"] | None = Field(
        default=None, description="Precision of the output; left out, that of the input."
    )
    overwrite: bool = Field(default=False, description="Replace the output if it exists.")


class InspectConfig(Section):
    """Tell what is in a LoRA or a checkpoint, and which programs will load it."""

    file: Place | None = Field(
        default=None,
        description="LoRA, checkpoint, or folder of one, to look into.",
        json_schema_extra={"positional": "FILE"},
    )
    json_file: str | None = Field(
        default=None, alias="json", description="Write all that was found to this JSON file, or to the screen with `-`."
    )
    picture: Place | None = Field(
        default=None, description="Draw how much each block was changed into this file, .png or .svg."
    )
    overwrite: bool = Field(default=False, description="Replace the JSON file and the picture if they exist.")


class PrepareConfig(Section):
    """Encode pictures ahead of training, on one machine or many."""

    folder: Place | None = Field(
        default=None,
        description="Folder of pictures, as you will train them: a parent of DreamBooth folders "
        "(`N_identifier class`), one of them, or a plain folder.",
        json_schema_extra={"positional": "DIR"},
    )
    base: PlaceOrHubId = Field(
        default="", description="Base model that you will train for: a file, a diffusers folder, or a hub id."
    )
    vae: PlaceOrHubId | None = Field(
        default=None, description="Another VAE instead of the base model's own: a file or a folder."
    )
    prediction: Literal["epsilon", "v_prediction"] | None = Field(
        default=None, description="What the U-Net predicts, as you will train; for SD 2.x it decides the resolution."
    )
    captions: Place | None = Field(
        default=None, description="Metadata file, JSON or JSONL: only the pictures that it names."
    )
    recursive: bool = Field(default=False, description="Use the pictures of folders in folders too.")
    resolution: Size | None = Field(
        default=None,
        description="Training size in pixels, one side or width,height; left out, the model's own (512 or 768).",
    )
    buckets: bool = Field(
        default=False, description="Sort pictures into buckets of like aspect ratio instead of one shape."
    )
    bucket_min: PositiveInt = Field(default=256, description="Smallest side of a bucket in pixels.")
    bucket_max: PositiveInt = Field(default=1024, description="Largest side of a bucket in pixels.")
    bucket_step: PositiveInt = Field(default=64, description="Bucket sides are multiples of this many pixels.")
    bucket_rule: Literal["less-crop", "sd-scripts"] = Field(
        default="less-crop", description="How a picture finds its bucket, as you will train."
    )
    bucket_no_upscale: bool = Field(default=False, description="Never enlarge a picture.")
    flip: bool = Field(default=False, description="Encode mirror images too, for train --flip.")
    alpha_color: Color = Field(default="white", description="Colour that is seen through transparent pictures.")
    max_megapixels: PositiveInt = Field(default=179, description="Leave out pictures of more million pixels.")
    device: str = Field(default="auto", description="Where to compute: auto, cpu, cuda, cuda:1, mps.")
    shard: Shard | None = Field(
        default=None, description="Do only part i of n parts, as in 2/4, so that several machines share the work."
    )
    cache_dir: CacheDir | None = Field(
        default=None,
        description="The cache folder; left out, the environment's LORASMITH_CACHE, or where the system has caches.",
    )
    npz: bool = Field(
        default=False, description="Write sd-scripts' .npz files beside the pictures, instead of into the cache."
    )
    npz_form: Literal["today", "2022"] = Field(
        default="today", description="Which files sd-scripts reads: those of its newest version, or of its first."
    )
    npz_dir: Place | None = Field(
        default=None, description="Write these files into this folder, laid out like DIR, instead of beside."
    )
    output: Place | None = Field(
        default=None,
        description="Metadata file, .json or .jsonl, to write with each picture's train_resolution; an older one is "
        "added to.",
    )
    overwrite: bool = Field(default=False, description="Write .npz files anew that are there already.")

    @model_validator(mode="after")
    def _check_together(self) -> "PrepareConfig":
        given = [name for name in ("npz_form", "npz_dir", "output", "overwrite") if _is_changed(self, name)]
        if given and not self.npz:
            raise ValueError(f"{' and '.join(given)} can do nothing without npz; add it, or leave the other out")
        if self.captions and self.recursive:
            raise ValueError("captions names the pictures, so recursive can do nothing; leave out one of them")
        if wrong := _bucket_contradictions(self):
            raise ValueError("\n".join(wrong))
        return self


COMMANDS: dict[str, type[Section]] = {
    "train": TrainConfig,
    "demo": DemoConfig,
    "check": CheckConfig,
    "captions": CaptionsConfig,
    "caption": CaptionConfig,
    "tag": TagConfig,
    "cache": CacheConfig,
    "prepare": PrepareConfig,
    "generate": GenerateConfig,
    "grid": GridConfig,
    "judge": JudgeConfig,
    "merge": MergeConfig,
    "extract": ExtractConfig,
    "resize": ResizeConfig,
    "convert": ConvertConfig,
    "inspect": InspectConfig,
}


# ---- derived from the models above: nothing below knows an option by name ------------------------------------------

_Config = TypeVar("_Config", bound=Section)
_LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
_FORMATS = {"width,height": "size", "low,high": "range"}
_KINDS = {**_FORMATS, "string": "text", "array": "list"}  # others are called as the schema calls them
EXPECTED = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "text": "a text",
    "path": "a path",
    "list": "a list of texts",
    "numbers": "one or more numbers, such as 0.8 -0.5",
    "size": "one side or width,height in pixels, such as 512 or 448,640",
    "range": "two numbers above 0, the smaller first, such as 2,4",
    "color": "white, black, gray, red, green, blue, yellow or one like #ff8000",
}


@dataclass(frozen=True)
class Option:
    """One option of a command, as the command line and the documents need to know it."""

    section: str  # "" for an option of the command itself
    name: str
    kind: str  # boolean, integer, number, numbers, text, path, size, list, choice
    expected: str  # in words: "a whole number above 0"
    choices: tuple[str, ...]
    default: Any
    help: str
    positional: str  # what stands for it in the usage line, where its flag may be left out: "DIR"; else ""

    @property
    def place(self) -> tuple[str, ...]:
        """Where the option stands in nested values: ("network", "rank")."""
        return (self.section, self.name) if self.section else (self.name,)

    @property
    def flag(self) -> str:
        """The short spelling on the command line: `--learning-rate`."""
        return f"--{self.name.replace('_', '-')}"


@cache
def options(command: type[Section]) -> tuple[Option, ...]:
    """Return a command's options in their order, read from its JSON Schema."""
    schema = command.model_json_schema()
    found = []
    for name, facts in schema["properties"].items():
        if "$ref" not in facts:
            found.append(_option("", name, facts))
            continue
        section = schema["$defs"][facts["$ref"].rpartition("/")[2]]
        found += [_option(name, option, facts) for option, facts in section["properties"].items()]
    return tuple(found)


def sections(command: type[Section]) -> dict[str, str]:
    """Return the title line of each section of a command, by name; "" is the command itself."""
    found = {"": _title(command)}
    for name, field in command.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found[name] = _title(field.annotation)
    return found


def nearest(command: type[Section], name: str) -> Option | None:
    """Return the option that was probably meant by a misspelt name, with or without its section."""
    by_name = {option.name: option for option in options(command)}
    wanted = name.rpartition(".")[2].replace("-", "_").lower()
    near = difflib.get_close_matches(wanted, by_name, n=1)
    return by_name[near[0]] if near else None


def build(command: type[_Config], given: Mapping[str, Any], file: Path | None = None) -> _Config:
    """Return a command's checked configuration: what is given, over what the TOML file says.

    Only what stands in one of the two counts as set (`model_fields_set`).

    Raises:
        UserError: a line for each mistake, which names the option, or the line of the file, and what was expected.
    """
    text = "" if file is None else read_text(file)
    merged = _laid_over({} if file is None else parse_toml(file, text), given)
    mistakes = {option.place: _expectation(option) for option in options(command) if _is_misread(option, merged)}
    config = None
    try:
        config = command.model_validate(merged)
    except ValidationError as error:
        for found in error.errors(include_url=False):
            place = _place(command, found["loc"])
            mistakes.setdefault(place, _reason(command, place, found))
    if config is not None and not mistakes:
        return config
    lines = []
    for place, reason in mistakes.items():
        is_in_file = file is not None and not _holds(given, place) and _holds(merged, place)
        name = _name_in_file(file, text, place, merged) if is_in_file else _name_of_flag(place, merged)
        lines.append(f"{name}: {reason}" if name else reason)
    raise UserError("\n".join(lines))


def checked(command: type[Section], option: Option, value: Any) -> Any:
    """Return the value of one option, converted.

    Raises:
        UserError: says what was expected instead, and nothing else.
    """
    section = command.model_fields[option.section].annotation
    assert isinstance(section, type) and issubclass(section, Section)
    if _is_misread(option, {option.section: {option.name: value}}):
        raise UserError(_expectation(option))
    try:
        return getattr(section.model_validate({option.name: value}), option.name)
    except ValidationError as error:
        raise UserError(_reason(command, option.place, error.errors(include_url=False)[0])) from None


def load_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        UserError: it cannot be read, or is not TOML; the line is named.
    """
    return parse_toml(path, read_text(path))


def dump_toml(values: Mapping[str, Any]) -> str:
    """Write nested values as TOML; what is None is left out, as TOML has no such value."""
    return tomli_w.dumps(_without_none(values))


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_none(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if value is not None
    }


def _title(section: type[Section]) -> str:
    return (section.__doc__ or "").strip().partition("\n")[0]


def _option(section: str, name: str, facts: Mapping[str, Any]) -> Option:
    """Read an option from its part of the JSON Schema."""
    shape = next((one for one in facts.get("anyOf", ()) if one.get("type") != "null"), facts)
    kind = _kind(shape)
    choices = tuple(str(choice) for choice in shape.get("enum", ()))
    each = shape.get("items", shape)
    limits = " and ".join(f"{word} {each[key]}" for key, word in _LIMITS.items() if key in each)
    if choices:
        expected = f"one of {', '.join(choices)}"
    elif kind == "numbers" and limits:
        expected = f"one or more numbers, each {limits}"
    else:
        expected = f"{EXPECTED[kind]} {limits}".strip()
    positional = facts.get("positional", "")
    return Option(section, name, kind, expected, choices, facts.get("default"), facts["description"], positional)


def _kind(shape: Mapping[str, Any]) -> str:
    if "enum" in shape:
        return "choice"
    name = str(shape.get("format", shape["type"]))
    return _KINDS.get(name, name)


def read_text(path: Path) -> str:
    """Read a file of text.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows editors put a byte order mark first
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; check the path.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected text in UTF-8 ({error.reason}); save it anew as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{path}: expected a file that can be read, but: {error.strerror}.") from error


def parse_toml(path: Path, text: str) -> dict[str, Any]:
    """Return what a TOML text says.

    Raises:
        UserError: it is not TOML; the line is named.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message, line = str(error), text.count("\n") + 1
        if found := re.search(r" \(at line (\d+), column \d+\)| \(at end of document\)", message):
            message, line = message[: found.start()], int(found[1] or line)
        hint = "; write Windows paths with / or in 'single quotes'" if "\\" in text.splitlines()[line - 1] else ""
        if message == "Invalid value":
            hint = f"; a text stands in quotes{hint}"
        raise UserError(f"{path}, line {line}: this is not TOML: {message}{hint}.") from error


def line_in_toml(text: str, place: tuple[str | int, ...]) -> int:
    """Return the line where an option or table of a TOML text begins; tables in a list are counted from 0.

    tomllib tells no places: the first lines that parse and hold the option end with it, and it began after the lines
    that parsed before.
    """
    lines, begin = text.splitlines(), 0
    for end in range(1, len(lines) + 1):
        try:
            values = tomllib.loads("\n".join(lines[:end]))
        except tomllib.TOMLDecodeError:
            continue
        if _holds(values, place):
            break
        begin = end
    return begin + 1


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        under = below.get(name)
        if isinstance(value, Mapping) and isinstance(under, Mapping):
            value = _laid_over(under, value)
        merged[name] = value
    return merged


def _holds(values: Any, place: tuple[str | int, ...]) -> bool:
    for name in place:
        if name not in _names_in(values):
            return False
        values = values[name]
    return True


def _names_in(values: Any) -> Any:
    if isinstance(values, list):
        return range(len(values))
    return values if isinstance(values, Mapping) else ()


def _value(values: Any, place: tuple[str, ...]) -> Any:
    for name in place:
        values = values[name]
    return values


def _is_misread(option: Option, values: Mapping[str, Any]) -> bool:
    """Whether pydantic would take the value for something else: "" for the working folder, true for the number 1."""
    if not _holds(values, option.place):
        return False
    value = _value(values, option.place)
    return (option.kind == "path" and value == "") or (isinstance(value, bool) and option.kind != "boolean")


def _expectation(option: Option) -> str:
    return f"expected {option.expected}"


def _place(command: type[Section], loc: tuple[int | str, ...]) -> tuple[str, ...]:
    """Return where an error belongs, without the index in a list: section and option, or one of them, or neither."""
    depth = 2 if loc and loc[0] in sections(command) else 1
    return tuple(str(part) for part in loc[:depth])


def _reason(command: type[Section], place: tuple[str, ...], found: "ErrorDetails") -> str:
    """Say what was expected instead, in our words rather than pydantic's."""
    if found["type"] == "value_error":
        return str(found["ctx"]["error"]) if "ctx" in found else found["msg"]
    if found["type"] == "extra_forbidden":
        return _unknown(command, place)
    for option in options(command):
        if option.place == place:
            return _expectation(option)
    return f"this is a section; write [{place[0]}], and its options in the lines below"


def _unknown(command: type[Section], place: tuple[str, ...]) -> str:
    names = [name for name in sections(command) if name]
    if len(place) == 1 and (near := difflib.get_close_matches(place[0].lower(), names, n=1)):
        return f"there is no such section; did you mean [{near[0]}]?"
    option = nearest(command, place[-1])
    if option is None:
        return "there is no such option; `lorasmith COMMAND --help` lists them all"
    where = f"[{option.section}] " if option.section and option.place[:-1] != place[:-1] else ""
    return f"there is no such option; did you mean {where}{option.name}?"


def _name_in_file(file: Path | None, text: str, place: tuple[str, ...], values: Mapping[str, Any]) -> str:
    value = _value(values, place)
    shown = f"[{'.'.join(place)}]" if isinstance(value, Mapping) else _shortened(tomli_w.dumps({place[-1]: value}))
    return f"{file}, line {line_in_toml(text, place)}: {shown}"


def _name_of_flag(place: tuple[str, ...], values: Mapping[str, Any]) -> str:
    if not place:
        return ""
    flag = f"--{place[-1].replace('_', '-')}"
    value = _value(values, place) if _holds(values, place) else ""
    return _shortened(f"{flag} {' '.join(map(str, value)) if isinstance(value, list) else value}")


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else f"{line[:77]}..."
