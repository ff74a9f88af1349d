"""Stable Diffusion in miniature for tests: random weights, narrow, but with every tensor that the real files have."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from lorasmith.models.keys import sd as keys

_TEXT_WIDTH = {"sd1": 24, "sd2": 32}  # widths that the families' own numbers of heads, 12 and 16, divide
_SCHEDULER = {
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1,
    "clip_sample": False,
}  # fmt: skip


def write_tiny(
    path: Path,
    family: str = "sd1",
    *,
    layout: str = "safetensors",
    prediction: str | None = None,
    seed: int = 0,
    width: int = 32,
    resolution: int | None = None,
    dtype: torch.dtype = torch.float32,
    is_inpainting: bool = False,
) -> Path:
    """Write a random model and return its path.

    Args:
        layout: `safetensors` or `ckpt` (original single files), or `diffusers` (a folder).
        prediction: what the file says that it predicts; None: it does not say.
        width: channels of the first level, a multiple of 8. Below 32 there are fewer norm groups than 32, which a ckpt
            cannot say.
        resolution: native pixels on a side, where the file says so.
    """
    unet, vae, text = build_tiny(
        family, seed=seed, width=width, resolution=resolution or 64, is_inpainting=is_inpainting
    )
    if layout == "diffusers":
        write_folder(path, unet, vae, text, prediction)
        return path
    tensors = keys.to_ldm(*(part.state_dict() for part in (unet, vae, text)), kept=openclip_rest(family))
    tensors = {name: _stored(tensor, dtype) for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    if layout == "ckpt":
        torch.save({"epoch": 1, "global_step": 2, "state_dict": tensors}, path)
    else:
        save_file(tensors, path, _metadata(family, width, prediction, resolution))
    return path


def build_tiny(
    family: str = "sd1", *, seed: int = 0, width: int = 32, resolution: int = 64, is_inpainting: bool = False
) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """Return the U-Net, VAE and text encoder of a random model."""
    widths = (width, 2 * width, 3 * width, 3 * width)
    unet, vae, text = make_empty(
        family, widths, widths, _TEXT_WIDTH[family], min(32, width), resolution, inputs=9 if is_inpainting else 4
    )
    generator = torch.Generator().manual_seed(seed)
    for part in (unet, vae, text):
        _fill(part, generator)
    text.embeddings.register_buffer("position_ids", torch.arange(77)[None], persistent=False)
    return unet, vae, text


def build_tiny_control(family: str = "sd1", *, seed: int = 1, width: int = 32) -> ControlNetModel:
    """Return a random ControlNet for the random model of this family and width."""
    make: Any = ControlNetModel.from_unet
    control = make(build_tiny(family, width=width)[0]).requires_grad_(False).eval()
    _fill(control, torch.Generator().manual_seed(seed))
    return control


def make_empty(
    family: str,
    widths: tuple[int, ...],
    vae_widths: tuple[int, ...],
    text_width: int,
    groups: int = 32,
    resolution: int = 512,
    inputs: int = 4,
) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """Return U-Net, VAE and text encoder of Stable Diffusion's structure and these widths, on the meta device."""
    make_unet: Any = UNet2DConditionModel
    make_vae: Any = AutoencoderKL
    make_config: Any = CLIPTextConfig
    with torch.device("meta"):
        unet = make_unet(
            sample_size=resolution // 8, in_channels=inputs, out_channels=4, block_out_channels=widths,
            layers_per_block=2,
            down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
            up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
            cross_attention_dim=text_width, norm_num_groups=groups, use_linear_projection=family == "sd2",
            attention_head_dim=8 if family == "sd1" else [max(1, w // 64) for w in widths],
            upcast_attention=family == "sd2",
        )  # fmt: skip
        vae = make_vae(
            in_channels=3, out_channels=3, block_out_channels=vae_widths, layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=groups, sample_size=resolution,
        )  # fmt: skip
        text = CLIPTextModel(
            make_config(
                vocab_size=49408, hidden_size=text_width, intermediate_size=4 * text_width,
                num_hidden_layers=12 if family == "sd1" else 23, num_attention_heads=12 if family == "sd1" else 16,
                max_position_embeddings=77, hidden_act="quick_gelu" if family == "sd1" else "gelu",
                bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
            )
        )  # fmt: skip
    return unet.requires_grad_(False).eval(), vae.requires_grad_(False).eval(), text.requires_grad_(False).eval()


def openclip_rest(family: str) -> dict[str, Tensor]:
    """Return what SD2 files hold that no module uses: OpenCLIP's last layer and its projection."""
    if family == "sd1":
        return {}
    width, layer = _TEXT_WIDTH["sd2"], f"{keys.OPENCLIP}transformer.resblocks.23."
    shapes = {
        "ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,), "ln_2.bias": (width,),
        "attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,),
    }  # fmt: skip
    rest = {layer + name: torch.ones(shape) for name, shape in shapes.items()}
    rest[f"{keys.OPENCLIP}text_projection"] = torch.eye(width)
    rest[f"{keys.OPENCLIP}logit_scale"] = torch.tensor(4.6)
    return rest


def _fill(part: nn.Module, generator: torch.Generator) -> None:
    """Put random weights into a module on the meta device, scaled so that nothing grows from layer to layer."""
    part.to_empty(device="cpu")
    for name, tensor in part.named_parameters():
        tensor.normal_(generator=generator)
        if "embedding.weight" in name:
            tensor.mul_(0.3)
        elif tensor.dim() > 1:
            tensor.mul_(tensor[0].numel() ** -0.5)
        else:
            tensor.mul_(0.05).add_(1.0 if name.endswith("weight") else 0.0)


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()


def _metadata(family: str, width: int, prediction: str | None, resolution: int | None) -> dict[str, str]:
    metadata = {"format": "pt"}
    details: dict[str, Any] = {}
    if width < 32:
        details = {"unet_norm_groups": width, "vae_norm_groups": width}
    if resolution is not None:
        details["resolution"] = resolution
    if details:
        metadata["lorasmith.architecture"] = json.dumps(details)
    if prediction is not None:
        metadata["modelspec.prediction_type"] = {"v_prediction": "v"}.get(prediction, prediction)
    return metadata


def write_folder(path: Path, unet: Any, vae: Any, text: Any, prediction: str | None) -> None:
    """Write the diffusers layout with the text encoder's names as the hub has them, below `text_model.`."""
    unet.save_pretrained(path / "unet")
    vae.save_pretrained(path / "vae")
    text.config.save_pretrained(path / "text_encoder")
    tensors = {f"text_model.{name}": tensor.contiguous() for name, tensor in text.state_dict().items()}
    save_file(tensors, path / "text_encoder" / "model.safetensors", {"format": "pt"})
    (path / "scheduler").mkdir()
    scheduler = _SCHEDULER | ({} if prediction is None else {"prediction_type": prediction})
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "scheduler": ["diffusers", "PNDMScheduler"],
    }
    (path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **parts}))
