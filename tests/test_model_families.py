"""What a header tells of a checkpoint, and what is said to those who give something else."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasmith import model_families
from lorasmith.checkpoint import open_checkpoint
from lorasmith.errors import UserError
from lorasmith.model_families import ModelFacts
from lorasmith.models.keys import sd as keys
from tests.tiny import write_tiny


def describe(path: Path, *, v2: bool | None = None, prediction: str | None = None) -> ModelFacts:
    with open_checkpoint(path) as checkpoint:
        return model_families.describe(checkpoint, v2=v2, prediction=prediction)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: write_tiny(folder / f"{family}.safetensors", family) for family in ("sd1", "sd2")}


def test_sd1_is_described(files: dict[str, Path]) -> None:
    facts = describe(files["sd1"])
    assert (facts.family, facts.title, facts.prediction, facts.notes) == ("sd1", "Stable Diffusion 1.x", "epsilon", [])
    assert (facts.resolution, facts.is_v2, facts.width, facts.text_width) == ((512, 512), False, 32, 24)
    assert (facts.base_model_version, facts.architecture) == ("sd_v1", "stable-diffusion-v1")


@pytest.mark.parametrize(
    "prediction, expected",
    [
        ("v_prediction", ((768, 768), "sd_v2_v", "stable-diffusion-v2-768-v")),
        ("epsilon", ((512, 512), "sd_v2", "stable-diffusion-v2-512")),
    ],
)
def test_sd2_is_described_by_what_it_predicts(
    prediction: str, expected: tuple[tuple[int, int], str, str], files: dict[str, Path]
) -> None:
    facts = describe(files["sd2"], prediction=prediction)
    assert (facts.family, facts.is_v2, facts.prediction, facts.notes) == ("sd2", True, prediction, [])
    assert (facts.resolution, facts.base_model_version, facts.architecture) == expected


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("layout", ["safetensors", "diffusers"])
def test_what_a_file_or_folder_says_of_its_prediction_is_believed(
    prediction: str, family: str, layout: str, tmp_path: Path
) -> None:
    path = write_tiny(tmp_path / "model.safetensors", family, layout=layout, prediction=prediction)
    facts = describe(path)
    assert (facts.prediction, facts.notes) == (prediction, [])


def test_sd2_that_does_not_say_is_told_by_its_name_or_assumed_with_a_note(files: dict[str, Path]) -> None:
    [note] = describe(files["sd2"]).notes
    assert describe(files["sd2"]).prediction == "v_prediction" and "--prediction epsilon" in note
    named = files["sd2"].rename(files["sd2"].with_name("v2-1_768-ema-pruned.safetensors"))
    facts = describe(named)
    named.rename(files["sd2"])
    assert (facts.prediction, facts.notes) == ("v_prediction", [])


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_weights_are_counted_by_part(family: str, files: dict[str, Path]) -> None:
    tensors = load_file(files[family])
    facts = describe(files[family])
    starts = {"denoiser": keys.UNET, "vae": keys.VAE}
    for part, start in starts.items():
        assert facts.num_values[part] == sum(t.numel() for name, t in tensors.items() if name.startswith(start))
    text = {
        name: t.numel()
        for name, t in tensors.items()
        if name.startswith("cond_stage_model.")
        and not any(part in name for part in ("position_ids", "resblocks.23", "text_projection", "logit_scale"))
    }
    assert facts.num_values["text_encoder"] == sum(text.values())


@pytest.mark.parametrize("family, v2, real, said", [("sd1", True, "1.x", "2.x"), ("sd2", False, "2.x", "1.x")])
def test_contradicting_the_file_is_an_error(
    family: str, v2: bool, real: str, said: str, files: dict[str, Path]
) -> None:
    with pytest.raises(UserError, match=rf"{family}.safetensors is Stable Diffusion {real} .* says .* {said}"):
        describe(files[family], v2=v2)
    assert describe(files[family], v2=not v2).family == family


def some(*names: str, shape: tuple[int, ...] = (2, 2)) -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name in names}


SDXL = some(
    "model.diffusion_model.input_blocks.4.1.proj_in.weight",
    "model.diffusion_model.label_emb.0.0.weight",
    "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
    "conditioner.embedders.1.model.token_embedding.weight",
    "first_stage_model.encoder.conv_in.weight",
)
OTHERS: dict[str, tuple[dict[str, Tensor], str]] = {
    "sdxl": (SDXL, "not supported yet: this is SDXL. Expected Stable Diffusion 1.x or 2.x"),
    "sd3": (
        some("model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"),
        "not supported yet: this is SD3",
    ),
    "flux": (some("double_blocks.0.img_attn.qkv.weight", "img_in.weight"), "not supported yet: this is FLUX"),
    "lora": (
        some("lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"),
        "is a LoRA, not a base model.*--weights",
    ),
    "peft": (some("unet.x.to_q.lora_A.weight"), "is a LoRA, not a base model"),
    "colon": (some("unet:0:up", "unet:0:down"), "is a LoRA, not a base model.*cloneofsimo"),
    "vae": (some("encoder.conv_in.weight", "decoder.conv_in.weight"), "is a VAE alone, not a base model.*--vae"),
    "whole vae": (some("first_stage_model.encoder.conv_in.weight"), "is a VAE alone, not a base model"),
    "embedding": (some("emb_params", shape=(3, 768)), "is a textual inversion embedding, not a base model"),
    "kohya embedding": (some("<sks>", shape=(768,)), "is a textual inversion embedding, not a base model"),
    "controlnet": (some("control_model.input_blocks.0.0.weight"), "not supported yet: this is a ControlNet"),
    "unet": (some("input_blocks.0.0.weight", "out.2.weight"), "has a U-Net but no text encoder"),
    "text": (some("text_model.embeddings.token_embedding.weight"), "is a text encoder alone, not a base model"),
    "other": (some("layer1.weight", "layer2.weight"), "found 2 tensors named like layer1.weight, layer2.weight"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_anything_else_is_named_for_what_it_is(kind: str, tmp_path: Path) -> None:
    tensors, message = OTHERS[kind]
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path / "model.safetensors") as checkpoint:
        for ask in (
            lambda: model_families.describe(checkpoint),
            lambda: model_families.target_shapes(checkpoint),
            lambda: model_families.load(checkpoint, dtype=torch.float32, device=torch.device("cpu")),
        ):
            with pytest.raises(UserError, match=f"model.safetensors .*{message}"):
                ask()


def _changed(path: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, target)
    return target


def test_an_inpainting_model_is_refused_by_name(files: dict[str, Path], tmp_path: Path) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        tensors[keys.UNET + "input_blocks.0.0.weight"] = torch.zeros(32, 9, 3, 3)

    path = _changed(files["sd1"], tmp_path / "inpaint.safetensors", widen)
    with pytest.raises(UserError, match=r"this is an inpainting model \(9 input channels\)"):
        describe(path)


def test_a_layer_to_train_that_is_missing_is_found_in_the_header(files: dict[str, Path], tmp_path: Path) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        del tensors[keys.UNET + "output_blocks.11.1.proj_out.weight"]

    path = _changed(files["sd1"], tmp_path / "cut.safetensors", cut)
    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(UserError, match=r"1 missing: up_blocks.3.attentions.2.proj_out.weight"),
    ):
        model_families.target_shapes(checkpoint)
