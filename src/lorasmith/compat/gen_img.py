"""gen_img_diffusers.py, today gen_img.py: pictures, by `lorasmith generate`. All options of December 2022 and today."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorasmith.compat.table import Flag, Script, Values
from lorasmith.config import read_text
from lorasmith.errors import UserError

_GUIDANCE = "pictures are guided by their prompts alone; leave it out."
_UPSCALER = (
    "its modules make upscalers of another form; give a function that makes a PIL picture of one to lorasmith "
    "generate, --highres-upscaler my_module.enlarge."
)
_DEEP_SHRINK = "Deep Shrink is not built here; draw small, and then larger with --image_path."
_GRADUAL = "Gradual Latent is not built here; draw small, and then larger with --image_path."
_SDXL = "it is for SDXL, and LoRAs here are for SD 1.x and 2.x; leave it out."
_START_NOISE = "pictures begin in plain noise; leave it out."
_ONE_BY_ONE = "nothing needs doing: pictures are encoded and decoded one by one"
_READ = "nothing needs doing: it is read from the model's file"
_FUSED = "torch's own fused attention, which is as fast and needs no further package"

_MODULES = (
    "networks.lora", "network.lora", "networks.lora_fa", "networks.dylora", "networks.loha", "networks.lokr",
    "networks.oft", "lycoris.kohya",
)  # fmt: skip
_LINE_OPTIONS = {
    "c": _GUIDANCE,
    **dict.fromkeys(("ow", "oh", "nw", "nh", "ct", "cl"), _SDXL),
    **dict.fromkeys(("dsd1", "dst1", "dsd2", "dst2", "dsr"), _DEEP_SHRINK),
    **dict.fromkeys(("glt", "glr", "gls", "gle", "glsn", "glus"), _GRADUAL),
}
_OF_SECOND_PASS = ("w", "h", "s", "t")
_DENOISE = 0.8
_LINE_OPTION = re.compile(r"(?:^|\s)--(\w+)")


# ---- what takes more than one option to say -------------------------------------------------------------------------


def _complete(given: Values) -> dict[str, Any]:
    ways = [f"--{name}" for name in ("prompt", "from_file", "interactive") if name in given]
    if len(ways) != 1:
        raise UserError(
            f"{' and '.join(ways)} both say what to draw; leave out one of them."
            if ways
            else 'missing: what to draw, --prompt "a photo of a cat" or --from_file prompts.txt'
        )
    _check_numbers(given)
    values = {"precision": _precision(given), "size": _size(given), "steps": given.get("steps", 50)}
    values |= {**_strengths(given), **_controls(given)}
    if "image_path" in given:
        values["denoise"] = given.get("strength", _DENOISE)
    if "highres_fix_scale" in given:
        values |= _highres(given)
    if "images_per_prompt" in given or "n_iter" in given:
        values["images"] = given.get("images_per_prompt", 1) * given.get("n_iter", 1)
    return values


def _check_numbers(given: Values) -> None:
    """Refuse, by their old names, numbers of which `_complete` makes something else."""
    for name in ("W", "H"):
        if name in given and (given[name] < 8 or given[name] % 8):
            raise UserError(f"--{name} {given[name]}: expected a multiple of 8.")
    if not 0 < given.get("strength", 1) <= 1:
        raise UserError(f"--strength {given['strength']}: expected a number above 0 and at most 1.")
    for name in ("images_per_prompt", "n_iter"):
        if given.get(name, 1) < 1:
            raise UserError(f"--{name} {given[name]}: expected a whole number above 0.")
    for strength in given.get("network_mul") or []:
        if not math.isfinite(strength):
            raise UserError(f"--network_mul {strength}: expected a number.")


def _precision(given: Values) -> str:
    if "fp16" in given and "bf16" in given:
        raise UserError("--fp16 and --bf16 contradict each other; leave out one of them.")
    if "fp16" in given and not _lacks_fp16():
        return "fp16"
    return "bf16" if "bf16" in given else "fp32"


def _lacks_fp16() -> bool:
    from lorasmith.devices import choose_device  # with torch, which --help does not need

    return choose_device("auto") == "cpu"


def _size(given: Values) -> str | None:
    """Return the size, or None for that of the picture that is drawn on from."""
    if "image_path" in given and not ("W" in given and "H" in given):
        return None
    return f"{given.get('W', 512)},{given.get('H', 512)}"


def _highres(given: Values) -> dict[str, Any]:
    """Return the two passes: sizes are of the last one there, of the first one here; steps are of each pass in both."""
    if "image_path" in given:
        raise UserError(
            "--highres_fix_scale and --image_path do not go together here; leave out one of them: with --image_path, "
            "larger --W and --H enlarge the picture that is drawn on from."
        )
    share, sizes = given["highres_fix_scale"], (given.get("W", 512), given.get("H", 512))
    if not 0 < share < 1:
        raise UserError(f"--highres_fix_scale {share:g}: expected a share of --W and --H, above 0 and below 1.")
    width, height = (max(int(side * share + 0.5) // 32 * 32, 32) for side in sizes)
    if width * sizes[1] != height * sizes[0] or width >= sizes[0]:
        raise UserError(
            f"--highres_fix_scale {share:g} of {sizes[0]}x{sizes[1]} is {width}x{height}, for the sides of the first "
            "pass are multiples of 32; that is not the same shape. Give --W and --H with which it is."
        )
    return {
        "size": f"{width},{height}",
        "steps": given.get("highres_fix_steps", 28),
        "highres_scale": sizes[0] / width,
        "highres_steps": given.get("steps", 50),
        "highres_denoise": given.get("strength", _DENOISE),
        "highres_upscaler": "latent" if "highres_fix_latents_upscaling" in given else "lanczos",
    }


def _strengths(given: Values) -> dict[str, Any]:
    modules, files = given.get("network_module") or [], given.get("network_weights") or []
    for module in modules:
        if module not in _MODULES:
            raise UserError(f"--network_module {module}: expected one of {', '.join(_MODULES)}.")
    if len(modules) != len(files):
        raise UserError(
            f"--network_module is given {len(modules)} modules and --network_weights {len(files)} files; give one "
            "module, such as networks.lora, for each file."
        )
    strengths = given.get("network_mul") or []
    if len(strengths) > len(files):
        raise UserError(
            f"--network_mul is given {len(strengths)} numbers for {len(files)} files of --network_weights; give at "
            "most one for each."
        )
    return {"strength": [*strengths, *[1.0] * (len(files) - len(strengths))]} if strengths else {}


def _controls(given: Values) -> dict[str, Any]:
    """Return what the ControlNets of `--control_net_models` do; lists that are too short end in what is left out."""
    count, pictures = len(given.get("control_net_models") or []), len(given.get("guide_image_path") or [])
    if count and pictures not in (1, count):
        raise UserError(
            f"--guide_image_path is given {pictures} pictures for {count} ControlNets of --control_net_models; give "
            "one for all, or one for each."
        )
    if "control_net_multipliers" in given and "control_net_weights" in given:
        raise UserError("--control_net_multipliers and --control_net_weights say the same; leave one of them out.")
    names = ("control_net_preps", "control_net_multipliers", "control_net_weights", "control_net_ratios")
    lists = {name: given[name] for name in names if given.get(name)}
    for name, values in lists.items():
        if len(values) > count:
            raise UserError(
                f"--{name} is given {len(values)} values for {count} ControlNets of --control_net_models; give at most "
                "one for each."
            )
    found: dict[str, Any] = {}
    for name, values in lists.items():
        if name == "control_net_preps":
            found["control_preprocessor"] = [*map(_preprocessor, values), *["none"] * (count - len(values))]
        elif name == "control_net_ratios":
            found["control_range"] = [f"0,{ratio:g}" for ratio in [*values, *[1.0] * (count - len(values))]]
        else:
            found["control_weight"] = [*values, *[1.0] * (count - len(values))]
    return found


def _preprocessor(name: str) -> str:
    if name.lower() == "none":
        return "none"
    match = re.fullmatch(r"canny(?:_(\d+))?(?:_(\d+))?", name)
    if match is None:
        raise UserError(f"--control_net_preps {name}: expected none, canny, or canny_63_191 with other numbers.")
    return f"canny:{match[1] or 63},{match[2] or 191}"


def _notes(given: Values) -> list[str]:
    notes = []
    if "fp16" in given and _lacks_fp16():
        notes.append("--fp16 needs a GPU, and there is none here: fp32 is taken.")
    if "image_path" in given and ("W" in given) != ("H" in given):
        notes.append("--W and --H do nothing alone with --image_path: pictures are of that one's size.")
    return notes


def _check(given: Values) -> None:
    """Refuse what stands in a prompt and means something to sd-scripts alone."""
    for line in _lines(given):
        for name in _LINE_OPTION.findall(line):
            if name in _LINE_OPTIONS:
                raise UserError(f"prompt {line!r}: --{name} is refused: {_LINE_OPTIONS[name]}")
            if name in _OF_SECOND_PASS and "highres_fix_scale" in given:
                raise UserError(
                    f"prompt {line!r}: --{name} is refused with --highres_fix_scale: here it would be of the first "
                    "pass, and not of the second; give it for all prompts."
                )


def _lines(given: Values) -> list[str]:
    if "from_file" not in given:
        return [given["prompt"]] if "prompt" in given else []
    path = Path(given["from_file"]).expanduser()
    if path.suffix.lower() != ".txt":
        return []  # another form, with options by name; or refused
    lines = [line.strip() for line in read_text(path).splitlines()]
    return [line for line in lines if not line.startswith("#")]


def _tiling(slices: int) -> str | None:
    return "on" if slices > 1 else None


def _one(prompt: str) -> list[str]:
    return [prompt]


# ---- the table ------------------------------------------------------------------------------------------------------


def _refused(names: str, refusal: str, *, many: bool = False) -> list[Flag]:
    return [Flag(name, refusal=refusal, many=many) for name in names.split()]


def _refused_switches(names: str, refusal: str) -> list[Flag]:
    return [Flag(name, kind="switch", refusal=refusal) for name in names.split()]


_MODEL = (
    Flag("--ckpt", "base", kind="path"),
    Flag("--vae", "vae", kind="path"),
    Flag("--v1", kind="switch", note=_READ),
    Flag("--v2", kind="switch", note=_READ),
    Flag("--v_parameterization", "prediction", kind="switch", value="v_prediction"),
    Flag("--sdxl", kind="switch", refusal=_SDXL),
    Flag("--clip_skip", "clip_skip", kind="integer"),
    Flag("--zero_terminal_snr", "zero_terminal_snr", kind="switch"),
    Flag("--textual_inversion_embeddings", "embeddings", kind="path", many=True),
    Flag("--tokenizer_cache_dir", kind="path", note="nothing needs doing: the tokenizer is a part of lorasmith"),
)

_PROMPTS = (
    Flag("--prompt", "prompt", convert=_one),
    Flag("--from_file", "prompts", kind="path"),
    Flag("--interactive", "interactive", kind="switch"),
    Flag("--no_preview", kind="switch", note="nothing needs doing: no window shows the pictures"),
    *_refused("--from_module --prompter_module_args", "prompts come from --prompt or --from_file; write such a file."),
    Flag("--shuffle_prompts", kind="switch", note="nothing needs doing: their order changes no picture"),
    Flag(
        "--max_embeddings_multiples",
        kind="integer",
        note="nothing needs doing: prompts of any length are taken as a whole",
    ),
    Flag(
        "--emb_normalize_mode",
        choices=("original", "none", "abs"),
        note="weights in prompts always act as with none: nothing is scaled back after them",
    ),
)

_PICTURES = (
    Flag("--W", kind="integer", becomes="`--size`; left out: 512, or as --image_path is"),
    Flag("--H", kind="integer", becomes="`--size`; left out: 512, or as --image_path is"),
    Flag("--steps", kind="integer", becomes="`--steps`, or `--highres-steps`; left out: 50"),
    Flag("--scale", "guidance", kind="number", default=7.5),
    Flag("--sampler", "sampler", default="ddim"),
    Flag("--seed", "seed", kind="integer"),
    Flag("--iter_same_seed", kind="switch", note="nothing needs doing: all prompts begin with the same seed"),
    Flag("--images_per_prompt", kind="integer", becomes="`--images`, times --n_iter"),
    Flag("--n_iter", kind="integer", becomes="`--images`, times --images_per_prompt"),
    Flag("--batch_size", "batch_size", kind="integer"),
    Flag("--image_path", "init", kind="path"),
    Flag("--mask_path", "mask", kind="path", needs=("image_path",)),
    Flag(
        "--strength",
        kind="number",
        becomes="`--denoise`, or `--highres-denoise`; left out: 0.8",
        needs=("image_path", "highres_fix_scale"),
    ),
    Flag("--outdir", "output", kind="path", default="outputs"),
    Flag("--sequential_file_name", "name", kind="switch", value="im_{number}"),
    Flag(
        "--use_original_file_name",
        kind="switch",
        refusal="it writes over what lies in --outdir; leave it out: --image_path names one picture only.",
    ),
)

_NETWORK = (
    Flag("--network_module", many=True, becomes="one for each file; of what kind a LoRA is, its file says"),
    Flag("--network_weights", "lora", kind="path", many=True),
    Flag("--network_mul", kind="number", many=True, becomes="`--strength`; left out: 1"),
    Flag("--network_dim", kind="integer", many=True, note="nothing needs doing: it is read from the LoRA's file"),
    Flag("--network_args", many=True, note="nothing needs doing: what a LoRA is, is read from its file"),
    Flag(
        "--network_show_meta", kind="switch", note="nothing is shown here: `lorasmith inspect` tells what is in a LoRA"
    ),
    Flag("--network_merge", "fold", kind="switch"),
    Flag("--network_pre_calc", "fold", kind="switch"),
    Flag(
        "--network_merge_n_models",
        kind="integer",
        note="nothing needs doing: attached LoRAs draw the same pictures; --network_merge folds all of them",
    ),
    *_refused(
        "--network_regional_mask_max_color_codes",
        "masks are pictures of their own here, one for each LoRA: lorasmith generate --lora-mask.",
    ),
)

_CONTROL = (
    Flag("--control_net_models", "control", kind="path", many=True),
    Flag("--guide_image_path", "control_picture", kind="path", many=True, needs=("control_net_models",)),
    Flag("--control_net_preps", many=True, becomes="`--control-preprocessor`; canny and canny_63_191: canny:63,191"),
    Flag("--control_net_multipliers", kind="number", many=True, becomes="`--control-weight`; left out: 1"),
    Flag("--control_net_weights", kind="number", many=True, becomes="`--control-weight`; left out: 1"),
    Flag("--control_net_ratios", kind="number", many=True, becomes="`--control-range`: from 0 to this; left out: 1"),
    *_refused("--control_net_lllite_models", _SDXL, many=True),
)

_MACHINE = (
    Flag("--fp16", kind="switch", becomes="`--precision fp16`; left out, or without a GPU: fp32"),
    Flag("--bf16", kind="switch", becomes="`--precision bf16`; left out: fp32"),
    Flag("--xformers", "attention", kind="switch", value="sdpa", note=_FUSED),
    Flag("--diffusers_xformers", "attention", kind="switch", value="sdpa", note=_FUSED),
    Flag("--sdpa", "attention", kind="switch", value="sdpa"),
    Flag("--opt_channels_last", kind="switch", note="nothing needs doing: it changes no picture"),
    Flag("--vae_batch_size", kind="number", note=_ONE_BY_ONE),
    Flag("--vae_slices", "vae_tiling", kind="integer", convert=_tiling, note="tiles take the place of slices"),
    Flag(
        "--no_half_vae", kind="switch", note="nothing needs doing: the VAE computes in fp32, where it never overflows"
    ),
)

_OTHERS = (
    Flag("--negative_scale", "negative_guidance", kind="number"),
    *_refused_switches(
        "--force_scheduler_zero_steps_offset", "samplers begin where diffusers' own for these models do; leave it out."
    ),
    *_refused(
        "--pyramid_noise_prob --pyramid_noise_discount_range --noise_offset_prob --noise_offset_range", _START_NOISE
    ),
    *_refused(
        "--original_height --original_width --original_height_negative --original_width_negative --crop_top "
        "--crop_left",
        _SDXL,
    ),
    *_refused(
        "--clip_guidance_scale --clip_image_guidance_scale --vgg16_guidance_scale --vgg16_guidance_layer "
        "--clip_vision_strength",
        _GUIDANCE,
    ),
    Flag("--highres_fix_scale", kind="number", becomes="`--size`, of the first pass, and `--highres-scale`"),
    Flag("--highres_fix_steps", kind="integer", becomes="`--steps`; left out: 28", needs=("highres_fix_scale",)),
    Flag("--highres_fix_strength", kind="number", note="nothing needs doing: the first pass begins in noise"),
    Flag(
        "--highres_fix_latents_upscaling",
        kind="switch",
        becomes="`--highres-upscaler latent`; left out: lanczos",
        needs=("highres_fix_scale",),
    ),
    *_refused("--highres_fix_upscaler --highres_fix_upscaler_args", _UPSCALER),
    *_refused_switches("--highres_fix_save_1st", "only the last picture is kept; leave it out."),
    *_refused_switches("--highres_fix_disable_control_net", "ControlNets act in both passes here; leave it out."),
    *_refused("--ds_depth_1 --ds_timesteps_1 --ds_depth_2 --ds_timesteps_2 --ds_ratio", _DEEP_SHRINK),
    *_refused(
        "--gradual_latent_timesteps --gradual_latent_ratio --gradual_latent_ratio_step "
        "--gradual_latent_every_n_steps --gradual_latent_s_noise --gradual_latent_unsharp_params",
        _GRADUAL,
    ),
)

_SCRIPT = Script(
    "gen_img_diffusers.py",
    "generate",
    (*_MODEL, *_PROMPTS, *_PICTURES, *_NETWORK, *_CONTROL, *_MACHINE, *_OTHERS),
    complete=_complete,
    notes=_notes,
    check=_check,
    differences=(
        "The same seed draws another picture than in sd-scripts. Each prompt begins with `--seed`, and its other "
        "pictures count up; sd-scripts draws a seed for each picture from it, where there is more than one.",
        "`--n_iter 3` draws three times as many pictures of each prompt, all of one prompt before the next.",
        "Prompts are taken whole, however long; sd-scripts cuts them at 75 tokens unless `--max_embeddings_multiples` "
        "is given. Weights such as `(word:1.3)` act fully, as with `--emb_normalize_mode none`.",
        "A line may hold `--n`, `--w`, `--h`, `--s`, `--d`, `--l`, `--t`, `--nl`, `--am`, `--f`, and `--ss` for the "
        "sampler; others are refused. `--d 1,2,3` draws three pictures, whatever `--images_per_prompt` says, and is "
        "refused where that says another number; `--am` has a number for each file. "
        "[All that may stand in a prompt](generate.md#prompts); `AND` sums what the parts predict, and of `{a|b}` each "
        "picture draws one.",
        "`--from_file` ends in .txt (or .toml or .json); a line that begins with # is none.",
        "With `--image_path`, one file, the picture is cut to `--W` and `--H`, not distorted, and else keeps its size "
        "to a multiple of 8, not 32. The mask has the picture's size. The prompt is not read from the picture.",
        "Several ControlNets act in the same steps, and what they add is summed; sd-scripts takes turns between them. "
        "`--guide_image_path` is one picture for all of them, or one for each; each is cut to `--W` and `--H`. Edges "
        "are found in the colours, not in grey.",
        "With `--highres_fix_scale` both passes have the same seed, where sd-scripts adds 1 for the second; `--w`, "
        "`--h`, `--s` and `--t` in a prompt are refused then, for they would be of the first pass.",
        "Files are `00001-SEED.png`, with `--sequential_file_name` `im_00001.png`; numbers go on after the highest "
        "that is there, and nothing is replaced. Their text is what WebUI reads, with the hashes of model and LoRAs.",
    ),
)
SCRIPTS: Sequence[Script] = (_SCRIPT, replace(_SCRIPT, name="gen_img.py"))
