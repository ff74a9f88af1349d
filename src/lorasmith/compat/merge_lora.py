"""networks/merge_lora.py: LoRAs into a model by `lorasmith merge`, or with each other as only this script does it."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lorasmith.compat.table import Flag, Script, Values
from lorasmith.errors import UserError

_PRECISIONS = ("float", "fp16", "bf16")
_MINIMUM = ("ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha")


def _complete(given: Values) -> dict[str, Any]:
    models, ratios = given.get("models", []), given.get("ratios", [])
    if not models or len(models) != len(ratios):
        raise UserError(
            f"--models names {len(models)} LoRA files and --ratios {len(ratios)} numbers; give one ratio for each file."
        )
    if "save_to" not in given:
        raise UserError("missing: --save_to, the file to write, such as --save_to merged.safetensors")
    if "sd_model" in given:
        for name in ("concat", "shuffle"):
            if name in given:
                raise UserError(f"--{name} is for merging LoRAs with each other; leave out --{name}, or --sd_model.")
    precision = given.get("precision", "float")
    saved = given.get("save_precision", precision)
    return {"precision": precision, "save_precision": saved} if "sd_model" in given else {"save_precision": saved}


def _notes(given: Values) -> list[str]:
    notes = []
    if "sd_model" not in given:
        side = "put side by side" if "concat" in given else "added"
        is_mixed = "concat" not in given and len(given["models"]) > 1
        cross = ", and each LoRA's matrices also meet those of the others" if is_mixed else ""
        notes.append(
            f"without --sd_model the matrices of the LoRAs are {side}, not their products: a ratio acts as its square "
            f"(0.6 as 0.36){cross}. `lorasmith merge --lora` adds the products, at the ratios that you give."
        )
    elif "no_metadata" in given:
        notes.append("--no_metadata: nothing needs doing: the metadata of the base model stay, and nothing is added.")
    if "save_precision" not in given and given.get("precision", "float") == "float":
        notes.append("--save_precision is left out, so that of --precision is taken: float, twice the size of fp16.")
    return notes


def _check(given: Values) -> None:
    """Refuse --v2 for a model that is none."""
    if "v2" not in given or "sd_model" not in given:
        return
    from lorasmith import model_families  # with torch, which --help does not need
    from lorasmith.checkpoint import open_checkpoint

    with open_checkpoint(given["sd_model"]) as checkpoint:
        family, _, _ = model_families.adapter_places(checkpoint)
    if family != "sd2":
        raise UserError(f"--v2 says that {given['sd_model']} is SD 2.x, but it is SD 1.x; leave out --v2.")


def _instead(given: Values) -> Callable[[], int] | None:
    return None if "sd_model" in given else partial(_add_factors, given)


def _add_factors(given: Values) -> int:
    import torch

    from lorasmith import lora_files, lora_merging
    from lorasmith.compat.factors import add_factors, shuffle_ranks
    from lorasmith.formats import kohya

    paths, output = [Path(text).expanduser() for text in given["models"]], Path(given["save_to"]).expanduser()
    lora_files.check_output(output, paths, overwrite="overwrite" in given)
    files = [kohya.read(path) for path in paths]
    lora_merging.check_families(files)
    sources = [lora_files.layers_of(file) for file in files]
    precision = given.get("precision", "float")
    dtype = kohya.PRECISIONS[precision]
    for path, layers in zip(paths, sources, strict=True):
        ranks = sorted({layer.factors.rank for layer in layers.values()})
        print(f"{path}: {len(layers)} layers of rank {', '.join(map(str, ranks))}")
    tensors = [
        {key: value.to(dtype) if value.dim() else value for key, value in lora_files.tensors_of(layers).items()}
        for layers in sources
    ]
    try:
        merged = add_factors(tensors, given["ratios"], concat="concat" in given)
    except ValueError as error:
        raise UserError(
            f"{error}. `lorasmith merge --lora`, as above, adds the products of any LoRAs of one family."
        ) from error
    if "shuffle" in given:
        merged = shuffle_ranks(merged, torch.Generator().manual_seed(0))
    layers = lora_files.layers_of(kohya.LoraFile(output, merged, {}, files[0].family))
    ratios = [{"unet": ratio, "text_encoder": ratio} for ratio in given["ratios"]]
    metadata = lora_merging.metadata(files, ratios, layers, title=output.stem, time=time.time())
    if "no_metadata" in given:
        metadata = {key: metadata[key] for key in _MINIMUM if key in metadata}
    print(lora_files.save(output, layers, metadata, given.get("save_precision", precision)))
    return 0


_FLAGS: Sequence[Flag] = (
    Flag("--v2", kind="switch", becomes="read from the model's file, and refused if that says otherwise"),
    Flag("--sd_model", "model", kind="path"),
    Flag("--save_to", "output", kind="path"),
    Flag("--models", "lora", kind="path", many=True),
    Flag("--ratios", "ratio", kind="number", many=True),
    Flag("--precision", choices=_PRECISIONS, becomes="`--precision`"),
    Flag("--save_precision", choices=_PRECISIONS, becomes="`--save-precision`; left out: as `--precision`"),
    Flag(
        "--no_metadata",
        kind="switch",
        becomes="without `--sd_model`: only rank, alpha and the model's version are written; with it nothing needs "
        "doing, since nothing is added to the base model's metadata",
    ),
    Flag("--concat", kind="switch", becomes="without `--sd_model`: the matrices side by side, at the sum of the ranks"),
    Flag("--shuffle", kind="switch", becomes="without `--sd_model`: the ranks in another order; changes no picture"),
    Flag("--overwrite", "overwrite", kind="switch", becomes="lorasmith's own: replace what is at `--save_to`"),
)

SCRIPT = Script(
    "networks/merge_lora.py",
    "merge",
    tuple(_FLAGS),
    complete=_complete,
    notes=_notes,
    check=_check,
    instead=_instead,
    differences=(
        "What is at `--save_to` already is not replaced unless `--overwrite` is given.",
        "With `--sd_model`, `--save_precision` is the precision of the changed tensors; all others stay as they are.",
        "Without `--sd_model`, the sum of the matrices is what sd-scripts makes of LoRAs with and without alpha: each "
        "times ratio x sqrt(alpha / alpha of the first), a ratio below 0 on one of both only, with the alpha of the "
        "first. A ratio acts as its square. A layer that one LoRA does not have is that of the others. With `--concat` "
        "the alpha stays that of the first while the rank grows, as in sd-scripts, which weakens all.",
    ),
)
