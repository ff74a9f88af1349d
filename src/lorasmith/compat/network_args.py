"""--network_module with its --network_args: sd-scripts' networks.lora and lycoris.kohya as options of a network.

Other modules, of other people, are called as they are.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from lorasmith.compat.table import Values
from lorasmith.errors import UserError

_BLOCKS = 12  # of input, and of output
_ALGORITHMS = {
    "lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr", "full": "full", "ia3": "ia3", "glora": "glora",
    "diag-oft": "oft", "boft": "boft",
}  # fmt: skip
_REFUSED_MODULES = {
    "networks.dylora": "DyLoRA, which trains all ranks up to one at once, is not built here; train one rank, and "
    "`lorasmith resize` it.",
    "networks.lora_fa": "LoRA-FA, which freezes one half, saves next to no memory at this size; take networks.lora.",
    "networks.oft": "take --network_module lycoris.kohya --network_args algo=diag-oft, which other programs read too.",
}
_NUMBERS = {  # name in --network_args -> option of the network, and what its text is read as
    "conv_dim": ("network.conv_rank", int), "conv_alpha": ("network.conv_alpha", float),
    "rank_dropout": ("network.rank_dropout", float), "module_dropout": ("network.module_dropout", float),
    "loraplus_lr_ratio": ("optimizer.lora_plus_ratio", float),
    "loraplus_unet_lr_ratio": ("optimizer.unet_lora_plus_ratio", float),
    "loraplus_text_encoder_lr_ratio": ("optimizer.text_encoder_lora_plus_ratio", float),
}  # fmt: skip
_LISTS = {
    "block_dims": ("network.block_ranks", int), "block_alphas": ("network.block_alphas", float),
    "conv_block_dims": ("network.conv_block_ranks", int), "conv_block_alphas": ("network.conv_block_alphas", float),
}  # fmt: skip
_RATES = ("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold")
_ADAPTER_OPTIONS = {  # LyCORIS' argument -> the adapter's option
    "factor": "factor", "decompose_both": "decompose_both", "full_matrix": "full_matrix", "use_tucker": "use_tucker",
    "use_conv_cp": "use_tucker", "use_cp": "use_tucker", "unbalanced_factorization": "unbalanced_factorization",
    "rescaled": "rescaled", "train_on_input": "train_on_input", "wd_on_output": "wd_on_output",
}  # fmt: skip
_OFF = ("use_scalar", "rank_dropout_scale", "train_norm", "rs_lora")  # what LyCORIS has besides, which is off there
_LYCORIS_OWN = {"algo", "preset", "dropout", "constraint", "dora_wd", "weight_decompose", *_ADAPTER_OPTIONS}
_LYCORIS = {
    *_LYCORIS_OWN,
    *_OFF,
    "bypass_mode",
    "disable_conv_cp",
    "conv_dim",
    "conv_alpha",
    "rank_dropout",
    "module_dropout",
}
_PLAIN = {*_NUMBERS, *_LISTS, *_RATES}
_IDLE = {  # what an adapter takes no notice of
    "full": ("network_dim", "network_alpha"), "ia3": ("network_dim", "network_alpha"),
    "oft": ("network_alpha",), "boft": ("network_alpha",),
}  # fmt: skip
_PRESETS = {"full": None, "attn-mlp": "", "unet-transformer-only": "unet"}


def values(given: Values) -> dict[str, Any]:
    """Return the network's options by place.

    Raises:
        UserError: a module or an argument is unknown or refused, or an argument cannot be read.
    """
    module = given.get("network_module")
    if module is None:
        raise UserError("missing: --network_module, such as --network_module networks.lora")
    if module in _REFUSED_MODULES:
        raise UserError(f"--network_module {module} is refused: {_REFUSED_MODULES[module]}")
    if module.startswith("networks.") and module != "networks.lora":
        raise UserError(
            f"--network_module {module} is refused: of sd-scripts' own modules there is networks.lora here, for SD 1.x "
            "and 2.x; those for other models are not. For other types of adapters give lycoris.kohya with algo=..., or "
            "a module of your own."
        )
    if module not in ("networks.lora", "network.lora", "lycoris.kohya"):
        return {"network.network_module": module, "network.network_args": given.get("network_args") or []}
    is_lycoris = module == "lycoris.kohya"
    args = _args(given.get("network_args") or [], _LYCORIS if is_lycoris else _PLAIN, module)
    found = {place: read(name, args[name]) for name, (place, read) in _readers().items() if name in args}
    if any(name in args for name in _RATES):
        found["optimizer.block_lr"] = block_rates(args)
    return found | (_lycoris(given, args) if is_lycoris else {})


def idle(given: Values) -> dict[str, str]:
    """Return the options of a rank's size that LyCORIS' algorithm takes no notice of."""
    words = {word.replace(" ", "").lower() for word in given.get("network_args") or []}
    adapter = next((_ALGORITHMS.get(word.removeprefix("algo=")) for word in words if word.startswith("algo=")), None)
    names = _IDLE.get(adapter or "", ()) if given.get("network_module") == "lycoris.kohya" else ()
    return {name: f"with LyCORIS' {adapter}" for name in names if name in given}


def _args(words: list[str], known: set[str], module: str) -> dict[str, str]:
    args: dict[str, str] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name not in known:
            raise UserError(
                f"--network_args {word}: expected KEY=VALUE with a key of {module}: {', '.join(sorted(known))}."
            )
        args[name] = text
    return args


def _readers() -> dict[str, tuple[str, Callable[[str, str], Any]]]:
    numbers = {name: (place, _number(kind)) for name, (place, kind) in _NUMBERS.items()}
    return numbers | {name: (place, _numbers(kind)) for name, (place, kind) in _LISTS.items()}


def _number(kind: Callable[[str], Any]) -> Callable[[str, str], Any]:
    def read(name: str, text: str) -> Any:
        try:
            return kind(text)
        except ValueError as error:
            raise UserError(f"--network_args {name}={text}: expected a number.") from error

    return read


def _numbers(kind: Callable[[str], Any]) -> Callable[[str, str], list[Any]]:
    return lambda name, text: [_number(kind)(name, part) for part in text.split(",")]


# ---- rates of blocks ------------------------------------------------------------------------------------------------


def block_rates(args: Mapping[str, str]) -> list[float]:
    """Return the 25 factors that down_lr_weight, mid_lr_weight and up_lr_weight say; what is left out is 1.

    Each of the outer two is 12 numbers or the name of a curve, with what is to be added to it: `cosine+0.1`.

    Raises:
        UserError: another number of numbers, or no such curve.
    """
    read = _number(float)
    down, up = (_curve(name, args.get(name)) for name in ("down_lr_weight", "up_lr_weight"))
    middle = read("mid_lr_weight", args.get("mid_lr_weight", "1"))
    threshold = read("block_lr_zero_threshold", args.get("block_lr_zero_threshold", "0"))
    return [rate if rate > threshold else 0.0 for rate in (*down, middle, *up)]


def _curve(name: str, text: str | None) -> list[float]:
    if text is None:
        return [1.0] * _BLOCKS
    curve, _, base = text.partition("+")
    places = [i / (_BLOCKS - 1) for i in range(_BLOCKS)]  # from the first block to the last
    curves: dict[str, Callable[[float], float]] = {
        "cosine": lambda x: math.sin(math.pi / 2 * (1 - x)),
        "sine": lambda x: math.sin(math.pi / 2 * x),
        "linear": lambda x: x,
        "reverse_linear": lambda x: 1 - x,
        "zeros": lambda x: 0.0,
    }
    if curve in curves:
        added = _number(float)(name, base or "0")
        return [curves[curve](x) + added for x in places]
    rates = [_number(float)(name, part) for part in text.split(",")]
    if len(rates) != _BLOCKS:
        raise UserError(
            f"--network_args {name}={text}: expected {_BLOCKS} numbers with commas between them, or "
            f"{', '.join(curves)}, such as cosine+0.1."
        )
    return rates


# ---- LyCORIS --------------------------------------------------------------------------------------------------------


def _lycoris(given: Values, args: Mapping[str, str]) -> dict[str, Any]:
    algorithm, preset = args.get("algo", "lora").lower(), args.get("preset", "full")
    if algorithm not in _ALGORITHMS:
        raise UserError(
            f"--network_args algo={algorithm}: expected one of {', '.join(_ALGORITHMS)} (docs/adapters.md)."
        )
    if preset not in _PRESETS:
        raise UserError(f"--network_args preset={preset}: expected one of {', '.join(_PRESETS)}.")
    adapter, is_decomposed = _ALGORITHMS[algorithm], _is_true(args, "dora_wd") or _is_true(args, "weight_decompose")
    options = {option: args[name].lower() for name, option in _ADAPTER_OPTIONS.items() if name in args}
    if is_decomposed and adapter == "lora":
        adapter = "dora"
    elif is_decomposed:
        options["dora_wd"] = "true"
    if wanted := [name for name in _OFF if _is_true(args, name)]:
        raise UserError(f"--network_args {wanted[0]}={args[wanted[0]]}: this is not built here; leave it out.")
    if args.get("disable_conv_cp", "").lower() in ("false", "0"):
        options["use_tucker"] = "true"
    found: dict[str, Any] = {"network.adapter": adapter}
    if options:
        found["network.adapter_options"] = [f"{name}={text}" for name, text in options.items()]
    if _PRESETS[preset]:
        found["network.train"] = _PRESETS[preset]
    if "dropout" in args:
        found["network.neuron_dropout"] = _number(float)("dropout", args["dropout"])
    if "constraint" in args and adapter in ("oft", "boft"):
        found["network.alpha"] = _number(float)("constraint", args["constraint"]) or None
    if preset == "full" and "conv_dim" not in args and not given.get("network_train_text_encoder_only"):
        found["network.conv_rank"] = given.get("network_dim", 4)  # LyCORIS takes the same for convolutions
    if given.get("network_train_text_encoder_only") or preset != "full":
        found["network.conv_rank"] = found["network.conv_alpha"] = None
    return found


def _is_true(args: Mapping[str, str], name: str) -> bool:
    return args.get(name, "").lower() in ("true", "1", "yes")
