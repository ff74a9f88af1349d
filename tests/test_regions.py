"""LoRAs in regions: layer by layer, exactly the LoRA where its mask is white and exactly the base where it is black."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from lorasmith import merging, model_families
from lorasmith.checkpoint import open_checkpoint
from lorasmith.merging import Addition, Strength
from lorasmith.models.base import LatentDiffusion
from lorasmith.regions import Regions
from tests.random_lora import make_lora, write_lora
from tests.tiny import write_tiny

BLOCK = "lora_unet_down_blocks_1_attentions_0"
LINEAR, CONV = f"{BLOCK}_transformer_blocks_0_attn1_to_q", f"{BLOCK}_proj_in"
KEYS, TEXT = f"{BLOCK}_transformer_blocks_0_attn2_to_k", "lora_te_text_model_encoder_layers_11_mlp_fc1"
X_T = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
T = torch.tensor([500, 300])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "mini.safetensors", resolution=64)


@pytest.fixture(scope="module")
def model(base: Path) -> Iterator[LatentDiffusion]:
    with open_checkpoint(base) as checkpoint:
        yield model_families.load(checkpoint, dtype=torch.float32, device=torch.device("cpu"))


def lora(base: Path, folder: Path, name: str, seed: int = 1) -> Addition:
    with open_checkpoint(base) as checkpoint:
        family, places, _ = model_families.adapter_places(checkpoint)
        tensors = make_lora({name: places[name].shape}, seed=seed)
    write_lora(folder / f"{name}{seed}.safetensors", {key: 5 * tensor for key, tensor in tensors.items()})
    return merging.plan(folder / f"{name}{seed}.safetensors", family, places, Strength())


@contextmanager
def seen(layer: torch.nn.Module) -> Iterator[list[Any]]:
    """What the layer gives, the LoRAs' changes included."""
    found: list[Any] = []
    handle = layer.register_forward_hook(lambda _layer, _args, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()


@torch.no_grad()
def outputs(model: LatentDiffusion, additions: list[Addition], masks: list[Image.Image] | None, layer: str) -> Tensor:
    """Return what a layer, or the whole model (""), gives in one step."""
    regions = None if masks is None else Regions(masks)
    with (
        merging.applied(model, additions, is_folded=False, regions=regions),
        seen(model.denoiser.get_submodule(layer)) as found,
    ):
        whole = model(X_T, T, model.encode_text(["a cat", "a dog"]))
    return found[-1] if layer else whole


def half() -> Image.Image:
    """White on the left."""
    mask = Image.new("L", (96, 64))
    mask.paste(255, (0, 0, 48, 64))
    return mask


@pytest.mark.parametrize("name", [LINEAR, CONV, KEYS, TEXT])
def test_white_is_the_lora_and_black_is_the_base_bit_for_bit(
    name: str, model: LatentDiffusion, base: Path, tmp_path: Path
) -> None:
    one = lora(base, tmp_path, name)
    white, black = (outputs(model, [one], [Image.new("L", (96, 64), level)], "") for level in (255, 0))
    plain, whole, mixed = (
        outputs(model, [], None, ""),
        outputs(model, [one], None, ""),
        outputs(model, [one], [half()], ""),
    )
    assert torch.equal(white, whole) and torch.equal(black, plain) and not torch.equal(plain, whole)
    assert not torch.equal(mixed, plain) and not torch.equal(mixed, whole)


@pytest.mark.parametrize(
    "name, layer",
    [
        (LINEAR, "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"),
        (CONV, "down_blocks.1.attentions.0.proj_in"),
        (KEYS, "down_blocks.1.attentions.0.transformer_blocks.0.attn2"),
        (TEXT, "down_blocks.0.attentions.0.transformer_blocks.0.attn2"),
    ],
)
def test_in_the_layer_itself_nothing_else_changes(
    name: str, layer: str, model: LatentDiffusion, base: Path, tmp_path: Path
) -> None:
    """The first layer that differs gives what the LoRA does left of the mask's edge, right of it what the base does."""
    one = lora(base, tmp_path, name)
    plain, whole, mixed = (
        outputs(model, used, masks, layer) for used, masks in (([], None), ([one], None), ([one], [half()]))
    )
    if plain.dim() == 3:
        size = (8, 12) if "down_blocks.0" in layer else (4, 6)
        plain, whole, mixed = (one.transpose(1, 2).unflatten(2, size) for one in (plain, whole, mixed))
    middle = plain.shape[-1] // 2
    assert torch.equal(mixed[..., :middle], whole[..., :middle]) and torch.equal(
        mixed[..., middle:], plain[..., middle:]
    )
    assert not torch.equal(plain[..., :middle], whole[..., :middle])


def test_afterwards_the_model_is_what_it_was(model: LatentDiffusion, base: Path, tmp_path: Path) -> None:
    before = outputs(model, [], None, "")
    two = [lora(base, tmp_path, TEXT), lora(base, tmp_path, LINEAR, seed=2)]
    outputs(model, two, [half(), half()], "")
    assert torch.equal(outputs(model, [], None, ""), before)
    assert "encode_text" not in vars(model) and model.encode_text(["a cat"])["text"].shape[1] == 77


def test_loras_side_by_side_act_each_in_its_own_half(model: LatentDiffusion, base: Path, tmp_path: Path) -> None:
    layer, right = (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
        half().transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    )
    one, other = lora(base, tmp_path, TEXT), lora(base, tmp_path, TEXT, seed=2)
    both = outputs(model, [one, other], [half(), right], layer).unflatten(1, (8, 12))
    for addition, columns in ((one, slice(0, 6)), (other, slice(6, 12))):
        alone = outputs(model, [addition], None, layer).unflatten(1, (8, 12))
        assert torch.equal(both[:, :, columns], alone[:, :, columns])


def test_timesteps_have_no_place_so_the_masks_mean_counts(model: LatentDiffusion, base: Path, tmp_path: Path) -> None:
    one, layer = lora(base, tmp_path, "lora_unet_time_embedding_linear_1"), "time_embedding.linear_1"
    plain, whole, mixed = (outputs(model, *used, layer) for used in (([], None), ([one], None), ([one], [half()])))
    torch.testing.assert_close(mixed, (plain + whole) / 2)
    assert not torch.equal(plain, whole)
