"""The options of `lorasmith train`, in sections."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveInt

from lorasmith.config.values import (
    NUMBERS,
    CacheDir,
    Color,
    FileName,
    Numbers,
    Place,
    PlaceOrHubId,
    Range,
    Section,
    Separator,
    Share,
    Size,
    TokenLength,
)
from lorasmith.lr import parse_table


def _check_repository_folder(folder: str) -> str:
    if "\\" in folder or not all(part.strip(".") for part in folder.split("/")):
        raise ValueError(f"{folder!r} is no folder in a repository; expected is one like loras/dog")
    return folder


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


RepositoryFolder = Annotated[str, AfterValidator(_check_repository_folder)]
Trackers = Annotated[list[str], AfterValidator(_check_trackers)]
Rate = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
ShareLeftOut = Annotated[float, Field(ge=0, lt=1)]
StepsOrShare = Annotated[float, Field(ge=0), AfterValidator(_check_steps_or_share)]
LearningRateTable = Annotated[str, AfterValidator(_check_table)]


def _check_blocks(numbers: list[Any]) -> list[Any]:
    if len(numbers) not in (0, 25):
        raise ValueError(
            f"{len(numbers)} numbers; give 25, one for each of 12 input blocks, the middle one, and 12 output blocks"
        )
    return numbers


BlockRanks = Annotated[list[Annotated[int, Field(ge=0)]], AfterValidator(_check_blocks), NUMBERS]
BlockRates = Annotated[list[Rate], AfterValidator(_check_blocks), NUMBERS]
BlockFactors = Annotated[list[NotNegative], AfterValidator(_check_blocks), NUMBERS]


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
        description="Compile the model by torch.compile with this backend; each shape of batch takes minutes before "
        "its first step, results are equal to rounding.",
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


def options_of_held_out(validation: ValidationSection) -> list[str]:
    """Return the options that are given and mean nothing without held-out pictures."""
    others = {"validation_split", "best_by", "judge"}
    if validation.best_by == "pictures":
        others |= {"keep_best", "stop_early"}
    return list(validation.model_dump(exclude_defaults=True, exclude=others))
