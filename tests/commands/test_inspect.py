"""`lorasmith inspect`: what it tells of LoRAs and checkpoints is so, by arithmetic of its own."""

import binascii
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import lorasmith.demo
from lorasmith.cli import main
from lorasmith.formats import kohya
from tests.formats import writers
from tests.formats.test_dialects import BAD, DTYPES, KNOWN, NAMES, SHAPES, TAILS

LAYERS = writers.make_layers(alpha=1.0)
SOME = writers.make_layers(only="unet_mid|te.*layers_0_")
A_LAYER = "lora_unet_mid_block_attentions_0_proj_in"
MINI = Path(lorasmith.demo.__file__).parent / "sd1-mini.safetensors"


def told(path: Path, capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["inspect", str(path), "--json", "-"]) == code
    return json.loads(capsys.readouterr().out)


def test_a_whole_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.safetensors"
    tags = {"10_a": {"sks dog": 12, "grass ": 3}, "5_b": {"grass": 4}}
    header = {"ss_tag_frequency": json.dumps(tags), "ss_training_started_at": "1700000000.5", "ss_steps": "900",
              "ss_seed": "None"}  # fmt: skip
    kohya.write(path, writers.flat(LAYERS), header)
    facts = told(path, capsys)
    assert (facts["family"], facts["kinds"], facts["problems"]) == ("sd1", {"LoRA": 264}, [])
    assert facts["rank"] == {"from": 2, "to": 2} and facts["alpha"] == {"from": 1, "to": 1}
    assert facts["parts"] == {"U-Net": {"layers": 192, "of": 192}, "text encoder": {"layers": 72, "of": 72}}
    assert facts["precision"] == {"float16": 528}
    assert facts["tags"] == {"sks dog": 12, "grass": 7}
    assert facts["training"] == {"steps": "900", "started": "2023-11-14 22:13 UTC"}
    mid = [own for name, own in LAYERS.items() if "mid_block" in name]
    squares = [
        (own["lora_up.weight"].double().flatten(1) @ own["lora_down.weight"].double().flatten(1) / 2).norm() ** 2
        for own in mid
    ]
    assert math.isclose(facts["norms"]["mid"], float(sum(squares)) ** 0.5, rel_tol=1e-4)
    assert {one["verdict"] for one in facts["clients"].values()} == {"ok"} and facts["advice"] == []


def test_hashes_are_those_that_sites_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.safetensors"
    kohya.write(path, writers.flat(LAYERS), {"ss_steps": "1"})
    data = path.read_bytes()
    body = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    found = told(path, capsys)
    hashes = found["hashes"]
    assert hashes["AutoV2"] == hashlib.sha256(data).hexdigest()[:10] and hashes["AutoV3"] == body[:12]
    assert hashes["AutoV1"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert hashes["sha256"] == hashlib.sha256(data).hexdigest() and hashes["sshs_model_hash"] == body
    assert hashes["CRC32"] == binascii.crc32(data).to_bytes(4, "big").hex()
    alone = safetensors.torch.save(safetensors.torch.load_file(path), {"ss_steps": "1"})
    assert hashes["sshs_legacy_hash"] == hashlib.sha256(alone[0x100000:0x110000]).hexdigest()[:8]
    assert found["metadata"]["sshs_legacy_hash"] == hashes["sshs_legacy_hash"]
    writers.kohya(path, LAYERS, {"sshs_model_hash": "0xother"})
    assert "the header's sshs_model_hash is 0xother" in told(path, capsys, code=1)["problems"][0]


def test_damage_and_layers_that_do_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = {name: dict(own) for name, own in SOME.items()}
    first, second, third = sorted(layers)[:3]
    layers[first]["lora_up.weight"] = layers[first]["lora_up.weight"] * float("nan")
    layers[second]["lora_down.weight"] = layers[second]["lora_down.weight"] + float("inf")
    layers[third]["lora_up.weight"] = layers[third]["lora_up.weight"] * 0
    facts = told(writers.kohya(tmp_path / "a.safetensors", layers), capsys, code=1)
    assert sorted(facts["layers with NaN or infinity"]) == [first, second]
    assert facts["layers that change nothing"] == [third]
    assert facts["problems"] == ["2 layers hold NaN or infinity"]


def test_the_advice_makes_the_file_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = writers.renamed(tmp_path / "a.safetensors", SOME, "_te_text_model_", "_te_")
    facts = told(path, capsys)
    assert facts["clients"]["ComfyUI"]["verdict"] == "part" and len(facts["mended names"]) == 6
    command = re.search(r"lorasmith (convert .*)", facts["advice"][0])
    assert command is not None and main(command[1].split()) == 0
    assert told(tmp_path / "a-kohya.safetensors", capsys)["clients"]["ComfyUI"]["verdict"] == "ok"


def test_page_picture_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = {"ss_output_name": "dog\x1b[2J", "ss_tag_frequency": "broken"}
    path = writers.kohya(tmp_path / "a.safetensors", SOME, header)
    outputs = ["--picture", str(tmp_path / "a.png"), "--json", str(tmp_path / "a.json")]
    assert main(["inspect", str(path), *outputs]) == 0
    page = capsys.readouterr().out
    assert "LoRA for SD 1.x;" in page and "\x1b" not in page
    assert Image.open(tmp_path / "a.png").size > (500, 200)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["family"] == "sd1"
    assert main(["inspect", str(path), *outputs]) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert main(["inspect", str(path), *outputs, "--overwrite"]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "a.png", "a.safetensors"]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def kron(w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    return torch.einsum("lm,kn...->lkmn...", w1, w2)


# Kind -> tensors of a layer, and its change written out from the paper's formula.
MEASURED: dict[str, tuple[dict[str, torch.Tensor], torch.Tensor]] = {
    "LoHa": (
        {"hada_w1_a": draw(6, 2), "hada_w1_b": draw(2, 45), "hada_w2_a": draw(6, 2), "hada_w2_b": draw(2, 45),
         "alpha": torch.tensor(3.0)},
        3 / 2 * (draw(6, 2) @ draw(2, 45)) * (draw(6, 2) @ draw(2, 45)),
    ),
    "LoHa, Tucker": (
        {"hada_w1_a": draw(2, 6), "hada_w1_b": draw(2, 5), "hada_t1": draw(2, 2, 3, 3), "hada_w2_a": draw(2, 6),
         "hada_w2_b": draw(2, 5), "hada_t2": draw(2, 2, 3, 3), "alpha": torch.tensor(2.0)},
        torch.einsum("pqhw,po,qi->oihw", draw(2, 2, 3, 3), draw(2, 6), draw(2, 5)).square(),
    ),
    "LoKr": ({"lokr_w1": draw(2, 3), "lokr_w2": draw(4, 5), "alpha": torch.tensor(7.0)}, kron(draw(2, 3), draw(4, 5))),
    "LoKr of products": (
        {"lokr_w1": draw(2, 3), "lokr_w2_a": draw(8, 2), "lokr_w2_b": draw(2, 9), "alpha": torch.tensor(1.0)},
        kron(draw(2, 3), draw(8, 2) @ draw(2, 9)) / 2,
    ),
    "Tucker LoCon": (
        {"lora_up.weight": draw(6, 2, 1, 1), "lora_mid.weight": draw(2, 2, 3, 3), "lora_down.weight": draw(2, 5, 1, 1),
         "alpha": torch.tensor(1.0)},
        torch.einsum("orxy,rshw,sixy->oihw", draw(6, 2, 1, 1), draw(2, 2, 3, 3), draw(2, 5, 1, 1)) / 2,
    ),
    "full": ({"diff": draw(4, 3, 3, 3), "diff_b": draw(4)}, draw(4, 3, 3, 3)),
    "norm": ({"w_norm": draw(8), "b_norm": draw(8)}, draw(8)),
    "full, with a bias alone": ({"diff_b": draw(4)}, torch.zeros(4)),
}  # fmt: skip
UNMEASURED = {
    "DoRA": {"lora_up.weight": draw(6, 2), "lora_down.weight": draw(2, 5), "dora_scale": draw(6, 1)},
    "LoHa": {**MEASURED["LoHa"][0], "dora_scale": draw(6, 1)},
    "OFT": {"oft_blocks": draw(2, 3, 3)},
    "IA3": {"weight": draw(6), "on_input": torch.tensor(0.0)},
    "GLoRA": {"a1.weight": draw(2, 5), "a2.weight": draw(5, 2), "b1.weight": draw(2, 5), "b2.weight": draw(6, 2)},
    "LoKr": {"lokr_w1": draw(8000, 100), "lokr_w2": draw(100, 8000)},  # of a layer that no model has
}


@pytest.mark.parametrize("name", MEASURED)
def test_every_kind_is_measured_that_can_be_without_the_model(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, change = MEASURED[name]
    layers = {"lora_unet_mid_block_attentions_0_proj_in": tensors, "lora_unet_conv_in": tensors}
    facts = told(writers.kohya(tmp_path / "a.safetensors", layers), capsys)
    norm = change.double().norm().item()
    assert facts["norms"] == pytest.approx({"mid": norm, "others": norm}, rel=1e-5)
    assert facts["norms not known without the model"] == {}


@pytest.mark.parametrize("kind", UNMEASURED)
def test_what_depends_on_the_model_is_said_to(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = writers.kohya(tmp_path / "a.safetensors", {A_LAYER: UNMEASURED[kind]})
    facts = told(path, capsys)
    assert facts["norms"] == {} and facts["norms not known without the model"] == {kind: 1}
    assert main(["inspect", str(path)]) == 0
    assert f"not measured    1 {kind}: the change depends on the base model's weights" in capsys.readouterr().out


RANKS = {
    "LoHa": 2, "LoHa, Tucker": 2, "LoKr": None, "LoKr of products": 2, "Tucker LoCon": 2, "full": None, "norm": None,
    "DoRA": 2, "OFT": None, "IA3": None, "GLoRA": 2,
}  # fmt: skip


@pytest.mark.parametrize("kind", RANKS)
def test_the_rank_is_that_of_the_tensors(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = MEASURED[kind][0] if kind in MEASURED else UNMEASURED[kind]
    path = writers.kohya(tmp_path / "a.safetensors", {A_LAYER: tensors})
    rank = RANKS[kind]
    assert told(path, capsys)["rank"] == (None if rank is None else {"from": rank, "to": rank})
    main(["inspect", str(path)])
    lines = capsys.readouterr().out.split("\n")
    assert f"rank            {rank or 'none: other kinds of changes'}" in lines
    assert ("alpha           not in the file: as the rank" in lines) == (rank is not None and "alpha" not in tensors)


def test_why_there_is_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = writers.kohya(tmp_path / "a.safetensors", {A_LAYER: UNMEASURED["DoRA"]})
    assert main(["inspect", str(path), "--picture", str(tmp_path / "a.png")]) == 2
    error = capsys.readouterr().err
    assert "1 DoRA" in error and "depends on the base model's weights" in error and not (tmp_path / "a.png").exists()


def test_pictures_are_told_with_their_repeats_and_extras_with_how_many_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = {"ss_num_train_images": "160", "ss_num_reg_images": "30"}
    for number, more in ((5, None), (7, "2 more")):
        extras = {f"stranger{index}": torch.zeros(1) for index in range(number)}
        kohya.write(tmp_path / "a.safetensors", writers.flat(SOME), header)
        tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
        safetensors.torch.save_file({**tensors, **extras}, tmp_path / "a.safetensors", header)
        assert main(["inspect", str(tmp_path / "a.safetensors")]) == 0
        page = capsys.readouterr().out
        assert re.search("pictures x repeats +160\n", page) and re.search("regularization x repeats +30\n", page)
        assert ("more that belong to no layer" in page) == (more is not None) and (more or "") in page


EVIL = "\x1b]0;owned\x07\x1b[2J\x9b2J\r\b\x7f\u202etxt.exe\u2028"


@pytest.mark.parametrize("options", [[], ["--json", "-"]])
def test_nothing_in_a_file_reaches_the_terminal_as_a_command(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    header = {
        "ss_output_name": EVIL, f"key{EVIL}": EVIL, "sshs_model_hash": EVIL, "ss_training_comment": f"a{EVIL}b",
        "ss_tag_frequency": json.dumps({EVIL: {EVIL: 3}}), "ss_datasets": json.dumps([{EVIL: [EVIL]}]),
    }  # fmt: skip
    path = tmp_path / "a\x1b[2J\x9b\u202e.safetensors"
    for write in (lambda: writers.kohya(path, SOME, header), lambda: path.write_bytes(MINI.read_bytes()),
                  lambda: path.write_bytes(b"damaged"), path.unlink):  # fmt: skip
        write()
        main(["inspect", str(path), *options])
        main(["convert", str(path), "--output", str(path.with_name("b\x9b.safetensors")), "--overwrite"])
        told = capsys.readouterr()
        assert told.out + told.err and all(line.isprintable() for line in (told.out + told.err).split("\n"))


def test_values_are_taken_apart_for_programs_and_cut_for_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    buckets = {"buckets": {"0": {"resolution": [512, 512], "count": 7}}}
    kept = {"nan": '{"a": NaN}', "deep": "[" * 500 + "]" * 500, "list": "[1", "huge": "[" + "9" * 9000 + "]",
            "modelspec.thumbnail": "data:image/png;base64," + "A" * 100_000}  # fmt: skip
    header = {"ss_bucket_info": json.dumps(buckets), "ss_training_comment": "x" * 5000, **kept}
    path = writers.kohya(tmp_path / "a.safetensors", SOME, header)
    found = told(path, capsys)["metadata"]
    assert found["ss_bucket_info"] == buckets and {name: found[name] for name in kept} == kept
    assert main(["inspect", str(path)]) == 0
    page = capsys.readouterr().out
    assert max(map(len, page.split("\n"))) < 200
    assert "(5,000 letters)" in page and "(100,022 letters)" in page
    assert re.search(r"ss_bucket_info +\{\"buckets\": \{\"0\"", page)
    many = writers.kohya(tmp_path / "b.safetensors", SOME, {f"name{n}": "1" for n in range(100)})
    assert main(["inspect", str(many)]) == 0
    assert "and 70 more, all in --json" in capsys.readouterr().out


def test_convolutions_and_other_kinds_are_counted_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = {
        A_LAYER: SOME[A_LAYER],
        "lora_unet_down_blocks_0_resnets_0_conv1": {
            "lora_down.weight": torch.ones(4, 8, 3, 3), "lora_up.weight": torch.ones(8, 4, 1, 1),
        },
        "lora_unet_down_blocks_0_resnets_0_norm1": {"w_norm": torch.ones(8)},
    }  # fmt: skip
    facts = told(writers.kohya(tmp_path / "a.safetensors", layers), capsys)
    assert facts["parts"]["convolutions, norms and others"] == {"layers": 2, "of": None}
    assert facts["kinds"] == {"LoRA": 2, "norm": 1} and facts["rank"] == {"from": 2, "to": 4}
    assert facts["clients"]["diffusers"] == {"verdict": "refused", "because": ["norm"], "rests on": "0.42.1, run"}
    assert facts["norms"]["down 0.0"] == pytest.approx(math.sqrt(8 * 72 * 4**2 + 8))


def test_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = told(MINI, capsys)
    assert (facts["what"], facts["family"], facts["prediction"]) == ("checkpoint", "sd1", "epsilon")
    assert facts["missing"] == facts["unknown"] == [] and facts["moving average (EMA)"] is False
    data = MINI.read_bytes()
    whole, part = (hashlib.sha256(own).hexdigest() for own in (data, data[1 << 20 :][: 1 << 16]))
    body = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert facts["hashes"] == {
        "sha256": whole, "AutoV1": part[:8], "AutoV2": whole[:10], "AutoV3": body[:12], "sshs_model_hash": body,
        "CRC32": f"{binascii.crc32(data):08x}",
    }  # fmt: skip
    assert main(["inspect", str(MINI)]) == 0
    assert "Stable Diffusion 1.x" in capsys.readouterr().out


def test_a_checkpoint_with_gaps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = safetensors.torch.load_file(MINI)
    gone = "model.diffusion_model.middle_block.1.proj_out.weight"
    del tensors[gone]
    tensors["model_ema.decay"] = tensors["surprise"] = torch.ones(1)
    facts = told(writers.save(tmp_path / "a.safetensors", tensors), capsys, code=1)
    assert facts["missing"] == [gone] and set(facts["unknown"]) == {"surprise", "model_ema.decay"}
    assert facts["moving average (EMA)"] is True


def test_something_else_is_told_as_far_as_it_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = writers.save(tmp_path / "a.safetensors", {"emb_params": torch.ones(1, 768)})
    assert "textual inversion" in told(path, capsys)["notes"][0]


@pytest.mark.parametrize("arguments, says", [
    ([], "missing: FILE"), (["a.safetensors", "--picture", "a.txt"], "ends in .png"),
    ([str(MINI), "--picture", "a.png"], "no changes of layers"),
])  # fmt: skip
def test_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("name", BAD)
def test_what_convert_refuses_is_told_or_refused_too(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(BAD[name][1](tmp_path / "bad.safetensors"))]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


@settings(max_examples=100)
@given(
    st.dictionaries(st.one_of(NAMES, st.tuples(KNOWN, TAILS).map("".join)), st.tuples(SHAPES, DTYPES), max_size=6),
    st.dictionaries(
        st.sampled_from(["ss_tag_frequency", "ss_training_started_at", "sshs_model_hash", "ss_steps"]),
        st.one_of(
            st.text(max_size=9), st.sampled_from(["{}", '{"a": {"b": "c"}}', '{"a": 1}', "1e400", "nan", "None"])
        ),
    ),
)
def test_anything_is_told_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, tuple[list[int], torch.dtype]],
    header: dict[str, str],
) -> None:
    path = tmp_path_factory.getbasetemp() / "inspected.safetensors"
    made = {name: torch.zeros(shape).to(dtype) for name, (shape, dtype) in tensors.items()}
    assert main(["inspect", str(writers.save(path, made, header))]) in (0, 1, 2)
