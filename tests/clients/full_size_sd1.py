"""A random Stable Diffusion v1 of full size in the original single-file layout, for clients that take no miniature.

Names and shapes are written out from CompVis' v1-inference.yaml, not from our own key tables, so that the clients'
tests do not share a mistake with them.
"""

from pathlib import Path

import safetensors.torch
import torch

Shapes = dict[str, tuple[int, ...]]

NUM_KEYS = 1131  # of v1-5-pruned-emaonly


def _layer(name: str, *shape: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": shape, **({f"{name}.bias": shape[:1]} if bias else {})}


def _conv(name: str, num_in: int, num_out: int, kernel: int = 3) -> Shapes:
    return _layer(name, num_out, num_in, kernel, kernel)


def _unet_resnet(name: str, num_in: int, num_out: int) -> Shapes:
    return {
        **_layer(f"{name}.in_layers.0", num_in),
        **_conv(f"{name}.in_layers.2", num_in, num_out),
        **_layer(f"{name}.emb_layers.1", num_out, 1280),
        **_layer(f"{name}.out_layers.0", num_out),
        **_conv(f"{name}.out_layers.3", num_out, num_out),
        **(_conv(f"{name}.skip_connection", num_in, num_out, 1) if num_in != num_out else {}),
    }


def _transformer(name: str, width: int) -> Shapes:
    block = f"{name}.transformer_blocks.0"
    shapes = {**_layer(f"{name}.norm", width), **_conv(f"{name}.proj_in", width, width, 1)}
    for attention, num_in in (("attn1", width), ("attn2", 768)):
        shapes |= _layer(f"{block}.{attention}.to_q", width, width, bias=False)
        shapes |= _layer(f"{block}.{attention}.to_k", width, num_in, bias=False)
        shapes |= _layer(f"{block}.{attention}.to_v", width, num_in, bias=False)
        shapes |= _layer(f"{block}.{attention}.to_out.0", width, width)
    shapes |= _layer(f"{block}.ff.net.0.proj", 8 * width, width) | _layer(f"{block}.ff.net.2", width, 4 * width)
    for norm in ("norm1", "norm2", "norm3"):
        shapes |= _layer(f"{block}.{norm}", width)
    return shapes | _conv(f"{name}.proj_out", width, width, 1)


def _unet() -> Shapes:
    widths = (320, 640, 1280, 1280)
    shapes = {**_layer("time_embed.0", 1280, 320), **_layer("time_embed.2", 1280, 1280)}
    shapes |= _conv("input_blocks.0.0", 4, 320)
    skips, index, current = [320], 1, 320
    for level, width in enumerate(widths):
        for _ in range(2):
            shapes |= _unet_resnet(f"input_blocks.{index}.0", current, width)
            if level < 3:
                shapes |= _transformer(f"input_blocks.{index}.1", width)
            current, index = width, index + 1
            skips.append(width)
        if level < 3:
            shapes |= _conv(f"input_blocks.{index}.0.op", width, width)
            index += 1
            skips.append(width)
    shapes |= _unet_resnet("middle_block.0", 1280, 1280) | _transformer("middle_block.1", 1280)
    shapes |= _unet_resnet("middle_block.2", 1280, 1280)
    for index in range(12):
        level = 3 - index // 3
        shapes |= _unet_resnet(f"output_blocks.{index}.0", current + skips.pop(), widths[level])
        current = widths[level]
        if level < 3:
            shapes |= _transformer(f"output_blocks.{index}.1", current)
        if level > 0 and index % 3 == 2:
            shapes |= _conv(f"output_blocks.{index}.{1 if level == 3 else 2}.conv", current, current)
    return shapes | _layer("out.0", 320) | _conv("out.2", 320, 4)


def _vae_resnet(name: str, num_in: int, num_out: int) -> Shapes:
    return {
        **_layer(f"{name}.norm1", num_in),
        **_conv(f"{name}.conv1", num_in, num_out),
        **_layer(f"{name}.norm2", num_out),
        **_conv(f"{name}.conv2", num_out, num_out),
        **(_conv(f"{name}.nin_shortcut", num_in, num_out, 1) if num_in != num_out else {}),
    }


def _vae_middle(name: str) -> Shapes:
    shapes = _vae_resnet(f"{name}.block_1", 512, 512) | _vae_resnet(f"{name}.block_2", 512, 512)
    shapes |= _layer(f"{name}.attn_1.norm", 512)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= _conv(f"{name}.attn_1.{part}", 512, 512, 1)
    return shapes


def _vae() -> Shapes:
    widths = (128, 256, 512, 512)
    shapes = _conv("encoder.conv_in", 3, 128) | _vae_middle("encoder.mid")
    current = 128
    for level, width in enumerate(widths):
        for block in range(2):
            shapes |= _vae_resnet(f"encoder.down.{level}.block.{block}", current, width)
            current = width
        if level < 3:
            shapes |= _conv(f"encoder.down.{level}.downsample.conv", width, width)
    shapes |= _layer("encoder.norm_out", 512) | _conv("encoder.conv_out", 512, 8)
    shapes |= _conv("decoder.conv_in", 4, 512) | _vae_middle("decoder.mid")
    for level, width in reversed(list(enumerate(widths))):
        for block in range(3):
            shapes |= _vae_resnet(f"decoder.up.{level}.block.{block}", current, width)
            current = width
        if level > 0:
            shapes |= _conv(f"decoder.up.{level}.upsample.conv", width, width)
    shapes |= _layer("decoder.norm_out", 128) | _conv("decoder.conv_out", 128, 3)
    return shapes | _conv("quant_conv", 8, 8, 1) | _conv("post_quant_conv", 4, 4, 1)


def _text_encoder() -> Shapes:
    shapes: Shapes = {
        "embeddings.token_embedding.weight": (49408, 768),
        "embeddings.position_embedding.weight": (77, 768),
        **_layer("final_layer_norm", 768),
    }
    for index in range(12):
        layer = f"encoder.layers.{index}"
        for part in ("q", "k", "v", "out"):
            shapes |= _layer(f"{layer}.self_attn.{part}_proj", 768, 768)
        shapes |= _layer(f"{layer}.mlp.fc1", 3072, 768) | _layer(f"{layer}.mlp.fc2", 768, 3072)
        shapes |= _layer(f"{layer}.layer_norm1", 768) | _layer(f"{layer}.layer_norm2", 768)
    return shapes


def shapes() -> Shapes:
    """Return name -> shape of every floating-point tensor of the file."""
    parts = {
        "model.diffusion_model.": _unet(),
        "first_stage_model.": _vae(),
        "cond_stage_model.transformer.text_model.": _text_encoder(),
    }
    return {f"{prefix}{name}": shape for prefix, part in parts.items() for name, shape in part.items()}


def write(path: Path) -> None:
    """Write the checkpoint, 2.1 GB of fp16: weights as torch draws them, norms that change nothing."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    for name, shape in shapes().items():
        if len(shape) == 1:
            tensors[name] = torch.full(shape, float(name.endswith("weight")), dtype=torch.float16)
        else:
            fan_in = torch.Size(shape[1:]).numel()
            tensors[name] = (torch.randn(shape, generator=generator) * fan_in**-0.5).half()
    assert len(tensors) == NUM_KEYS
    safetensors.torch.save_file(tensors, path)
