"""Every option of every command, once.

One pydantic model a command, made of sections; one field an option with its type, default and one sentence of help.
The command line, TOML files, `docs/options.md` and the JSON Schema are all derived from these models. Option names are
unique over the sections of a command, so `--network.rank 8` and `--rank 8` mean the same.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator


class Section(BaseModel):
    """A group of options; an unknown name in it is an error."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


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
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class ModelSection(Section):
    """The base model that the LoRA is trained for."""

    base: str = Field(
        "", description="Base model: a .safetensors, .ckpt or .pt file, a diffusers folder, or a hub id (org/name)."
    )
    vae: str | None = Field(None, description="Another VAE instead of the base model's own: a file or a folder.")
    v2: bool | None = Field(
        None, description="Say that the base model is SD 2.x; read from the file when left out, checked when given."
    )
    prediction: Literal["epsilon", "v_prediction"] | None = Field(
        None, description="What the U-Net predicts; read from the file where it says so."
    )
    ema: bool = Field(False, description="Use the checkpoint's EMA weights where it has both kinds.")
    clip_skip: Annotated[int, Field(ge=1, le=12)] = Field(
        1, description="Take the text encoder's n-th layer from the end."
    )


class NetworkSection(Section):
    """What is trained: the adapter and where it is attached."""

    adapter: str = Field("lora", description="Adapter type: a name from lorasmith.adapters or a dotted module.")
    rank: PositiveInt = Field(4, description="Rank of the LoRA: more can express more and costs memory.")
    alpha: Rate | None = Field(
        None, description="The update is scaled by alpha / rank; left out, alpha = rank, which is scale 1."
    )
    train: Literal["both", "unet", "text_encoder"] = Field(
        "both", description="Which parts get a LoRA: U-Net and text encoder, or one of them."
    )
    weights: Path | None = Field(
        None, description="Start from this LoRA file; rank and alpha are taken from it, every name must match."
    )


class DataSection(Section):
    """The pictures and their captions."""

    images: Path | None = Field(
        None,
        description="Folder of pictures: a parent of DreamBooth folders (`N_identifier class`), one of them, or a plain folder.",
    )
    regularization: Path | None = Field(
        None, description="Folder of regularization pictures (prior preservation), laid out like `images`."
    )
    prior_loss_weight: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Weight of the regularization pictures' loss."
    )
    captions: Path | None = Field(
        None, description="Metadata JSON with captions and tags per picture (the fine-tuning method)."
    )
    caption: str | None = Field(None, description="Caption for pictures that have none of their own.")
    caption_extension: str | None = Field(
        None, description="Extension of caption files; left out, `.caption` and then `.txt` are looked for."
    )
    repeats: PositiveInt = Field(
        1, description="How often each picture counts in an epoch, for plain folders and metadata JSON."
    )
    shuffle_caption: bool = Field(False, description="Shuffle the comma-separated parts of each caption.")
    keep_tokens: Annotated[int, Field(ge=0)] = Field(
        0, description="How many leading parts of a caption stay in place when shuffling."
    )
    caption_dropout: Share = Field(0.0, description="Share of samples trained with an empty caption.")
    resolution: Size | None = Field(
        None, description="Training size in pixels, one side or width,height; left out, the model's own (512 or 768)."
    )
    buckets: bool = Field(False, description="Sort pictures into buckets of like aspect ratio instead of one shape.")
    bucket_min: PositiveInt = Field(256, description="Smallest side of a bucket in pixels.")
    bucket_max: PositiveInt = Field(1024, description="Largest side of a bucket in pixels.")
    bucket_step: PositiveInt = Field(64, description="Bucket sides are multiples of this many pixels.")
    flip: bool = Field(False, description="Mirror half of the samples left to right; needs uncached latents.")
    color: bool = Field(False, description="Vary hue and gamma weakly; needs uncached latents.")
    random_crop: bool = Field(False, description="Crop at a random place instead of the centre; needs uncached latents.")
    skip_unreadable: bool = Field(False, description="Leave unreadable pictures out instead of stopping.")
    cache_latents: bool | None = Field(
        None, description="Encode every picture once and keep it in memory; left out, on unless an augmentation is."
    )
    workers: Annotated[int, Field(ge=0)] = Field(
        2, description="Threads that prepare batches ahead; the number never changes the result."
    )


class OptimizerSection(Section):
    """The optimizer and its learning rates."""

    optimizer: str = Field("adamw", description="Optimizer: a name from lorasmith.optimizers or a dotted module.")
    learning_rate: Rate = Field(1e-4, description="Learning rate of every part that has none of its own.")
    unet_lr: Rate | None = Field(None, description="Learning rate of the U-Net's LoRA.")
    text_encoder_lr: Rate | None = Field(None, description="Learning rate of the text encoder's LoRA.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="Weight decay.")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="How the learning rate goes down over the run, after the warm-up."
    )
    lr_warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="Steps over which the learning rate rises from 0.")
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="Clip gradients to this norm; 0 turns it off.")


class TrainingSection(Section):
    """Length, batches, precision."""

    steps: PositiveInt | None = Field(None, description="Optimizer steps; left out together with epochs: 1600.")
    epochs: PositiveInt | None = Field(None, description="Passes over the data, instead of steps.")
    batch_size: PositiveInt = Field(1, description="Pictures per process and micro-batch.")
    gradient_accumulation: PositiveInt = Field(1, description="Micro-batches added up for one optimizer step.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Precision of the frozen base model; auto is bf16 on a GPU that has it, else fp32."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations instead of keeping them: less memory, about 1.4 times the time."
    )
    attention: Literal["sdpa", "plain"] = Field("sdpa", description="Attention implementation.")
    device: str = Field("auto", description="Where to train: auto, cpu, cuda, cuda:1, mps.")
    seed: Annotated[int, Field(ge=0)] = Field(42, description="Everything random in the run follows from this number.")


class SaveSection(Section):
    """Where results go and what the file says of itself."""

    output: Path | None = Field(None, description="Folder for the LoRA, states, logs, samples and report.")
    name: str | None = Field(None, description="Base name of the files; left out, `last`, `epoch-000001`, `step-00000100`.")
    format: Literal["safetensors", "pt", "ckpt"] = Field("safetensors", description="File format of the LoRA.")
    save_precision: Literal["float", "fp16", "bf16"] = Field("fp16", description="Precision of the saved LoRA.")
    save_every_epochs: PositiveInt | None = Field(None, description="Save a LoRA every n epochs.")
    save_every_steps: PositiveInt | None = Field(None, description="Save a LoRA every n steps.")
    state_every_steps: Annotated[int, Field(ge=0)] = Field(
        250, description="Save a resumable state every n steps, besides the one at each save and at the end; 0: never."
    )
    keep_states: PositiveInt = Field(1, description="How many of the newest states to keep.")
    overwrite: bool = Field(
        False, description="Start afresh in a folder that holds another run, which is moved aside, not deleted."
    )
    title: str | None = Field(None, description="Title in the file's metadata; left out, the name.")
    author: str | None = Field(None, description="Author in the file's metadata.")
    description: str | None = Field(None, description="Description in the file's metadata.")
    license: str | None = Field(None, description="License in the file's metadata.")
    tags: str | None = Field(None, description="Comma-separated tags in the file's metadata.")
    trigger_phrase: str | None = Field(None, description="Trigger phrase in the file's metadata.")
    comment: str | None = Field(None, description="Free text in the file's metadata.")
    share_captions: bool = Field(
        True, description="Write folder names and caption tags into the file's metadata, as UIs show them."
    )


class SampleSection(Section):
    """Pictures generated while training and for the report."""

    prompts: list[str] = Field(
        default_factory=list,
        description="Prompts to draw, or one .txt file with a prompt a line; left out, two captions of the pictures.",
    )
    sample_every_steps: PositiveInt | None = Field(None, description="Draw the prompts every n steps.")
    sample_every_epochs: PositiveInt | None = Field(None, description="Draw the prompts every n epochs.")
    before_after: bool = Field(True, description="Draw the prompts before and after training, for the report.")
    negative: str = Field("", description="Negative prompt.")
    sample_size: Size | None = Field(None, description="Size of the samples in pixels; left out, the training size.")
    sample_steps: PositiveInt = Field(20, description="Sampler steps of the samples.")
    guidance: Annotated[float, Field(ge=0)] = Field(7.5, description="Classifier-free guidance scale of the samples.")
    sample_seed: Annotated[int, Field(ge=0)] = Field(1, description="Seed of the first sample; the others count up.")


class LogSection(Section):
    """What is shown and logged."""

    tensorboard: bool = Field(True, description="Write TensorBoard logs into the output folder.")
    progress: bool = Field(True, description="Show a progress bar; without a terminal, a line now and then.")


class TrainConfig(Section):
    """Train a LoRA on pictures."""

    dry_run: bool = Field(False, description="Print the plan and stop before anything is loaded or written.")
    resume: Path | None = Field(
        None, description="Go on with a stopped run: its output folder or one of its states; options come from it."
    )
    model: ModelSection = Field(default_factory=ModelSection)
    network: NetworkSection = Field(default_factory=NetworkSection)
    data: DataSection = Field(default_factory=DataSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    save: SaveSection = Field(default_factory=SaveSection)
    samples: SampleSection = Field(default_factory=SampleSection)
    log: LogSection = Field(default_factory=LogSection)

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> "TrainConfig":
        for message in contradictions(self):
            raise ValueError(message)
        return self


def contradictions(cfg: TrainConfig) -> list[str]:
    """Return one sentence for each pair of options that cannot both be meant."""
    data, training, network, optimizer = cfg.data, cfg.training, cfg.network, cfg.optimizer
    augmentations = [name for name in ("flip", "color", "random_crop") if getattr(data, name)]
    checks = {
        "steps and epochs are both given; give one of them": training.steps and training.epochs,
        f"cache_latents keeps each picture as it is, but {' and '.join(augmentations)} would change it every time; "
        "leave out one or the other": data.cache_latents and augmentations,
        "text_encoder_lr is given, but train = unet leaves the text encoder alone; leave out one of them": (
            optimizer.text_encoder_lr and network.train == "unet"
        ),
        "unet_lr is given, but train = text_encoder leaves the U-Net alone; leave out one of them": (
            optimizer.unet_lr and network.train == "text_encoder"
        ),
        f"bucket_min = {data.bucket_min} is larger than bucket_max = {data.bucket_max}; swap them": (
            data.buckets and data.bucket_min > data.bucket_max
        ),
        f"bucket_step = {data.bucket_step} is not a multiple of 8; use 64, or 8 for the finest buckets": (
            data.bucket_step % 8
        ),
        f"lr_warmup_steps = {optimizer.lr_warmup_steps} is not below steps = {training.steps}; "
        "lower the first or raise the second": training.steps and optimizer.lr_warmup_steps >= training.steps,
        "caption_extension is for caption files beside the pictures, but captions names a metadata JSON; "
        "leave out one of them": data.captions and data.caption_extension,
        "captions names a metadata JSON, but images, the folder of its pictures, is missing": (
            data.captions and not data.images and not cfg.resume
        ),
        "network.weights brings its own rank and alpha; leave out alpha": network.weights and network.alpha,
    }
    return [message for message, is_wrong in checks.items() if is_wrong]


class DemoConfig(Section):
    """Train a LoRA on the embedded model and show what it learned."""

    output: Path = Field(Path("lorasmith-demo"), description="Folder for the demo's results.")
    steps: PositiveInt = Field(300, description="Optimizer steps.")
    seed: Annotated[int, Field(ge=0)] = Field(42, description="Everything random in the demo follows from this number.")


COMMANDS: dict[str, type[Section]] = {"train": TrainConfig, "demo": DemoConfig}
