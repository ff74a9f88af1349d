"""The names and full-size shapes that a LoRA file of each family must have, as sd-scripts writes them."""

import ast
from pathlib import Path

_FOLDER = Path(__file__).parents[1] / "golden"


def tensor_shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Return key -> shape of every tensor of a rank-4 LoRA file of `sd1` or `sd2`."""
    lines = (_FOLDER / f"lora_tensors_{family}.txt").read_text(encoding="utf-8").splitlines()
    rows = (line.split("\t") for line in lines if not line.startswith("#"))
    return {key: ast.literal_eval(shape) for key, shape in rows}


def layer_shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Return saved name -> shape of the layer's weight."""
    shapes = tensor_shapes(family)
    downs = [key for key in shapes if key.endswith(".lora_down.weight")]
    names = [key.partition(".")[0] for key in downs]
    return {n: (shapes[f"{n}.lora_up.weight"][0], *shapes[f"{n}.lora_down.weight"][1:]) for n in names}
