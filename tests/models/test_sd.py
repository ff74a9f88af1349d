"""Stable Diffusion loaded by us against diffusers' single-file loader, transformers' encoder and torch's attention."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from lorasmith import model_families
from lorasmith.checkpoint import open_checkpoint
from lorasmith.errors import UserError
from lorasmith.models import tokenizer
from lorasmith.models.base import LatentDiffusion
from lorasmith.models.keys import sd as keys
from tests.tiny import build_tiny, write_tiny

CPU = torch.device("cpu")
CAPTIONS = ["a photo of a cat", "", "Crème brûlée!! (best:1.2) " * 30]


def load(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> LatentDiffusion:
    with open_checkpoint(path) as checkpoint:
        return model_families.load(checkpoint, dtype=dtype, device=CPU, **options)


def same_weights(ours: nn.Module, theirs: nn.Module) -> bool:
    first, second = ours.state_dict(), theirs.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def same_models(first: LatentDiffusion, second: LatentDiffusion) -> bool:
    return all(
        same_weights(first.get_submodule(part), second.get_submodule(part))
        for part in ("denoiser", "text_encoder", "vae")
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: write_tiny(folder / f"{family}.safetensors", family) for family in ("sd1", "sd2")}


@pytest.fixture(scope="module")
def models(files: dict[str, Path]) -> dict[str, Any]:
    return {family: load(path) for family, path in files.items()}


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_weights_and_predictions_are_those_of_diffusers_own_loader(
    family: str, files: dict[str, Path], models: dict[str, Any], tmp_path: Path
) -> None:
    unet, vae, _ = build_tiny(family)
    unet.save_config(tmp_path / "unet")
    vae.save_config(tmp_path / "vae")
    oracle: Any = UNet2DConditionModel
    their_unet = oracle.from_single_file(str(files[family]), config=str(tmp_path), subfolder="unet")
    oracle = AutoencoderKL
    their_vae = oracle.from_single_file(str(files[family]), config=str(tmp_path), subfolder="vae")
    model = models[family]
    assert same_weights(model.denoiser, their_unet) and same_weights(model.vae, their_vae)
    generator = torch.Generator().manual_seed(0)
    x_t, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3, 800])
    text = torch.randn(2, 77, model.denoiser.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(model(x_t, t, {"text": text}), their_unet(x_t, t, text).sample)
        pixels = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
        mean, std = model.encode_image(pixels)
        posterior = their_vae.encode(pixels).latent_dist
        torch.testing.assert_close(mean, posterior.mean * 0.18215)
        torch.testing.assert_close(std, posterior.std * 0.18215)
        torch.testing.assert_close(model.decode(mean), their_vae.decode(posterior.mean).sample, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("clip_skip", [1, 2, 12])
def test_sd1_text_is_transformers_own_with_the_end_token_as_padding(clip_skip: int, files: dict[str, Path]) -> None:
    oracle = build_tiny("sd1")[2]
    ids = [tokenizer.build()(caption, add_special_tokens=False)["input_ids"][:75] for caption in CAPTIONS]
    padded = [[49406, *row, 49407, *[49407] * (75 - len(row))] for row in ids]
    with torch.no_grad():
        out = oracle(torch.tensor(padded), output_hidden_states=True)
        expected = oracle.final_layer_norm(out.hidden_states[-clip_skip])
        ours = load(files["sd1"], clip_skip=clip_skip).encode_text(CAPTIONS)["text"]
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_sd2_text_is_that_of_torchs_attention_on_the_files_own_tensors(clip_skip: int, files: dict[str, Path]) -> None:
    """OpenCLIP's forward written down once more, with the fused tensors as they are in the file."""
    tensors = {name.removeprefix(keys.OPENCLIP): tensor for name, tensor in load_file(files["sd2"]).items()}
    ids = [tokenizer.build()(caption, add_special_tokens=False)["input_ids"][:75] for caption in CAPTIONS]
    padded = torch.tensor([[49406, *row, 49407, *[0] * (75 - len(row))] for row in ids])
    x = tensors["token_embedding.weight"][padded] + tensors["positional_embedding"]
    width = x.shape[-1]

    def norm(x: Tensor, name: str) -> Tensor:
        return nn.functional.layer_norm(x, (width,), tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    attention = nn.MultiheadAttention(width, 16, batch_first=True).requires_grad_(False).eval()
    mask = nn.Transformer.generate_square_subsequent_mask(77)
    for n in range(24 - clip_skip):  # of the file's 24, the last of which SD2 never uses
        layer = f"transformer.resblocks.{n}"
        parts = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        attention.load_state_dict({part: tensors[f"{layer}.attn.{part}"] for part in parts})
        h = norm(x, f"{layer}.ln_1")
        x = x + attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        h = norm(x, f"{layer}.ln_2") @ tensors[f"{layer}.mlp.c_fc.weight"].T + tensors[f"{layer}.mlp.c_fc.bias"]
        x = x + nn.functional.gelu(h) @ tensors[f"{layer}.mlp.c_proj.weight"].T + tensors[f"{layer}.mlp.c_proj.bias"]
    with torch.no_grad():
        ours = load(files["sd2"], clip_skip=clip_skip).encode_text(CAPTIONS)["text"]
    torch.testing.assert_close(ours, norm(x, "ln_final"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_long_captions_are_encoded_in_chunks_that_do_not_cut_a_word(
    family: str, files: dict[str, Path], models: dict[str, Any]
) -> None:
    word = "antidisestablishmentarianism"
    (num_tokens,) = models[family].count_tokens([word])
    assert 1 < num_tokens < 20
    first, second = "cat " * 74, f"{word} dog"  # the word would begin in the first chunk's last place
    pieces = [models[family].encode_text([text])["text"] for text in (first, second, "")]
    for length, used in ((150, pieces[:2]), (225, pieces)):
        model: Any = load(files[family], max_token_length=length)
        with torch.no_grad():
            ours = model.encode_text([first + second, "a cat"])["text"]
        assert ours.shape[:2] == (2, length + 2)
        expected = torch.cat([used[0][:, :1], *(piece[:, 1:-1] for piece in used), used[-1][:, -1:]], dim=1)
        torch.testing.assert_close(ours[:1], expected)
        torch.testing.assert_close(ours[1:, :76], models[family].encode_text(["a cat"])["text"][:, :76])
    with torch.no_grad():
        torch.testing.assert_close(models[family].encode_text([first + second])["text"], pieces[0])


@pytest.mark.parametrize("length", [75, 150])
def test_weights_multiply_the_states_of_their_words_and_gradients_flow_through(
    files: dict[str, Path], length: int
) -> None:
    model: Any = load(files["sd1"], max_token_length=length, weighted_captions=True)
    plain: Any = load(files["sd1"], max_token_length=length)
    with torch.no_grad():
        ours = model.encode_text(["a (red cat:1.5) and [dog]", "no weights"])["text"]
        states = plain.encode_text(["a red cat and dog", "no weights"])["text"]
    factors = torch.ones(2, length + 2, 1)
    factors[0, 2:4], factors[0, 5] = 1.5, 1 / 1.1
    torch.testing.assert_close(ours, states * factors)
    weight = model.text_encoder.encoder.layers[0].mlp.fc1.weight.requires_grad_(True)
    model.encode_text(["(cat:0)"])["text"][:, 1].sum().backward()
    assert not weight.grad.any()
    model.encode_text(["(cat:2)"])["text"][:, 1].sum().backward()
    assert weight.grad.any()


def test_captions_that_lose_words_are_told(files: dict[str, Path]) -> None:
    texts = ["cat " * 75, "cat " * 76, "(cat:1.1) " * 75, "((cat:1.1)) " * 76, "cat " * 151]
    with open_checkpoint(files["sd1"]) as checkpoint:

        def cut(length: int, *, is_weighted: bool) -> set[int]:
            found = model_families.cut_captions(
                checkpoint, texts, max_token_length=length, weighted_captions=is_weighted
            )
            return {number for number, text in enumerate(texts) if text in found}

        assert cut(75, is_weighted=False) == {1, 2, 3, 4} and cut(75, is_weighted=True) == {1, 3, 4}
        assert cut(150, is_weighted=True) == {4} and cut(225, is_weighted=True) == set()


def test_tokens_are_counted_without_cutting(models: dict[str, Any]) -> None:
    assert models["sd1"].count_tokens(["a photo of a cat", "", "cat " * 90]) == [5, 0, 90]
    assert models["sd1"].count_tokens([]) == []


@pytest.mark.parametrize("family, count", [("sd1", 264), ("sd2", 330)])
def test_targets_are_the_models_layers_with_the_headers_shapes(
    family: str, count: int, files: dict[str, Path], models: dict[str, Any]
) -> None:
    with open_checkpoint(files[family]) as checkpoint:
        shapes = model_families.target_shapes(checkpoint)
    targets = models[family].adapter_targets()
    assert len(targets) == count
    assert {name: tuple(layer.weight.shape) for name, layer in targets.items()} == shapes
    assert {type(layer) for layer in targets.values()} == ({nn.Linear, nn.Conv2d} if family == "sd1" else {nn.Linear})


def test_everything_is_frozen_and_in_the_precision_asked_for_but_the_vae(files: dict[str, Path]) -> None:
    model = load(files["sd1"], torch.bfloat16)
    assert not any(p.requires_grad for p in model.parameters()) and not any(m.training for m in model.children())
    dtypes = {part: {p.dtype for p in module.parameters()} for part, module in model.named_children()}
    assert dtypes == {"denoiser": {torch.bfloat16}, "text_encoder": {torch.bfloat16}, "vae": {torch.float32}}
    prediction = model(torch.randn(1, 4, 8, 8), torch.tensor([5]), model.encode_text(["x"]))
    assert prediction.isfinite().all() and prediction.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("layout", ["ckpt", "diffusers"])
def test_a_ckpt_and_a_diffusers_folder_load_as_the_safetensors_file(
    family: str, layout: str, models: dict[str, Any], tmp_path: Path
) -> None:
    path = write_tiny(tmp_path / ("model" + (".ckpt" if layout == "ckpt" else "")), family, layout=layout)
    other = load(path)
    assert same_models(models[family], other)
    with torch.no_grad():
        x_t, t, cond = torch.ones(1, 4, 8, 8), torch.tensor([9]), other.encode_text(["a cat"])
        assert torch.equal(other(x_t, t, cond), models[family](x_t, t, cond))


def test_older_diffusers_folders_load_as_well(models: dict[str, Any], tmp_path: Path) -> None:
    """Of before the VAE's attention was renamed; and saved by a transformers without `text_model.`."""
    path = write_tiny(tmp_path / "folder", layout="diffusers")
    file = path / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for new, name in old.items():
        tensors = {key.replace(f".attentions.0.{new}.", f".attentions.0.{name}."): t for key, t in tensors.items()}
    save_file(tensors, file)
    file = path / "text_encoder" / "model.safetensors"
    save_file({name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}, file)
    assert same_models(models["sd1"], load(path))


def test_the_text_encoders_old_names_are_read(files: dict[str, Path], models: dict[str, Any], tmp_path: Path) -> None:
    tensors = {
        name.replace("transformer.text_model.", "transformer."): t for name, t in load_file(files["sd1"]).items()
    }
    save_file(tensors, tmp_path / "old.safetensors")
    assert same_models(models["sd1"], load(tmp_path / "old.safetensors"))


def test_the_moving_average_is_taken_where_it_is_asked_for_or_alone(files: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(files["sd1"])
    unet = [name for name in tensors if name.startswith(keys.UNET)]
    averages = {keys.ema_name(name): tensors[name] * 0.5 for name in unet}
    save_file({**tensors, **averages}, tmp_path / "both.safetensors")
    save_file({**{n: t for n, t in tensors.items() if n not in unet}, **averages}, tmp_path / "alone.safetensors")

    def first_weight(path: Path, *, ema: bool) -> Tensor:
        return load(path, ema=ema).get_parameter("denoiser.conv_in.weight")

    plain = tensors[keys.UNET + "input_blocks.0.0.weight"]
    assert torch.equal(first_weight(tmp_path / "both.safetensors", ema=False), plain)
    assert torch.equal(first_weight(tmp_path / "both.safetensors", ema=True), plain * 0.5)
    assert torch.equal(first_weight(tmp_path / "alone.safetensors", ema=False), plain * 0.5)
    assert torch.equal(first_weight(files["sd1"], ema=True), plain)


@pytest.mark.parametrize("kind", ["bare", "whole", "folder", "diffusers file"])
def test_another_vae_is_taken_from_any_kind_of_file(kind: str, files: dict[str, Path], tmp_path: Path) -> None:
    other = build_tiny("sd1", seed=1)[1]
    path = tmp_path / "vae.safetensors"
    if kind == "folder":
        path = tmp_path / "vae"
        other.save_pretrained(path)
    elif kind == "whole":
        write_tiny(path, seed=1)
        other = load(path).vae
    elif kind == "bare":
        tensors = load_file(write_tiny(tmp_path / "whole.safetensors", seed=1))
        own = {n.removeprefix(keys.VAE): t for n, t in tensors.items() if n.startswith(keys.VAE)}
        save_file({**own, "loss.logvar": torch.zeros(1)}, path)
        other = load(tmp_path / "whole.safetensors").vae
    else:
        save_file(other.state_dict(), path)
    model = load(files["sd1"], vae=str(path))
    assert same_weights(model.vae, other)
    assert same_weights(model.denoiser, load(files["sd1"]).denoiser)


def test_a_file_that_is_no_vae_is_refused_as_one(files: dict[str, Path], tmp_path: Path) -> None:
    save_file({"a.lora_down.weight": torch.ones(4, 4)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=r"lora.safetensors holds no VAE"):
        load(files["sd1"], vae=str(tmp_path / "lora.safetensors"))


def test_a_model_without_vae_asks_for_one(files: dict[str, Path], tmp_path: Path) -> None:
    tensors = {name: t for name, t in load_file(files["sd1"]).items() if not name.startswith(keys.VAE)}
    save_file(tensors, tmp_path / "pruned.safetensors")
    with pytest.raises(UserError, match="has no VAE in it; give one with --vae"):
        load(tmp_path / "pruned.safetensors")
    assert same_models(load(tmp_path / "pruned.safetensors", vae=str(files["sd1"])), load(files["sd1"]))


def test_miniatures_say_heads_groups_and_resolution_in_their_metadata(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "narrow.safetensors", width=16, resolution=128)
    with open_checkpoint(path) as checkpoint:
        assert model_families.describe(checkpoint).resolution == (128, 128)
    oracles: tuple[Any, Any, Any] = build_tiny("sd1", width=16)
    unet, vae, _ = oracles
    model: Any = load(path)
    x_t, t, text = torch.ones(1, 4, 8, 8), torch.tensor([9]), torch.ones(1, 77, 24)
    with torch.no_grad():
        assert torch.equal(model(x_t, t, {"text": text}), unet(x_t, t, text).sample)
        assert torch.equal(model.decode(x_t), vae.decode(x_t / 0.18215).sample)


def test_a_miniature_whose_metadata_are_lost_is_told_from_a_bug(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"16 channels, .* the 32 groups .*lorasmith.architecture.*, which a .ckpt"):
        load(write_tiny(tmp_path / "narrow.ckpt", width=16, layout="ckpt"))


@pytest.mark.parametrize(
    "change, message",
    [
        ("missing", r"U-Net's tensors are not those of Stable Diffusion; 1 missing: conv_out.bias"),
        ("unexpected", r"U-Net's .* 1 unexpected: model.diffusion_model.label_thing.weight"),
        ("shape", r"VAE's .* 1 of another shape: encoder.conv_out.bias is \(3,\), expected \(8,\)"),
        ("layer", r"text encoder's .* 1 unexpected: .*encoder.layers.12"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(change: str, message: str, files: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(files["sd1"])
    if change == "missing":
        del tensors[keys.UNET + "out.2.bias"]
    elif change == "unexpected":
        tensors[keys.UNET + "label_thing.weight"] = torch.ones(2)
    elif change == "layer":
        tensors[keys.CLIP + "encoder.layers.12.mlp.fc1.bias"] = torch.ones(2)
    else:
        tensors[keys.VAE + "encoder.conv_out.bias"] = torch.ones(3)
    save_file(tensors, tmp_path / "broken.safetensors")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "broken.safetensors")


def test_clip_skip_beyond_the_layers_is_refused(files: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"clip skip 13; Stable Diffusion 1\.x has 12 text layers, give 1 to 12"):
        load(files["sd1"], clip_skip=13)


def test_a_folders_text_encoder_is_what_transformers_reads_from_it(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "folder", layout="diffusers")
    assert same_weights(load(path).text_encoder, CLIPTextModel.from_pretrained(path / "text_encoder"))


def test_prompts_of_any_length_and_a_new_chunk_at_BREAK(files: dict[str, Path], models: dict[str, Any]) -> None:
    """Chunks are what the encoder makes of each alone, with the first start and the last end; weights span them."""
    model: Any = load(files["sd1"], max_token_length=None, weighted_captions=True)
    longer: Any = load(files["sd1"], max_token_length=225, weighted_captions=True)
    long = "a (red:1.2) cat and " * 50  # 200 tokens
    with torch.no_grad():
        assert model.encode_text(["a cat"])["text"].shape[1] == 77
        torch.testing.assert_close(model.encode_text([long])["text"], longer.encode_text([long])["text"])
        torch.testing.assert_close(
            model.encode_text(["a cat", long])["text"], longer.encode_text(["a cat", long])["text"]
        )
        both = model.encode_text(["(a cat BREAK a dog:1.5) there BREAKS"])["text"]
        first, second = (models["sd1"].encode_text([text])["text"] for text in ("a cat", "a dog there breaks"))
    first[:, 1:3] *= 1.5
    second[:, 1:3] *= 1.5
    torch.testing.assert_close(both, torch.cat([first[:, :-1], second[:, 1:]], dim=1))
    assert model.encode_text(["a cat " * 300])["text"].shape[1] == 8 * 75 + 2
