"""Files of every dialect read as the same layers; what is broken or something else is refused in words."""

import io
import json
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorasmith.errors import UserError
from lorasmith.formats import dialects
from lorasmith.formats.dialects import DIALECTS, kind_of, read_any
from tests.formats import writers

LAYERS = writers.make_layers(alpha=None)
ATTENTIONS = {name: own for name, own in LAYERS.items() if re.search(r"unet.*_attn\d_", name)}
FIRST = {name: own for name, own in LAYERS.items() if not re.search(r"proj_(in|out)$|ff_net_2$|mlp", name)}
UNET_OF_FIRST = {name: own for name, own in FIRST.items() if "unet" in name}
A_LAYER = "lora_unet_mid_block_attentions_0_proj_in"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"


def ldm(path: Path, layers: writers.Layers) -> Path:
    """Spell the U-Net's blocks as LDM counts them."""

    def block(match: re.Match[str]) -> str:
        kind, level, layer = match[1], int(match[2]), int(match[3])
        return f"lora_unet_input_blocks_{3 * level + layer + 1}_1_" if kind == "down" else (
            f"lora_unet_output_blocks_{3 * level + layer}_1_"
        )  # fmt: skip

    tensors = {}
    for key, value in writers.flat(layers).items():
        key = key.replace("lora_unet_mid_block_attentions_0_", "lora_unet_middle_block_1_")
        tensors[re.sub(r"lora_unet_(down|up)_blocks_(\d)_attentions_(\d)_", block, key)] = value
    return writers.save(path, tensors)


def list_with_sidecar(path: Path, ending: str, *, new_order: bool) -> Path:
    writers.cloneofsimo_list(path.with_name(path.stem + ending), FIRST, "text_encoder")
    return writers.cloneofsimo_list(path.with_suffix(".pt"), FIRST, "unet", new_order=new_order)


WRITERS: dict[str, tuple[str, writers.Layers, Callable[[Path], Path]]] = {
    "kohya": ("kohya", LAYERS, lambda p: writers.kohya(p, LAYERS)),
    "te1": ("kohya", LAYERS, lambda p: writers.renamed(p, LAYERS, "^lora_te_", "lora_te1_")),
    "broken te": ("kohya", LAYERS, lambda p: writers.renamed(p, LAYERS, "_te_text_model_", "_te_")),
    "ldm": ("ldm", LAYERS, lambda p: ldm(p, LAYERS)),
    "lycoris": ("lycoris", LAYERS, lambda p: writers.renamed(p, LAYERS, "^lora_(unet|te)_", "lycoris_")),
    "d8ahazard": (
        "d8ahazard", LAYERS,
        lambda p: writers.kohya(p, LAYERS, {"lora_key_encoding": "extra_network_diffusers"}),
    ),
    "diffusers": ("diffusers", LAYERS, lambda p: writers.diffusers(p, LAYERS)),
    "diffusers, default": (
        "diffusers", LAYERS,
        lambda p: writers.save(p, {
            re.sub("(lora_[AB])", r"\1.default", k): v
            for k, v in writers.two_factors(LAYERS, "{}.lora_A.weight", "{}.lora_B.weight").items()
        }),
    ),
    "0.21": ("diffusers-0.21", LAYERS, lambda p: writers.diffusers_021(p, LAYERS)),
    "0.14": ("diffusers-0.14", ATTENTIONS, lambda p: writers.diffusers_014(p, ATTENTIONS)),
    "peft": ("peft", LAYERS, lambda p: writers.peft(p.parent, LAYERS, {})),
    "colons": ("cloneofsimo", FIRST, lambda p: writers.cloneofsimo_colons(p, FIRST)),
    "colons, new order": ("cloneofsimo", FIRST, lambda p: writers.cloneofsimo_colons(p, FIRST, new_order=True)),
    "list": ("list", FIRST, lambda p: list_with_sidecar(p, ".text_encoder.pt", new_order=False)),
    "list, new order": ("list", FIRST, lambda p: list_with_sidecar(p, ".text_encoder.pt", new_order=True)),
    "list of d8ahazard": ("list", FIRST, lambda p: list_with_sidecar(p, "_txt.pt", new_order=False)),
    "list of a U-Net": (
        "list", UNET_OF_FIRST, lambda p: writers.cloneofsimo_list(p.with_suffix(".pt"), FIRST, "unet")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_every_dialect_reads_as_the_same_layers(tmp_path: Path, name: str) -> None:
    dialect, layers, write = WRITERS[name]
    lora = read_any(write(tmp_path / "lora.safetensors"))
    assert lora.dialect == dialect and lora.family == "sd1" and not lora.extras
    assert lora.tensors.keys() == writers.flat(layers).keys()
    for key, value in writers.flat(layers).items():
        assert torch.equal(lora.tensors[key], value), key
    is_text = [key for key in lora.layers() if key.startswith("lora_te")]
    assert list(lora.mended) == (is_text if name in ("te1", "broken te") else [])


def test_every_dialect_and_every_kind_has_a_file_made_here() -> None:
    assert {dialect for dialect, _, _ in WRITERS.values()} == DIALECTS.keys()
    assert KINDS.keys() == {name for name, _, _ in dialects._KINDS}


def test_text_encoder_without_text_model_in_dotted_names(tmp_path: Path) -> None:
    tensors = writers.two_factors(LAYERS, "{}.lora_A.weight", "{}.lora_B.weight")
    path = writers.save(tmp_path / "a.safetensors", {k.replace("text_model.", ""): v for k, v in tensors.items()})
    assert read_any(path).tensors.keys() == writers.flat(LAYERS).keys()


def test_sd2_is_told_by_its_widths(tmp_path: Path) -> None:
    layers = writers.make_layers("sd2", only="unet_mid|layers_22")
    assert read_any(writers.diffusers(tmp_path / "a.safetensors", layers)).family == "sd2"


def test_sdxl_keeps_its_own_names_and_gets_its_first_text_encoder_mended(tmp_path: Path) -> None:
    factors = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(8, 2)}
    names = ["lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q", "lora_te1_encoder_layers_0_mlp_fc1",
             "lora_te2_text_model_encoder_layers_0_mlp_fc1"]  # fmt: skip
    lora = read_any(writers.kohya(tmp_path / "a.safetensors", dict.fromkeys(names, factors)))
    assert (lora.family, lora.dialect) == ("sdxl", "kohya")
    assert set(lora.layers()) == {names[0], "lora_te1_text_model_encoder_layers_0_mlp_fc1", names[2]}


@pytest.mark.parametrize("given, wanted", [((8,), (8, 1)), ((1, 8, 1, 1), (8, 1, 1, 1))])
def test_magnitudes_of_peft_are_of_the_output(tmp_path: Path, given: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    key = writers.dotted(A_LAYER)
    magnitudes = torch.rand(given)
    tensors = {f"{key}.lora_A.weight": torch.ones(2, 8), f"{key}.lora_B.weight": torch.ones(8, 2),
               f"{key}.lora_magnitude_vector": magnitudes}  # fmt: skip
    read = read_any(writers.save(tmp_path / "a.safetensors", tensors)).layers()[A_LAYER]
    assert kind_of(read) == "DoRA" and torch.equal(read["dora_scale"], magnitudes.reshape(wanted))


@pytest.mark.parametrize("name, family", [
    ("lora_unet_double_blocks_0_img_attn_qkv", "flux"), ("lora_unet_joint_blocks_0_x", "sd3"),
    ("lora_transformer_x", "another"),
])  # fmt: skip
def test_other_families_are_named(tmp_path: Path, name: str, family: str) -> None:
    factors = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(8, 2)}
    assert read_any(writers.kohya(tmp_path / "a.safetensors", {name: factors})).family == family


KINDS = {
    "LoRA": ["lora_down.weight", "lora_up.weight"],
    "DoRA": ["lora_down.weight", "lora_up.weight", "dora_scale"],
    "Tucker LoCon": ["lora_down.weight", "lora_up.weight", "lora_mid.weight"],
    "LoHa": ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"],
    "LoKr": ["lokr_w1", "lokr_w2_a", "lokr_w2_b"],
    "OFT": ["oft_blocks", "rescale"],
    "IA3": ["weight", "on_input"],
    "GLoRA": ["a1.weight", "a2.weight", "b1.weight", "b2.weight"],
    "full": ["diff", "diff_b"],
    "norm": ["w_norm", "b_norm"],
}


@pytest.mark.parametrize("kind, tails", KINDS.items())
def test_kinds_of_changes(kind: str, tails: list[str]) -> None:
    assert kind_of({tail: torch.ones(2, 2, 2) for tail in [*tails, "alpha"]}) == kind
    assert kind_of({tail: torch.ones(2, 2) for tail in [*tails, "surprise"]}) is None


def test_boft_is_told_from_oft_by_its_dimensions() -> None:
    assert kind_of({"oft_blocks": torch.ones(1, 2, 2, 2)}) == "BOFT"


# ---- what is broken, or something else -------------------------------------------------------------------------------


class Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("touch /tmp/lorasmith-was-attacked",)


def raw(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def header(path: Path, text: str, size: int) -> Path:
    return raw(path, struct.pack("<Q", len(text)) + text.encode() + bytes(size))


def listed(path: Path, tensors: list[Tensor]) -> Path:
    torch.save(tensors, path)
    return path


def own(**changes: Tensor) -> dict[str, Tensor]:
    return {f"{A_LAYER}.{tail.replace('__', '.')}": value for tail, value in changes.items()}


def torch_bytes(*, is_old: bool) -> bytearray:
    stream = io.BytesIO()
    torch.save({"a": torch.ones(2)}, stream, _use_new_zipfile_serialization=not is_old)
    return bytearray(stream.getvalue())


def zip_that_begins_before_itself(path: Path) -> Path:
    data = torch_bytes(is_old=False)
    place = data.rindex(b"PK\x06\x06") + 48  # where the list of entries begins
    data[place : place + 8] = struct.pack("<Q", struct.unpack("<Q", data[place : place + 8])[0] + 1000)
    return raw(path.with_suffix(".pt"), bytes(data))


def storage_of(count: int) -> Callable[[Path], Path]:
    """Return what writes an old torch file that announces so many numbers, of two."""
    data = torch_bytes(is_old=True)
    data[-16:-8] = struct.pack("<q", count)
    return lambda path: raw(path.with_suffix(".pt"), bytes(data))


WHOLE = own(lora_down__weight=torch.ones(2, 8, 1, 1), lora_up__weight=torch.ones(8, 2, 1, 1))
ENTRY = '"{}":{{"dtype":"F32","shape":[1],"data_offsets":[{},{}]}}'
BAD: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "missing": ("there is no such file", lambda p: p),
    "empty": ("empty", lambda p: raw(p, b"")),
    "truncated": ("cut short", lambda p: raw(p, writers.save(p, WHOLE).read_bytes()[:-5])),
    "cut in the header": ("cut short", lambda p: raw(p, writers.save(p, WHOLE).read_bytes()[:50])),
    "wrong offsets": ("damaged", lambda p: header(p, "{" + ENTRY.format("a", 2, 4) + "}", 4)),
    "offsets that overlap": (
        "damaged", lambda p: header(p, "{" + ENTRY.format("a", 0, 4) + "," + ENTRY.format("b", 0, 4) + "}", 4),
    ),
    "duplicate keys": (
        "two entries are called a",
        lambda p: header(p, "{" + ENTRY.format("a", 0, 4) + "," + ENTRY.format("a", 0, 4) + "}", 4),
    ),
    "a claim of 100 MB of header": ("no whole .safetensors", lambda p: raw(p, struct.pack("<Q", 100_000_000) + b"{}")),
    "a header of no entries": ("it holds nothing", lambda p: header(p, "{}", 0)),
    "sides below 0": (
        "side below 0", lambda p: header(p, '{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', 4)
    ),
    "offsets of text": (
        "header cannot be read", lambda p: header(p, '{"a":{"dtype":"F32","shape":[1],"data_offsets":["0","4"]}}', 4)
    ),
    "a pickle that runs code": ("tries to run code", lambda p: raw(p.with_suffix(".pt"), pickle.dumps(Attack()))),
    "a list that runs code": (
        "tries to run code", lambda p: raw(p.with_suffix(".pt"), pickle.dumps([Attack()], protocol=2))
    ),
    "a zip that begins before itself": ("truncated or damaged", zip_that_begins_before_itself),
    "a storage larger than any file": ("is truncated", storage_of(2**62)),
    "a storage larger than the file": ("is truncated", storage_of(2**20)),
    "a storage below nothing": ("is truncated", storage_of(-1)),
    "a web page": ("web page", lambda p: raw(p, b"<!DOCTYPE html><html>")),
    "an odd list": ("odd number", lambda p: listed(p.with_suffix(".pt"), [torch.ones(2, 2)] * 3)),
    "a list of another length": ("list of 2 pairs", lambda p: listed(p.with_suffix(".pt"), [torch.ones(2, 2)] * 4)),
    "a list of other widths": ("either order", lambda p: listed(p.with_suffix(".pt"), [torch.ones(2, 2)] * 288)),
    "a list with words in it": ("holds no tensors by name", lambda p: listed(p.with_suffix(".pt"), ["x", "y"])),  # type: ignore[list-item]
    "two dialects": ("mixes names", lambda p: writers.save(p, {**WHOLE, "unet.a.lora_A.weight": torch.ones(1, 1)})),
    "text in another dialect": (
        "mixes names",
        lambda p: writers.save(p, {**WHOLE, "text_encoder.a.lora_linear_layer.up.weight": torch.ones(1, 1)}),
    ),
    "two spellings": (
        "under two spellings",
        lambda p: writers.save(p, {
            f"{name}.lora_{half}.weight": torch.ones(2, 2)
            for name in (TEXT, TEXT.replace("text_model_", "")) for half in ("up", "down")
        }),
    ),
    "an embedding": ("an embedding", lambda p: writers.save(p, {"emb_params": torch.ones(1, 768)})),
    "a checkpoint": (
        "a whole model", lambda p: writers.save(p, {"model.diffusion_model.out.2.weight": torch.ones(1, 1)})
    ),
    "a VAE": ("a VAE", lambda p: writers.save(p, {"encoder.conv_in.weight": torch.ones(1)})),
    "something else": ("no LoRA", lambda p: writers.save(p, {"classifier.weight": torch.ones(1)})),
    "half a layer": ("incomplete", lambda p: writers.save(p, own(lora_down__weight=torch.ones(2, 8)))),
    "factors of other ranks": (
        "do not fit",
        lambda p: writers.save(p, own(lora_down__weight=torch.ones(2, 8), lora_up__weight=torch.ones(8, 3))),
    ),
    "factors of whole numbers": (
        "do not fit", lambda p: writers.save(p, {name: tensor.int() for name, tensor in WHOLE.items()})
    ),
    "no rank": (
        "is empty", lambda p: writers.save(p, own(lora_down__weight=torch.ones(0, 8), lora_up__weight=torch.ones(8, 0)))
    ),
    "many alphas": ("expected is one number", lambda p: writers.save(p, {**WHOLE, **own(alpha=torch.ones(2))})),
    "a missing half": ("is missing", lambda p: writers.save(p, {"unet:0:up": torch.ones(2, 2)})),
    "a header's alpha that is none": (
        "is not JSON",
        lambda p: writers.diffusers(p, {A_LAYER: LAYERS[A_LAYER]}, {"lora_adapter_metadata": "{"}),
    ),
    "an alpha in the header that is no number": (
        "expected is a number",
        lambda p: writers.diffusers(
            p, {A_LAYER: LAYERS[A_LAYER]}, {"lora_adapter_metadata": '{"unet.lora_alpha": "x"}'}
        ),
    ),
    "PEFT of another kind": ("of PEFT's kinds", lambda p: writers.peft(p.parent, LAYERS, {"peft_type": "IA3"})),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_told(tmp_path: Path, name: str) -> None:
    says, make = BAD[name]
    with pytest.raises(UserError, match=re.escape(says)) as told:
        read_any(make(tmp_path / "bad.safetensors"))
    assert str(tmp_path) in str(told.value)
    assert not Path("/tmp/lorasmith-was-attacked").exists()


WORDS = ["lora", "unet", "te", "te1", "text_encoder", "base_model", "model", "lycoris", "down_blocks", "0", "attn1",
         "to_q", "processor", "weight", "lora_A", "lora_B", "lora_down", "lora_up", "alpha", "diff", "up", "down",
         "default", "hada_w1_a", "<s1>", "bundle_emb", "encoder", "layers", "12", "double_blocks",
         "ünï", "99999999"]  # fmt: skip
NAMES = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from([".", "_", ":", ""])), min_size=1, max_size=8).map(
    lambda pairs: "".join(word + mark for word, mark in pairs)
)
KNOWN = st.sampled_from([A_LAYER, TEXT, "unet.mid_block.attentions.0.proj_in", "unet:0", "base_model.model.x.y"])
TAILS = st.sampled_from(
    [
        ".lora_down.weight",
        ".lora_up.weight",
        ".alpha",
        ".lora_A.weight",
        ".lora_B.weight",
        ":up",
        ":down",
        ".oft_blocks",
    ]
)
SHAPES = st.lists(st.integers(0, 5), max_size=4)
DTYPES = st.sampled_from([torch.float16, torch.float32, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float64])


def reads_or_tells(path: Path) -> None:
    try:
        read_any(path)
    except UserError as error:
        assert len(str(error)) > 20


@settings(max_examples=150)
@given(st.dictionaries(st.one_of(NAMES, st.tuples(KNOWN, TAILS).map("".join)), st.tuples(SHAPES, DTYPES), max_size=6))
def test_any_names_and_shapes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[list[int], torch.dtype]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    made = {name: torch.zeros(shape).to(dtype) for name, (shape, dtype) in tensors.items()}
    reads_or_tells(writers.save(path, made))
    listed(path.with_suffix(".pt"), list(made.values()))
    reads_or_tells(path.with_suffix(".pt"))


@settings(max_examples=150)
@given(st.binary(max_size=64), st.integers(0, 3000), st.sampled_from([".safetensors", ".pt", "-old.pt"]))
def test_any_damage_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, place: int, suffix: str
) -> None:
    base = tmp_path_factory.getbasetemp()
    whole = base / f"whole{suffix}"
    if suffix == ".safetensors":
        writers.save(whole, WHOLE)
    else:
        torch.save(WHOLE, whole, _use_new_zipfile_serialization=suffix == ".pt")
    data = bytearray(whole.read_bytes())
    place %= len(data)
    data[place : place + len(noise)] = noise
    reads_or_tells(raw(base / f"damaged{suffix}", bytes(data)))


@settings(max_examples=100)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["a", "__metadata__", "dtype", "shape", "data_offsets"]), inner, max_size=4
    ),
))  # fmt: skip
def test_any_header_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: object) -> None:
    reads_or_tells(header(tmp_path_factory.getbasetemp() / "header.safetensors", json.dumps(content), 4))
