"""The options of the commands for LoRA files and models."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from lorasmith.config.values import Numbers, Place, PlaceOrHubId, Section, counted, is_changed


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
            given := [n for n in ("block_weights", "precision", "verify") if is_changed(self, n)]
        ):
            raise ValueError(f"{' and '.join(given)} can only be used with a base model; give --model, or leave it out")
        for name in ("ratio", "unet_ratio", "text_encoder_ratio", "block_weights"):
            count = len(getattr(self, name))
            if count not in (0, len(self.lora)):
                raise ValueError(
                    f"{name} is given {counted(count, 'time')} for {counted(len(self.lora), 'LoRA')}; "
                    "give one for each, in the same order"
                )
        if self.ratio and self.unet_ratio and self.text_encoder_ratio:
            raise ValueError("ratio is not used where unet_ratio and text_encoder_ratio are both given; leave it out")
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
