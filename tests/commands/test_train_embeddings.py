"""Textual-inversion embeddings in captions, through the command."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorasmith.checkpoint import open_checkpoint
from lorasmith.cli import main
from lorasmith.models import tokenizer
from lorasmith.training_run import session
from tests.commands.test_train_captions import Place
from tests.commands.test_train_options import same

TAGS = ["red, my-cat, small", "blue, My-Cat, round", "green, sks"]
WITH_WORDS = ["red, red fox, small", "blue, red fox, round", "green, sks"]
TABLE = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SOURCE_DATE_EPOCH", "1700000000")
        patched.setattr(session, "write_report", lambda folder, contents: folder)
        yield Place(tmp_path_factory.mktemp("place"))


def vectors_of(place: Place, text: str) -> Tensor:
    """Return what the base model has for the words of a text."""
    with open_checkpoint(place.base) as checkpoint:
        return checkpoint.tensor(TABLE)[tokenizer.build()(text, add_special_tokens=False)["input_ids"]]


def webui(path: Path, vectors: Tensor) -> Path:
    path.parent.mkdir(exist_ok=True)
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": path.stem}, path)
    return path


@pytest.fixture(scope="module")
def cat(place: Place) -> Path:
    return webui(place.path / "embeddings" / "my-cat.pt", vectors_of(place, "red fox"))


def plan(words: list[str]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([*words, "--dry-run"]) == 0
    return " ".join(printed.getvalue().split())


def resumed(folder: Path, *options: object) -> int:
    with contextlib.redirect_stdout(io.StringIO()):
        return main(["train", "--resume", str(folder), *map(str, options)])


@pytest.mark.parametrize("part", ["text_encoder", "unet"])
def test_a_run_learns_what_one_learns_whose_captions_have_the_words_of_the_vectors(
    place: Place, cat: Path, part: str
) -> None:
    result = place.train(TAGS, "--embeddings", cat, "--train", part)
    assert same(result, place.train(WITH_WORDS, "--train", part))
    assert not same(result, place.train(TAGS, "--train", part))


def test_weights_count_for_embeddings(place: Place, cat: Path) -> None:
    weighted = [tags.replace("my-cat", "(my-cat:1.4)") for tags in TAGS]
    expected = [tags.replace("red fox, s", "(red fox:1.4), s") for tags in WITH_WORDS]
    result = place.train(weighted, "--embeddings", cat, "--weighted-captions")
    assert same(result, place.train(expected, "--weighted-captions"))


def test_the_plan_says_where_embeddings_stand_and_the_file_names_them(place: Place, cat: Path, tmp_path: Path) -> None:
    save_file({"emb_params": torch.zeros(3, 24)}, tmp_path / "bad-hands.safetensors")
    save_file({"emb_params": torch.zeros(1, 24)}, tmp_path / "dog.safetensors")
    save_file({"emb_params": torch.zeros(1, 768)}, tmp_path / "wide.safetensors")
    words = place.words(TAGS, "--embeddings", cat, tmp_path, "--output", tmp_path / "none")
    page = plan(words)
    assert "embeddings my-cat (2 vectors), in 2 of 3 captions in no caption or prompt: bad-hands (3 vectors)" in page
    assert "the embedding dog is called as a word" in page
    assert f"left out: {tmp_path / 'wide.safetensors'} is an embedding of vectors 768 wide" in page
    drawn = plan([*words, "--before-after", "--prompts", "my-cat in a hat", "a my-cat", "--negative", "bad-hands"])
    assert (
        "in no caption or prompt: dog (1 vector)" in drawn and "my-cat (2 vectors), in 2 of 3 captions and 2 " in drawn
    )
    assert "bad-hands (3 vectors), in 0 of 3 captions and 1 prompt" in drawn
    told = place.train(TAGS, "--embeddings", cat).metadata
    assert json.loads(told["lorasmith.embeddings"]) == ["my-cat"]
    for options in (["--no-share-captions"], ["--metadata", "minimal"], ["--caption", "x"]):
        captions = ["green"] * 3 if options[0] == "--caption" else TAGS
        assert "lorasmith.embeddings" not in place.train(captions, "--embeddings", cat, *options).metadata
    assert "embeddings my-cat" not in plan([*place.words(TAGS), "--output", str(tmp_path / "none")])


def test_prompts_are_drawn_with_embeddings(place: Place, cat: Path, tmp_path: Path) -> None:
    def drawn(prompt: str, *options: object) -> bytes:
        output = tmp_path / prompt.replace(" ", "-") / str(len(options))
        words = place.words(TAGS, "--steps", 1, "--before-after", "--prompts", prompt, *options)
        with contextlib.redirect_stdout(io.StringIO()):
            assert main([*words, "--sample-steps", "2", "--output", str(output)]) == 0
        return min((output / "samples").rglob("00.png")).read_bytes()  # before training

    assert drawn("a my-cat", "--embeddings", cat) == drawn("a red fox") != drawn("a my-cat")


def test_captions_are_as_long_as_their_embeddings_make_them(place: Place, tmp_path: Path) -> None:
    long = webui(tmp_path / "long.pt", torch.zeros(70, 24))
    captions = ["a long one two three four five", "a long day", "a day"]
    page = plan(place.words(captions, "--embeddings", long, "--output", tmp_path / "none"))
    assert "1 caption is longer than 75 tokens, and the last words are not used: 0.png" in page


def test_what_is_cached_with_other_vectors_of_that_name_is_not_used(place: Place, tmp_path: Path) -> None:
    for text in ("red fox", "blue bird"):
        path = webui(tmp_path / text.replace(" ", "-") / "my-cat.pt", vectors_of(place, text))
        options = ["--train", "unet", "--cache-dir", tmp_path / "cache"]
        words = [tags.replace("red fox", text) for tags in WITH_WORDS]
        assert same(place.train(TAGS, "--embeddings", path, *options), place.train(words, *options))
    page = plan(place.words(TAGS, "--embeddings", path, *options, "--output", tmp_path / "none"))
    assert "text embeddings: 3 of 3 are there" in page
    page = plan(place.words(TAGS, *options, "--output", tmp_path / "none"))
    assert "text embeddings: 3 of 3 are there" not in page


# ---- resume --------------------------------------------------------------------------------------------------------


@pytest.fixture
def begun(place: Place, cat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of 4 steps that was started in another folder, with relative paths, and stopped after 2."""
    monkeypatch.chdir(cat.parent.parent)
    words = place.words(TAGS, "--embeddings", os.path.relpath(cat), "--steps", 4, "--output", tmp_path / "run")
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([*words, "--state-every-steps", "2", "--keep-states", "9"]) == 0
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(tmp_path / "run" / "states" / "step-00000004")
    (tmp_path / "run" / "last.safetensors").rename(tmp_path / "whole.safetensors")
    return tmp_path / "run"


def bytes_are_those_of_the_whole(run: Path) -> bool:
    return (run / "last.safetensors").read_bytes() == (run.parent / "whole.safetensors").read_bytes()


def test_a_resumed_run_has_the_same_embeddings_from_anywhere(begun: Path) -> None:
    assert resumed(begun) == 0 and bytes_are_those_of_the_whole(begun)


def test_a_resumed_run_may_find_them_elsewhere_and_others_for_its_prompts(begun: Path, cat: Path) -> None:
    folder = begun.parent / "moved"
    shutil.copytree(cat.parent, folder)
    webui(folder / "bad-hands.pt", torch.zeros(3, 24))
    assert resumed(begun, "--embeddings", folder, "--negative", "bad-hands") == 0 and bytes_are_those_of_the_whole(
        begun
    )


@pytest.mark.parametrize("change", ["other vectors", "one more", "none"])
def test_a_run_does_not_go_on_with_other_embeddings(
    change: str, place: Place, begun: Path, cat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = begun.parent
    given = {
        "other vectors": [webui(folder / "my-cat.pt", vectors_of(place, "blue bird"))],
        "one more": [cat, webui(folder / "sks.pt", torch.zeros(1, 24))],
        "none": [],
    }[change]
    assert resumed(begun, "--embeddings", *given) == 2
    assert "or embeddings, the dataset file or .npz files say something else" in " ".join(
        capsys.readouterr().err.split()
    )


def test_names_may_be_put_together_from_variants_so_that_none_may_change(
    place: Place, cat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = place.words(
        ["{my|a}-cat"] * 3, "--wildcards", "--steps", 1, "--embeddings", cat, "--output", tmp_path / "run"
    )
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(words) == 0
    assert resumed(tmp_path / "run", "--steps", 2, "--embeddings") == 2
    assert "or embeddings, the dataset file or .npz files say something else" in " ".join(
        capsys.readouterr().err.split()
    )
    assert resumed(tmp_path / "run", "--steps", 2) == 0


def test_embeddings_that_are_gone_are_asked_for(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = webui(tmp_path / "my-cat.pt", torch.zeros(1, 24))
    words = place.words(TAGS, "--steps", 1, "--embeddings", own, "--output", tmp_path / "run")
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(words) == 0
    own.unlink()
    assert resumed(tmp_path / "run", "--steps", 2) == 2
    assert f"{own}, the run's embeddings, is not there any more; give its new place" in capsys.readouterr().err


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wide", "xl", "web page", "none there", "twice"])
def test_files_of_no_use_are_told_before_anything_is_made(
    kind: str, place: Place, cat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.safetensors"
    message = {
        "wide": "vectors 1024 wide, as for Stable Diffusion 2.x, but the base model's text encoder has 24",
        "xl": "an embedding for SDXL",
        "web page": "is a web page",
        "none there": "there is no such file or folder",
        "twice": "two embeddings are called my-cat",
    }[kind]
    if kind == "wide":
        save_file({"emb_params": torch.zeros(1, 1024)}, path)
    elif kind == "xl":
        save_file({"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}, path)
    elif kind == "web page":
        path.write_text("<!doctype html>")
    elif kind == "twice":
        path = webui(tmp_path / "my-cat.pt", torch.zeros(1, 24))
    assert main(place.words(TAGS, "--embeddings", cat, path, "--output", tmp_path / "out")) == 2
    assert message in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "out").exists()
