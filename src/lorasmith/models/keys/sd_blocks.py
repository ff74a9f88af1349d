"""Blocks of Stable Diffusion 1 and 2 as people who weight them call them, and the lists of weights that are in use.

BASE is the text encoder, IN, M and OUT count the original U-Net's input, middle and output blocks. The lists of 12, 17
and 26 numbers are those of hako-mikan's LoRA Block Weight for A1111 and of sd-scripts (networks/svd_merge_lora.py);
that of 25 is sd-scripts' `block_dims`, which has no text encoder. The time embedding and the output layers are in no
block, and are never weighted.
"""

import re

_INPUT = [f"IN{n:02}" for n in range(12)]
_OUTPUT = [f"OUT{n:02}" for n in range(12)]
BASE = "BASE"
NO_BLOCK = "none"

LISTS: dict[int, list[str]] = {
    12: [BASE, "IN04", "IN05", "IN07", "IN08", "M00", *_OUTPUT[:6]],
    17: [BASE, "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", *_OUTPUT[3:]],
    25: [*_INPUT, "M00", *_OUTPUT],
    26: [BASE, *_INPUT, "M00", *_OUTPUT],
}


def block_of(name: str) -> str:
    """Return the block of a U-Net tensor from its name in an original file."""
    found = re.search(r"(input_blocks|output_blocks)\.(\d+)", name)
    if found is None:
        return "M00" if "middle_block" in name else NO_BLOCK
    return f"{'IN' if found[1] == 'input_blocks' else 'OUT'}{int(found[2]):02}"


def weights_of(numbers: list[float]) -> dict[str, float]:
    """Return a list's weight for every block: 0 for those that it leaves out, but 1 for a text encoder left out.

    What is in no block has 1, as in LoRA Block Weight.

    Raises:
        ValueError: no list in use has so many numbers.
    """
    if len(numbers) not in LISTS:
        raise ValueError(f"{len(numbers)} block weights; give 12, 17, 25 or 26 (docs/merge.md says for which blocks)")
    given = dict(zip(LISTS[len(numbers)], numbers, strict=True))
    return {**dict.fromkeys(LISTS[26], 0.0), BASE: 1.0, NO_BLOCK: 1.0, **given}
