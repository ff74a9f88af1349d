"""Every form of textual-inversion file, and files that are none."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorasmith.errors import UserError
from lorasmith.formats.embeddings import read

ONE, SEVERAL = torch.arange(768.0), torch.arange(3 * 768.0).view(3, 768)


def webui(vectors: Tensor) -> dict[str, Any]:
    """As WebUI saves it while it trains."""
    return {
        "string_to_token": {"*": 265}, "string_to_param": {"*": vectors.requires_grad_()}, "name": "other", "step": 99,
        "sd_checkpoint": "7460a6fa", "sd_checkpoint_name": "model",
    }  # fmt: skip


def found(*paths: Path, width: int = 768) -> dict[str, Tensor]:
    return {one.name: one.vectors for one in read(paths, width=width)[0]}


def saved(content: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("file", "content", "name"),
    [
        ("my-style.pt", webui(SEVERAL.clone()), "my-style"),
        ("my-style.pt", webui(SEVERAL.half()), "my-style"),
        ("my-style.safetensors", {"emb_params": SEVERAL}, "my-style"),
        ("my-style.bin", {"<toy>": SEVERAL}, "<toy>"),
        ("learned_embeds.safetensors", {"<toy>": SEVERAL.bfloat16()}, "<toy>"),
        ("my-style.pt", SEVERAL, "my-style"),
        ("my-style.bin", nn.Parameter(SEVERAL), "my-style"),
        ("my-style.bin", {"*": SEVERAL}, "my-style"),
    ],
)
def test_each_form_is_read_by_its_name(file: str, content: Any, name: str, tmp_path: Path) -> None:
    ((own, vectors),) = found(saved(content, tmp_path / file)).items()
    assert own == name and vectors.dtype == torch.float32 and not vectors.requires_grad
    expected = SEVERAL.bfloat16() if file == "learned_embeds.safetensors" else SEVERAL
    torch.testing.assert_close(vectors, expected.float(), rtol=1e-3, atol=0)


def test_one_vector_may_be_without_a_side_for_its_number(tmp_path: Path) -> None:
    assert torch.equal(found(saved({"<s1>": ONE}, tmp_path / "a.bin"))["<s1>"], ONE[None])


def test_the_older_file_layout_of_torch_is_read(tmp_path: Path) -> None:
    torch.save(webui(SEVERAL.clone()), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(found(tmp_path / "a.pt")["a"], SEVERAL)


def test_a_file_of_the_papers_own_program_is_read(tmp_path: Path) -> None:
    parameters = nn.ParameterDict({"*": nn.Parameter(SEVERAL)})
    path = saved({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters}, tmp_path / "a.pt")
    assert torch.equal(found(path)["a"], SEVERAL)


def test_cloneofsimos_tokens_are_read_beside_a_lora_and_from_its_sidecar(tmp_path: Path) -> None:
    lora = {"unet:0:up": torch.zeros(320, 4), "unet:0:down": torch.zeros(4, 320), "<s1>": ONE, "<s2>": ONE + 1}
    save_file(lora, tmp_path / "lora.safetensors", {"<s1>": "<embed>", "<s2>": "<embed>", "unet:0:rank": "4"})
    torch.save({"<s1>": ONE, "<s2>": ONE + 1}, tmp_path / "lora.ti.pt")
    for path in (tmp_path / "lora.safetensors", tmp_path / "lora.ti.pt"):
        vectors = found(path)
        assert torch.equal(vectors["<s1>"], ONE[None]) and torch.equal(vectors["<s2>"], ONE[None] + 1)


def test_a_folder_gives_all_in_it_that_fit_and_says_what_does_not(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    saved(webui(SEVERAL.clone()), tmp_path / "a.pt")
    saved({"emb_params": torch.ones(2, 768)}, tmp_path / "more" / "b.safetensors")
    saved({"emb_params": torch.ones(2, 1024)}, tmp_path / "sd2.safetensors")
    saved({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, tmp_path / "xl.safetensors")
    saved({"unet.lora_up": torch.ones(8, 2), "unet.lora_down": torch.ones(2, 768)}, tmp_path / "lora.safetensors")
    (tmp_path / "notes.txt").write_text("no embedding")
    embeddings, notes = read([tmp_path], width=768)
    assert {one.name for one in embeddings} == {"a", "b"}
    left_out = {match[1]: note for note in notes if (match := re.match(r"left out: .*/(\w+)\.safetensors", note))}
    assert left_out.keys() == {"sd2", "xl", "lora"}
    assert "1024 wide, as for Stable Diffusion 2.x, but the base model's text encoder has 768" in left_out["sd2"]
    assert "for SDXL" in left_out["xl"] and "no textual-inversion embedding" in left_out["lora"]


def test_a_name_that_is_a_word_is_told(tmp_path: Path) -> None:
    paths = [saved({"emb_params": ONE}, tmp_path / f"{name}.safetensors") for name in ("cat", "my-style")]
    _, notes = read(paths, width=768)
    assert [note.partition(" is called")[0] for note in notes] == ["the embedding cat"]


MISTAKES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "none there": ("there is no such file or folder", lambda p: p / "none.pt"),
    "empty folder": ("no embedding is in this folder", lambda p: p),
    "another width": (
        "vectors 1024 wide, as for Stable Diffusion 2.x, but the base model's text encoder has 768 (Stable Diffusion",
        lambda p: saved({"<a>": torch.ones(1, 1024)}, p / "a.bin"),
    ),
    "SDXL": (
        "is an embedding for SDXL, with vectors for its two text encoders",
        lambda p: saved({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, p / "a.safetensors"),
    ),
    "NaN": ("a.bin holds NaN or infinity", lambda p: saved({"<a>": ONE * float("nan")}, p / "a.bin")),
    "no vectors": ("embedding of 0 vectors", lambda p: saved({"<a>": torch.ones(0, 768)}, p / "a.safetensors")),
    "too many": ("of 76 vectors; expected 1 to 75", lambda p: saved({"<a>": torch.ones(76, 768)}, p / "a.bin")),
    "no tensors": ("no textual-inversion embedding: it holds 0 tensors", lambda p: saved({}, p / "a.safetensors")),
    "whole numbers": ("torch.int64, expected fractions", lambda p: saved({"<a>": ONE.long()}, p / "a.bin")),
    "a LoRA": (
        "it holds 2 tensors (x.up 8x2, x.down 2x768)",
        lambda p: saved({"x.up": torch.ones(8, 2), "x.down": torch.ones(2, 768)}, p / "a.pt"),
    ),
    "a kernel": ("is no textual-inversion embedding", lambda p: saved({"<a>": torch.ones(1, 1, 768)}, p / "a.bin")),
    "no name": ("is no textual-inversion embedding", lambda p: saved({" ": ONE}, p / "a.bin")),
    "empty": ("is empty (0 bytes)", lambda p: (p / "a.pt").touch() or p / "a.pt"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_are_told(kind: str, tmp_path: Path) -> None:
    message, make = MISTAKES[kind]
    path = make(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read([path], width=768)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("files", "name"),
    [(["a.pt", "sub/A.safetensors"], "A"), (["learned_embeds.bin", "learned_embeds-steps-500.bin"], "<toy>")],
)
def test_two_of_one_name_are_refused(files: list[str], name: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for file in files:
        content = {"<toy>": ONE} if file.endswith(".bin") else {"emb_params": ONE}
        saved(webui(SEVERAL.clone()) if file.endswith(".pt") else content, tmp_path / file)
    with pytest.raises(UserError, match=f"two embeddings are called {name}: ") as error:
        read([tmp_path], width=768)
    assert all(file in str(error.value) for file in files)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "done",)

    torch.save({"string_to_param": {"*": SEVERAL}, "name": Attack()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="tries to run code"):
        read([tmp_path / "a.pt"], width=768)
    assert not (tmp_path / "done").exists()
