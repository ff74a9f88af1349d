"""`lorasmith caption` through the command, with small random models of the real classes."""

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, BlipForConditionalGeneration, BlipProcessor

from lorasmith import cli
from tests.taggers import tiny

SIZES = [(40, 30), (30, 40), (64, 64), (50, 90), (33, 47)]
WRITERS: dict[str, Callable[[Path], Path]] = {
    "blip": tiny.write_blip,
    "idefics3": tiny.write_idefics3,
    "llava": tiny.write_llava,
    "florence2": tiny.write_florence2,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: write(folder / name) for name, write in WRITERS.items()}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, (width, height) in enumerate(SIZES):
        pixels = random.Random(number).randbytes(width * height * 3)
        Image.frombytes("RGB", (width, height), pixels).save(folder / f"{number}.png")
    return folder


def caption(photos: Path, model: Path, *options: str) -> int:
    captioner = "blip" if model.name == "blip" else "vision-language"
    fixed = ["--captioner", captioner, "--device", "cpu", "--max-length", "8", "--min-length", "4"]
    return cli.main(["caption", str(photos), "--model", str(model), *fixed, *options])


def texts(folder: Path, extension: str = ".caption") -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.rglob(f"*{extension}"))}


def images(photos: Path) -> list[Image.Image]:
    return [Image.open(path) for path in sorted(photos.glob("*.png"))]


def lines(found: Sequence[str]) -> list[str]:
    return [" ".join(text.split()) + "\n" for text in found]


@pytest.mark.parametrize("beams", [1, 3])
def test_blip_says_what_transformers_own_code_says(photos: Path, models: dict[str, Path], beams: int) -> None:
    model = BlipForConditionalGeneration.from_pretrained(models["blip"]).eval()
    processor: Any = BlipProcessor.from_pretrained(models["blip"])
    expected = []
    for image in images(photos):
        inputs = processor(image, "a photo of", return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=8, min_new_tokens=4, num_beams=beams)
        expected.append(processor.decode(tokens[0], skip_special_tokens=True))
    options = ["--beams", str(beams), "--prompt", "a photo of", "--batch-size", "3"]
    assert caption(photos, models["blip"], *options) == 0
    assert list(texts(photos).values()) == lines(expected)
    assert len(set(expected)) > 1 and all(text.startswith("a photo of ") for text in expected)


@pytest.mark.parametrize("kind", ["idefics3", "llava"])
def test_models_that_talk_are_asked_by_their_chat_template(photos: Path, models: dict[str, Path], kind: str) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(models[kind]).eval()
    processor: Any = AutoProcessor.from_pretrained(models[kind])
    expected = []
    for image in images(photos):
        content = [{"type": "image", "image": image}, {"type": "text", "text": "Describe this red sofa"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        tokens = model.generate(**inputs, max_new_tokens=8, min_new_tokens=4)
        expected.append(processor.decode(tokens[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert caption(photos, models[kind], "--prompt", "Describe this red sofa", "--batch-size", "3") == 0
    assert list(texts(photos).values()) == lines(expected) and len(set(expected)) > 1


def test_florence_2_is_given_its_task(photos: Path, models: dict[str, Path]) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(models["florence2"]).eval()
    processor: Any = AutoProcessor.from_pretrained(models["florence2"])
    expected = []
    for image in images(photos):
        inputs = processor(images=image, text="<DETAILED_CAPTION>", return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=8, min_new_tokens=4)
        expected.append(processor.decode(tokens[0], skip_special_tokens=True))
    assert caption(photos, models["florence2"], "--batch-size", "3") == 0
    assert list(texts(photos).values()) == lines(expected) and len(set(expected)) > 1


def test_an_own_prompt_changes_what_is_said(photos: Path, models: dict[str, Path]) -> None:
    assert caption(photos, models["idefics3"]) == 0
    assert caption(photos, models["idefics3"], "--prompt", "cat", "--caption-extension", "txt") == 0
    assert texts(photos) != texts(photos, ".txt")


@pytest.mark.parametrize("kind", ["blip", "idefics3"])
def test_draws_belong_to_the_picture_alone(photos: Path, models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    draw = ["--top-p", "0.95", "--caption-extension"]
    assert caption(photos, models[kind], *draw, "whole", "--batch-size", "5") == 0
    whole = texts(photos, ".whole")
    assert caption(photos, models[kind], *draw, "one", "--batch-size", "1") == 0
    for shard in ("2/2", "1/2"):
        assert caption(photos, models[kind], *draw, "part", "--batch-size", "2", "--shard", shard) == 0
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for number in range(len(SIZES)):
        shutil.copy(photos / f"{number}.png", renamed / f"{9 - number}.png")
    assert caption(renamed, models[kind], *draw, "whole", "--batch-size", "2") == 0
    assert whole == texts(photos, ".one") == texts(photos, ".part")
    assert whole == {str(9 - int(name)): text for name, text in texts(renamed, ".whole").items()}
    assert caption(photos, models[kind], *draw, "other", "--seed", "43") == 0
    assert texts(photos, ".other") != whole


def test_existing_captions_are_skipped_overwritten_or_added_to(
    photos: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert caption(photos, models["blip"], "--caption-extension", "new") == 0
    new = texts(photos, ".new")["0"]
    (photos / "0.caption").write_bytes(b"sks dog,\r\nsecond line")
    (photos / "1.CAPTION").write_text("mine")
    assert caption(photos, models["blip"]) == 0
    out = capsys.readouterr().out
    assert "3 captions written" in out and "; 2 had theirs already" in out
    assert (photos / "0.caption").read_bytes() == b"sks dog,\r\nsecond line"
    for _ in range(2):
        assert caption(photos, models["blip"], "--existing", "append") == 0
        assert (photos / "0.caption").read_bytes() == f"sks dog, {new.strip()}\r\nsecond line".encode()
    assert caption(photos, models["blip"], "--existing", "overwrite") == 0
    assert (photos / "0.caption").read_text() == new


def test_nothing_left_to_do_loads_no_model(
    photos: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert caption(photos, models["blip"]) == 0
    assert caption(photos, photos / "no model") == 0
    assert "0 captions written" in capsys.readouterr().out


def test_phrases_are_cut_by_a_table(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "reader.py").write_text(
        "def load(options):\n    return lambda images: ['there is a cat with the words hello\\non it'] * len(images)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    command = ["caption", str(photos), "--captioner", "own.reader", "--existing", "overwrite"]
    assert cli.main(command) == 0
    assert texts(photos)["0"] == "there is a cat with the words hello on it\n"
    assert cli.main([*command, "--remove-phrases", "habits"]) == 0
    assert texts(photos)["0"] == "a cat\n"
    (tmp_path / "table.txt").write_text("# mine\n\\bcat\\b\n")
    assert cli.main([*command, "--remove-phrases", str(tmp_path / "table.txt")]) == 0
    assert texts(photos)["0"] == "there is a with the words hello on it\n"


def test_pictures_that_cannot_be_captioned_are_listed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    (tmp_path / "quiet").mkdir()
    (tmp_path / "quiet" / "one.py").write_text(
        "def load(options):\n    return lambda images: ['' if one.width == 64 else 'a' for one in images]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["caption", str(photos), "--captioner", "quiet.one"]) == 1
    out = capsys.readouterr().out
    assert f"{photos / '2.png'}: the model said nothing" in out and f"{photos / 'broken.jpg'}: not a picture" in out
    assert sorted(texts(photos)) == ["0", "1", "3", "4"]


def test_a_module_that_gives_too_few_results_is_told_so(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lazy").mkdir()
    (tmp_path / "lazy" / "one.py").write_text("def load(options):\n    return lambda images: ['a']\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["caption", str(photos), "--captioner", "lazy.one"]) == 2
    assert "gave 1 results for 4 pictures; expected one for each" in capsys.readouterr().err and not texts(photos)


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (["--captioner", "blib"], "no tagger named 'blib'; did you mean blip?"),
        (["--captioner", "wd14"], "this makes tags, not captions; it belongs to `lorasmith tag`"),
        (["--top-p", "1.5"], "--top-p 1.5: expected a number"),
        (["--top-p", "0.9", "--beams", "2"], "leave out one of them"),
        (["--min-length", "9"], "min_length = 9 is above max_length = 8"),
        (["--shard", "3/2"], "--shard 3/2: expected part i of n parts"),
        (["--device", "cuda:77"], "--device cuda:77: not here"),
        (["--device", "cpu", "--precision", "fp16"], "--precision fp16 needs a GPU"),
        (["--caption-extension", "jpg"], "extension jpg: this cannot be one of text files"),
        (["--remove-phrases", "nowhere.txt"], "expected habits, the table that comes along, or a file"),
    ],
)
def test_wrong_options(
    photos: Path, models: dict[str, Path], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert caption(photos, models["blip"], *options) == 2
    assert message in capsys.readouterr().err and not texts(photos)


def test_a_table_with_a_line_that_is_no_expression(
    photos: Path, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "table.txt").write_text("fine\n(open\n")
    assert caption(photos, models["blip"], "--remove-phrases", str(tmp_path / "table.txt")) == 2
    assert "table.txt, line 2: this is no regular expression" in capsys.readouterr().err


@pytest.mark.parametrize("kind, room", [("blip", 64), ("idefics3", 512), ("florence2", 128)])
def test_captions_longer_than_the_model_has_room_for(
    photos: Path, models: dict[str, Path], kind: str, room: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert caption(photos, models[kind], "--max-length", str(room)) == 2
    error = capsys.readouterr().err
    assert f"--max-length {room}: the model has room for {room} tokens" in error and not texts(photos)
    most = error.partition("give at most ")[2].partition(",")[0]
    assert caption(photos, models[kind], "--max-length", most) == 0


@pytest.mark.parametrize(
    "removed, message",
    [
        ("config.json", "lacks config.json"),
        ("*.safetensors", "lacks *.safetensors"),
        ("processor_config.json", "lacks preprocessor_config.json or processor_config.json"),
        ("tokenizer.json vocab.txt", "lacks tokenizer.json or vocab.txt"),
    ],
)
def test_incomplete_models(
    photos: Path,
    models: dict[str, Path],
    tmp_path: Path,
    removed: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(models["blip"], tmp_path / "blip", ignore=shutil.ignore_patterns(*removed.split()))
    assert caption(photos, Path(folder)) == 2
    assert message in capsys.readouterr().err and not texts(photos)


def test_weights_that_are_missing_are_not_made_up(
    photos: Path, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(models["blip"], tmp_path / "blip"))
    weights: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    del weights["vision_model.post_layernorm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert caption(photos, folder) == 2
    assert "1 weights are not in its files, such as vision_model.post_layernorm.weight" in capsys.readouterr().err


def test_models_of_another_kind(photos: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["caption", str(photos), "--device", "cpu", "--model", str(models["llava"])]
    assert cli.main(options) == 2
    assert "this is a model of the kind llava, not BLIP; try --captioner vision-language" in capsys.readouterr().err
    (photos / "config.json").write_text('{"model_type": "bert"}')
    for name in ("tokenizer.json", "processor_config.json", "model.safetensors"):
        (photos / name).write_text("{}")
    options = ["caption", str(photos), "--device", "cpu", "--captioner", "vision-language", "--model", str(photos)]
    assert cli.main(options) == 2
    assert "this cannot be loaded as a captioner here" in capsys.readouterr().err
