"""Where a model computes, and in which precision."""

import torch

from lorasmith.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> str:
    """Return the device that `auto` means here, or `name` itself."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(name: str) -> None:
    """Refuse a device that is not here.

    Raises:
        UserError: lists those that are.
    """
    here = ["auto", "cpu", *(["mps"] if torch.backends.mps.is_available() else [])]
    if torch.cuda.is_available():
        here += ["cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if name not in here:
        raise UserError(f"--device {name}: not here; on this computer there are {', '.join(here)}.")


def choose_precision(name: str, device: torch.device) -> str:
    """Return the precision that `auto` means on this device.

    Raises:
        UserError: fp16 without a GPU.
    """
    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU, and this runs on the CPU; use bf16 or fp32.")
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
