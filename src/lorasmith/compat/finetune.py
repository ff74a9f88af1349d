"""finetune/*.py: the scripts of sd-scripts' fine-tuning guide, which prepare a data set.

Captions and tags made by models, both merged into one metadata file, cleaned there, and pictures encoded ahead.
"""

import re
from pathlib import Path
from typing import Any

from lorasmith.compat.table import Flag, Script, Values, as_path

_DEBUG = Flag("--debug", kind="switch", note="nothing needs doing: what was done, and what could not be, is listed.")
_READING = (
    Flag(
        "--max_data_loader_n_workers",
        kind="integer",
        note="nothing needs doing: the next pictures are read meanwhile anyway.",
    ),
    Flag("--pin_memory", kind="switch", note="nothing needs doing: reading pictures is not what takes the time."),
)
_FOLDER = Flag("train_data_dir", "folder", kind="path")
_RECURSIVE = Flag("--recursive", "recursive", kind="switch")
_EXISTING = Flag(
    "--existing",
    "existing",
    choices=("skip", "overwrite", "append"),
    becomes="lorasmith's own: what becomes of text files that are there",
)
_KEPT = (
    "Text files that hold something already stay, and their pictures are skipped: `--existing overwrite` replaces them."
)


# ---- make_captions.py ----------------------------------------------------------------------------------------------

_BLIP = "model_large_caption.pth"


def _captioner(weights: str) -> str | None:
    """Return the model of --caption_weights; None: the one that `lorasmith caption` takes by itself."""
    if re.split(r"[/\\]", weights)[-1] == _BLIP:
        return None
    if weights.endswith(".pth") or "://" in weights:
        raise ValueError(
            "weights in BLIP's own layout are not read; give a folder or hub id for transformers, such as "
            "Salesforce/blip-image-captioning-base"
        )
    return as_path(weights)


def _how_words_are_chosen(given: Values) -> dict[str, Any]:
    if "beam_search" in given:
        return {"beams": given.get("num_beams", 1)}
    return {"top_p": given.get("top_p", 0.9)}


def _captioning_notes(given: Values) -> list[str]:
    unused = "top_p" if "beam_search" in given else "num_beams"
    notes = [f"--{unused} does nothing {'with' if unused == 'top_p' else 'without'} --beam_search."]
    notes = notes if unused in given else []
    if str(given.get("caption_weights", "")).endswith(_BLIP):
        notes.append(f"--caption_weights: for {_BLIP} the hub's Salesforce/blip-image-captioning-large is taken.")
    return notes


MAKE_CAPTIONS = Script(
    "finetune/make_captions.py",
    "caption",
    (
        _FOLDER,
        Flag("--caption_weights", "model", convert=_captioner),
        Flag("--caption_extention", "caption_extension"),
        Flag("--caption_extension", "caption_extension"),
        Flag("--beam_search", kind="switch", becomes="`--beams` instead of `--top-p`"),
        Flag("--num_beams", kind="integer", becomes="with `--beam_search`: `--beams`"),
        Flag("--top_p", kind="number", becomes="without `--beam_search`: `--top-p`; left out: `0.9`"),
        Flag("--batch_size", "batch_size", kind="integer"),
        Flag("--max_length", "max_length", kind="integer"),
        Flag("--min_length", "min_length", kind="integer"),
        Flag("--seed", "seed", kind="integer"),
        _RECURSIVE,
        *_READING,
        _DEBUG,
        _EXISTING,
    ),
    complete=_how_words_are_chosen,
    notes=_captioning_notes,
    differences=(
        _KEPT,
        "What is drawn follows from `--seed` and the picture alone, whatever the batches are, so it is not what "
        "sd-scripts draws.",
        "sd-scripts lets BLIP go on from `a picture of` and cuts these words off; here it begins by itself.",
    ),
)


# ---- tag_images_by_wd14_tagger.py ----------------------------------------------------------------------------------

_TAGGER = "SmilingWolf/wd-v1-4-convnext-tagger-v2"
_RATINGS = ("general", "sensitive", "questionable", "explicit", "safe")
_ONE_THRESHOLD = (
    "all tags but those of characters have one threshold here; give --general_threshold, and leave out single tags "
    "with --undesired_tags."
)
_NO_QUALITY = "taggers of the WD14 family have no tags of quality."


def _tagging(given: Values) -> dict[str, Any]:
    separator = given.get("caption_separator", ",").strip() or ","
    lists = {
        name: [tag.strip() for tag in given.get(name, "").split(separator) if tag.strip()]
        for name in ("undesired_tags", "always_first_tags")
    }
    if "use_rating_tags" in given:
        lists["always_first_tags"] += _RATINGS
    return {
        "model": _tagger(given),
        "rating": True if {"use_rating_tags", "use_rating_tags_as_last_tag"}.intersection(given) else None,
        "blacklist": ",".join(map(_escaped, lists["undesired_tags"])) or None,
        "always_first": ",".join(map(_escaped, lists["always_first_tags"])) or None,
    }


def _tagger(given: Values) -> str:
    """Return the tagger's folder, where sd-scripts has downloaded one with onnx, or else its hub id."""
    name, folder = given.get("repo_id", _TAGGER), Path(given.get("model_dir", "wd14_tagger_model"))
    places = [] if "force_download" in given else [folder / name.replace("/", "_"), folder]
    return next((str(place) for place in places if (place / "model.onnx").is_file()), name)


def _escaped(tag: str) -> str:
    return tag.replace(",", "\\,")


def _replacements(text: str) -> str:
    r"""Return `a,b;c,d` as `a:b,c:d`; a \ before a comma or semicolon makes it one of the tag."""
    pairs = []
    for pair in re.split(r"(?<!\\);", text):
        words = [word.replace("\\,", ",").replace("\\;", ";").strip() for word in re.split(r"(?<!\\),", pair)]
        if len(words) != 2 or not all(words):
            raise ValueError(f"{pair!r} is no pair; expected OLD,NEW;OLD,NEW")
        pairs.append(":".join(_escaped(word).replace(":", "\\:") for word in words))
    return ",".join(pairs)


def _share(threshold: float) -> float:
    return min(threshold, 1.0)  # above 1, sd-scripts' way to have none, is 1


TAG_IMAGES = Script(
    "finetune/tag_images_by_wd14_tagger.py",
    "tag",
    (
        _FOLDER,
        Flag("--repo_id", becomes=f"`--model`; left out: `{_TAGGER}`"),
        Flag("--model_dir", kind="path", becomes="`--model`, if the model lies there with its `model.onnx`"),
        Flag("--force_download", kind="switch", becomes="the hub's model even if there is one in `--model_dir`"),
        Flag("--batch_size", "batch_size", kind="integer"),
        *_READING,
        Flag("--caption_extention", "extension"),
        Flag("--caption_extension", "extension"),
        Flag("--output_path", "output", kind="path"),
        Flag("--thresh", "threshold", kind="number", convert=_share),
        Flag("--general_threshold", "general_threshold", kind="number", convert=_share),
        Flag("--character_threshold", "character_threshold", kind="number", convert=_share),
        *(
            Flag(f"--{kind}_threshold", kind="number", refusal=_ONE_THRESHOLD)
            for kind in ("meta", "model", "copyright", "artist")
        ),
        _RECURSIVE,
        Flag("--remove_underscore", "underscores", kind="switch", value="spaces", default="keep"),
        _DEBUG,
        Flag("--undesired_tags", becomes="`--blacklist`"),
        Flag(
            "--frequency_tags",
            kind="switch",
            note="nothing is printed here: `lorasmith captions DIR --dry-run` says how often there is each tag.",
        ),
        Flag("--onnx", kind="switch", note="nothing needs doing: it is always onnx."),
        Flag("--append_tags", "existing", kind="switch", value="append"),
        Flag("--use_rating_tags", kind="switch", becomes="`--rating`, and the ratings in `--always-first`"),
        Flag("--use_rating_tags_as_last_tag", kind="switch", becomes="`--rating`"),
        Flag("--use_quality_tags", kind="switch", refusal=_NO_QUALITY),
        Flag("--use_quality_tags_as_last_tag", kind="switch", refusal=_NO_QUALITY),
        Flag("--character_tags_first", "order", kind="switch", value="category"),
        Flag("--always_first_tags", becomes="`--always-first`"),
        Flag("--caption_separator", "separator"),
        Flag("--tag_replacement", "replace", convert=_replacements),
        Flag(
            "--character_tag_expand",
            kind="switch",
            refusal="tags are written as the tagger has them; --tag_replacement writes other words for single ones.",
        ),
        _EXISTING,
    ),
    complete=_tagging,
    differences=(
        _KEPT,
        "Tags stand in the order of their scores, not in that of the tagger's table; `--character_tags_first` puts "
        "characters before, each part by scores.",
        "`--always_first_tags a,b` puts a before b; sd-scripts the last one first.",
        "Spaces instead of underscores are written in all tags but emoticons, not in all of more than three letters.",
        "A threshold above 1 counts as 1.",
    ),
)


# ---- merge_captions_to_metadata.py, merge_dd_tags_to_metadata.py, clean_captions_and_tags.py -----------------------

_METADATA = (
    _FOLDER,
    Flag("out_json", "output", kind="path"),
    Flag("--in_json", kind="path", becomes="`--input`; left out: `out_json`, if there is one"),
    Flag("--full_path", "full_path", kind="switch"),
    _RECURSIVE,
    _DEBUG,
)
_BAK = "An `out_json` that is there is kept as `.bak`, `.bak2` and so on when it is written anew."
_NO_FILE = "A picture without such a file gets an entry without such words, and is counted; sd-scripts stops there."
_RELATIVE = "`--recursive` may be given without `--full_path`: keys are then paths in the folder."


def _merging(given: Values, kind: str) -> dict[str, Any]:
    older = given.get("in_json") or (given["out_json"] if Path(given["out_json"]).is_file() else None)
    return {"input": older, "read": kind, "overwrite": True}


MERGE_CAPTIONS = Script(
    "finetune/merge_captions_to_metadata.py",
    "captions",
    (
        *_METADATA,
        Flag("--caption_extention", "caption_extension"),
        Flag("--caption_extension", "caption_extension"),
    ),
    complete=lambda given: _merging(given, "captions"),
    differences=(_BAK, _NO_FILE, _RELATIVE, "Of a caption file with several lines the first counts."),
)
MERGE_TAGS = Script(
    "finetune/merge_dd_tags_to_metadata.py",
    "captions",
    (*_METADATA, Flag("--caption_extension", "tag_extension")),
    complete=lambda given: _merging(given, "tags"),
    differences=(_BAK, _NO_FILE, _RELATIVE),
)
CLEAN = Script(
    "finetune/clean_captions_and_tags.py",
    "captions",
    (
        Flag(
            "train_data_dir",
            kind="path",
            is_optional=True,
            note="nothing needs doing: all entries of the file are cleaned.",
        ),
        Flag("in_json", "input", kind="path"),
        Flag("out_json", "output", kind="path"),
        _DEBUG,
    ),
    complete=lambda given: {"clean": True, "overwrite": True},
    differences=(
        _BAK,
        "The rules are [lorasmith's](captions-metadata.md#where-this-differs-from-sd-scripts): captions keep their "
        "women, ladies and people, and tags of hair and eyes stay where there are several persons.",
    ),
)


# ---- prepare_buckets_latents.py ------------------------------------------------------------------------------------


def _encoding(given: Values) -> dict[str, Any]:
    return {
        "buckets": True,
        "bucket_rule": "sd-scripts",
        "npz": True,
        "npz_form": "2022",
        "overwrite": None if "skip_existing" in given else True,
    }


def _encoding_notes(given: Values) -> list[str]:
    if "skip_existing" in given:
        return []
    return [".npz files that these pictures have are written anew; --skip_existing leaves those that fit as they are."]


PREPARE_LATENTS = Script(
    "finetune/prepare_buckets_latents.py",
    "prepare",
    (
        _FOLDER,
        Flag("in_json", "captions", kind="path"),
        Flag("out_json", "output", kind="path"),
        Flag("model_name_or_path", "base", kind="path"),
        Flag("--v2", kind="switch", note="nothing needs doing: it is read from the model's file."),
        Flag(
            "--batch_size",
            kind="integer",
            note="nothing needs doing: pictures are encoded one by one, since in a batch each would change the others' "
            "last bits.",
        ),
        *_READING[:1],
        Flag("--max_resolution", "resolution", default="512,512"),
        Flag("--min_bucket_reso", "bucket_min", kind="integer"),
        Flag("--max_bucket_reso", "bucket_max", kind="integer"),
        Flag("--bucket_reso_steps", "bucket_step", kind="integer"),
        Flag("--bucket_no_upscale", "bucket_no_upscale", kind="switch"),
        Flag(
            "--mixed_precision",
            choices=("no", "fp16", "bf16"),
            note="nothing needs doing: the VAE computes in fp32, in which it never overflows.",
        ),
        Flag("--full_path", kind="switch", note="nothing needs doing: keys are found and kept as in_json has them."),
        Flag("--flip_aug", "flip", kind="switch"),
        Flag(
            "--alpha_mask",
            refusal="files of this form hold no mask; train with --alpha_mask, which takes the pictures' own.",
        ),
        Flag("--skip_existing", kind="switch", becomes="no `--overwrite`"),
        Flag("--recursive", kind="switch", note="nothing needs doing: in_json names the pictures, wherever they lie."),
    ),
    complete=_encoding,
    notes=_encoding_notes,
    differences=(
        "The files are those of 2022 (`a.npz` with `arr_0`); today's script writes none. "
        "[lorasmith prepare](prepare.md) writes today's form.",
        "Only pictures that `in_json` names are encoded, and an `out_json` that is there is added to.",
        "Each start draws the same latents. Without `--flip_aug`, older files of mirror images stay.",
    ),
)

SCRIPTS = (MAKE_CAPTIONS, TAG_IMAGES, MERGE_CAPTIONS, MERGE_TAGS, CLEAN, PREPARE_LATENTS)
