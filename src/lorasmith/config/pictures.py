"""The options of the commands for pictures, captions and the cache."""

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from lorasmith.config.training import bucket_contradictions
from lorasmith.config.values import (
    BUCKET_OPTIONS,
    CacheDir,
    Color,
    Place,
    PlaceOrHubId,
    Range,
    Section,
    Separator,
    Share,
    Size,
    TokenLength,
    is_changed,
)


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
        options = ["buckets", *BUCKET_OPTIONS, "face_crop_aug_range"]
        given = [name for name in options if is_changed(self, name)]
        if given and not self.preview:
            raise ValueError(f"{' and '.join(given)} change what --preview shows; add it, or leave the other out")
        if buckets := [name for name in given if name in BUCKET_OPTIONS and not self.buckets]:
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
        given = [name for name in of_files if is_changed(self, name)]
        if self.folder is None and self.input is not None and given:
            raise ValueError(f"{' and '.join(given)} can do nothing without DIR; give the folder, or leave this out")
        for kind, other in (("captions", "tag_extension"), ("tags", "caption_extension")):
            if self.read == kind and is_changed(self, other):
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
        given = [name for name in ("npz_form", "npz_dir", "output", "overwrite") if is_changed(self, name)]
        if given and not self.npz:
            raise ValueError(f"{' and '.join(given)} can do nothing without npz; add it, or leave the other out")
        if self.captions and self.recursive:
            raise ValueError("captions names the pictures, so recursive can do nothing; leave out one of them")
        if wrong := bucket_contradictions(self):
            raise ValueError("\n".join(wrong))
        return self
