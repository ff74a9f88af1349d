"""kohya files: what we write, what we read of what others write, and what we refuse."""

import hashlib
import json
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lorasmith.errors import UserError
from lorasmith.formats import kohya
from lorasmith.network import Network, Rule

TE = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
TO_K = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
PROJ = "lora_unet_mid_block_attentions_0_proj_in"
META = {"ss_network_dim": "4", "ss_output_name": "ünicode", "modelspec.title": "t"}


def make_tensors(width: int = 768) -> dict[str, Tensor]:
    targets = {PROJ: nn.Conv2d(32, 32, 1), TO_K: nn.Linear(width, 32), TE: nn.Linear(width, width)}
    network = Network.create(targets, [Rule(rank=4, alpha=2.5)], seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return {key: value.detach() for key, value in network.state_dict().items()}


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write a foreign file, with nobody's help."""
    safetensors.torch.save_file(
        {key: value.clone().contiguous() for key, value in tensors.items()}, str(path), metadata
    )
    return path


@pytest.mark.parametrize("precision", kohya.PRECISIONS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_a_written_file_reads_back(tmp_path: Path, precision: str, suffix: str) -> None:
    tensors, path = make_tensors(), tmp_path / f"last{suffix}"
    kohya.write(path, tensors, META, precision=precision)
    file = kohya.read(path)
    assert file.family == "sd1"
    assert file.tensors.keys() == tensors.keys()
    for key, value in tensors.items():
        assert file.tensors[key].dtype == kohya.PRECISIONS[precision]
        assert torch.equal(file.tensors[key], value.to(kohya.PRECISIONS[precision]))
    if suffix == ".safetensors":
        assert META.items() <= file.metadata.items()


def test_the_safetensors_library_sees_native_shapes_and_0_dim_alphas(tmp_path: Path) -> None:
    kohya.write(tmp_path / "a.safetensors", make_tensors(), META)
    found = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert {key: tuple(value.shape) for key, value in found.items()} == {
        f"{PROJ}.alpha": (), f"{PROJ}.lora_down.weight": (4, 32, 1, 1), f"{PROJ}.lora_up.weight": (32, 4, 1, 1),
        f"{TO_K}.alpha": (), f"{TO_K}.lora_down.weight": (4, 768), f"{TO_K}.lora_up.weight": (32, 4),
        f"{TE}.alpha": (), f"{TE}.lora_down.weight": (4, 768), f"{TE}.lora_up.weight": (768, 4),
    }  # fmt: skip


@pytest.mark.parametrize("suffix", [".pt", ".ckpt"])
def test_torch_files_are_plain_dicts_of_tensors(tmp_path: Path, suffix: str) -> None:
    tensors = make_tensors()
    kohya.write(tmp_path / f"a{suffix}", tensors, META)
    found = torch.load(tmp_path / f"a{suffix}", weights_only=True)
    assert type(found) is dict and list(found) == sorted(tensors)


def test_equal_values_give_equal_bytes(tmp_path: Path) -> None:
    tensors = make_tensors()
    many = {**META, **{f"ss_{i}": str(i) for i in range(30)}}
    kohya.write(tmp_path / "a.safetensors", tensors, many)
    kohya.write(tmp_path / "b.safetensors", dict(reversed(tensors.items())), dict(reversed(many.items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("precision", ["fp16", "float"])
def test_hashes_are_sd_scripts_own(tmp_path: Path, precision: str) -> None:
    tensors = {key: value.repeat(64, *[1] * (value.dim() - 1)) if value.dim() else value
               for key, value in make_tensors().items()}  # fmt: skip
    path = tmp_path / "a.safetensors"
    kohya.write(path, tensors, META, precision=precision)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    data = path.read_bytes()
    assert metadata["sshs_model_hash"] == hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    alone = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    serialized = safetensors.torch.save(safetensors.torch.load_file(path), alone)
    legacy = hashlib.sha256(serialized[0x100000:0x110000]).hexdigest()[:8]
    assert metadata["sshs_legacy_hash"] == legacy != "e3b0c442"


def test_a_huge_tag_list_does_not_make_a_huge_header(tmp_path: Path) -> None:
    tags = json.dumps({"1_x": {f"tag number {i}": i for i in range(100_000)}})
    kohya.write(tmp_path / "a.safetensors", make_tensors(), {"ss_tag_frequency": tags})
    assert int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little") < 1_000_000
    assert kohya.read(tmp_path / "a.safetensors").metadata["lorasmith.truncated"] == "ss_tag_frequency"


def test_an_alpha_that_the_precision_cannot_hold_stays_fp32(tmp_path: Path) -> None:
    tensors = {**make_tensors(), f"{PROJ}.alpha": torch.tensor(257.0), f"{TO_K}.alpha": torch.tensor(0.1)}
    kohya.write(tmp_path / "a.safetensors", tensors, {}, precision="bf16")
    found = kohya.read(tmp_path / "a.safetensors").tensors
    assert found[f"{PROJ}.alpha"].dtype == found[f"{TO_K}.alpha"].dtype == torch.float32
    assert found[f"{PROJ}.alpha"] == 257 and found[f"{TO_K}.alpha"] == torch.tensor(0.1)
    assert found[f"{TE}.alpha"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "value, precision, message",
    [
        (float("nan"), "float", "holds NaN or infinity"),
        (float("inf"), "bf16", "holds NaN or infinity"),
        (70000.0, "fp16", r"holds 70000, which fp16 cannot hold \(at most 65504\).*--save-precision bf16 or float"),
        (3.4e38, "bf16", "holds .*use --save-precision float"),
    ],
)
def test_what_cannot_be_saved_is_refused_by_name_and_the_old_file_stays(
    tmp_path: Path, value: float, precision: str, message: str
) -> None:
    path = tmp_path / "last.safetensors"
    kohya.write(path, make_tensors(), META)
    before, tensors = path.read_bytes(), make_tensors()
    tensors[f"{TE}.lora_up.weight"][3, 1] = value
    with pytest.raises(UserError, match=f"{TE}.lora_up.weight {message}"):
        kohya.write(path, tensors, META, precision=precision)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.safetensors"]


@pytest.mark.parametrize("precision", kohya.PRECISIONS)
def test_check_passes_what_was_written_and_returns_norms(tmp_path: Path, precision: str) -> None:
    tensors = make_tensors()
    kohya.write(tmp_path / "a.safetensors", tensors, META, precision=precision)
    norms = kohya.check(tmp_path / "a.safetensors", tensors, precision=precision)
    assert list(norms) == sorted([PROJ, TE, TO_K])
    for name, norm in norms.items():
        down, up = (tensors[f"{name}.{tail}.weight"].flatten(1) for tail in ("lora_down", "lora_up"))
        assert norm == pytest.approx((up @ down * 2.5 / 4).norm().item(), rel=1e-2)


def test_check_finds_a_single_wrong_bit_a_lost_name_and_another_dtype(tmp_path: Path) -> None:
    tensors, path = make_tensors(), tmp_path / "a.safetensors"
    for spoil in (
        lambda t: t.update({f"{TE}.lora_up.weight": t[f"{TE}.lora_up.weight"] + 1e-3}),
        lambda t: t.pop(f"{TE}.lora_up.weight"),
        lambda t: t.update({f"{TE}.lora_up.weight": t[f"{TE}.lora_up.weight"].float()}),
    ):
        wrong = kohya.convert(tensors, "fp16")
        spoil(wrong)
        save(path, wrong)
        with pytest.raises(UserError, match=f"1 of 9 tensors \\(first: {TE}.lora_up.weight"):
            kohya.check(path, tensors)


def test_files_without_alpha_are_read_and_mean_the_rank(tmp_path: Path) -> None:
    tensors = {key: value for key, value in make_tensors().items() if not key.endswith(".alpha")}
    file = kohya.read(save(tmp_path / "a.safetensors", tensors))
    assert file.tensors.keys() == tensors.keys()
    norm = kohya.norms(file.tensors)[TO_K]
    down, up = tensors[f"{TO_K}.lora_down.weight"], tensors[f"{TO_K}.lora_up.weight"]
    assert norm == pytest.approx((up @ down).norm().item(), rel=1e-5)


@pytest.mark.parametrize("spelling", ["lora_te1_text_model_encoder", "lora_te_encoder", "lora_te1_encoder"])
def test_other_spellings_of_the_text_encoder_are_mended(tmp_path: Path, spelling: str) -> None:
    tensors = make_tensors()
    renamed = {key.replace("lora_te_text_model_encoder", spelling): value for key, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    file = kohya.read(save(tmp_path / "a.safetensors", renamed))
    assert file.tensors.keys() == tensors.keys()


def test_two_spellings_at_once_are_refused(tmp_path: Path) -> None:
    tensors = make_tensors()
    both = {**tensors, **{key.replace("lora_te_", "lora_te1_"): value for key, value in tensors.items()}}
    with pytest.raises(UserError, match="under two spellings"):
        kohya.read(save(tmp_path / "a.safetensors", both))


@pytest.mark.parametrize("parts", [(TE,), (TO_K,), (TE, TO_K, PROJ)])
@pytest.mark.parametrize("width, family", [(768, "sd1"), (1024, "sd2"), (48, "unknown")])
def test_the_family_is_known_by_the_text_width(tmp_path: Path, parts: tuple[str, ...], width: int, family: str) -> None:
    tensors = {key: value for key, value in make_tensors(width).items() if key.startswith(parts)}
    assert kohya.read(save(tmp_path / "a.safetensors", tensors)).family == family


@pytest.mark.parametrize("version, family", [("sd_v1", "sd1"), ("sd_v2", "sd2"), ("sd_v2_v", "sd2"), ("x", "unknown")])
def test_a_miniatures_family_is_what_its_metadata_says(tmp_path: Path, version: str, family: str) -> None:
    path = save(tmp_path / "a.safetensors", make_tensors(48), {"ss_base_model_version": version})
    assert kohya.read(path).family == family


def test_a_miniature_with_23_text_layers_is_sd2(tmp_path: Path) -> None:
    tensors = {key.replace("layers_0", "layers_22"): value for key, value in make_tensors(48).items()}
    assert kohya.read(save(tmp_path / "a.safetensors", tensors)).family == "sd2"


BLOCK = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
FOREIGN = {
    f"{BLOCK}.hada_w1_a": "a LoHa",
    f"{BLOCK}.lokr_w1": "a LoKr",
    f"{BLOCK}.oft_blocks": "an OFT",
    f"{BLOCK}.dora_scale": "a DoRA",
    f"{BLOCK}.lora_mid.weight": "a Tucker-decomposed LoCon",
    f"{BLOCK}.a1.weight": "a GLoRA",
    f"{BLOCK}.on_input": "an IA3",
    f"{BLOCK}.diff": "a full difference",
    f"{BLOCK}.w_norm": "a full difference",
    "bundle_emb.x.string_to_param.*": "a LoRA with a bundled embedding",
    "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": "a FLUX LoRA",
    "lora_unet_joint_blocks_0_x.lora_down.weight": "an SD3 LoRA",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": "an SDXL LoRA",
    "lora_unet_down_blocks_2_attentions_0_transformer_blocks_9_attn1_to_q.lora_down.weight": "an SDXL LoRA",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight": "names as SDXL has them",
    "unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": "the layout of diffusers or PEFT",
    "text_encoder.text_model.encoder.layers.0.q_proj.lora_linear_layer.up.weight": "the layout of diffusers",
    "unet:0:up": "cloneofsimo",
    "lycoris_down_blocks_0_x.lora_down.weight": "SimpleTuner",
    "lora_transformer_x.lora_down.weight": "another model family",
    "model.diffusion_model.input_blocks.0.0.weight": "a whole model",
    "emb_params": "an embedding",
    "weight": "no LoRA",
    "lora_unet_x.something.weight": "no LoRA",
}


@pytest.mark.parametrize("key", FOREIGN)
def test_what_is_no_lora_for_sd1_or_sd2_is_refused_by_what_it_is(tmp_path: Path, key: str) -> None:
    path = save(tmp_path / "a.safetensors", {key: torch.zeros(4, 4), f"{BLOCK}.lora_down.weight": torch.zeros(4, 4)})
    with pytest.raises(UserError) as caught:
        kohya.read(path)
    message = str(caught.value)
    assert FOREIGN[key] in message and key in message and str(path) in message and "expected is a LoRA" in message


def test_an_sdxl_lora_known_by_its_text_width_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is an SDXL LoRA"):
        kohya.read(save(tmp_path / "a.safetensors", make_tensors(2048)))
