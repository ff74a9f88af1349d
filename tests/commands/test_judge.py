"""`lorasmith judge`: scores of what was drawn, as the embedding models' own classes give them, and what it refuses."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lorasmith import model_families
from lorasmith.adapters.lora import LoRA
from lorasmith.checkpoint import open_checkpoint
from lorasmith.cli import main
from lorasmith.formats import kohya
from lorasmith.picture_run import drawing
from tests.tiny import write_tiny
from tests.tiny_judges import write_clip, write_dino

PROMPTS = ["a cat", "a dog"]
OTHERS = ["a sea", "a hut", "a key"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base model, three LoRAs of a run of which one changes nothing, training pictures, and judges."""
    place = tmp_path_factory.mktemp("given")
    base = write_tiny(place / "base.safetensors", resolution=64)
    for number, (name, strength) in enumerate({"step-00000010": 0.0, "step-00000020": 0.05, "last": 0.4}.items()):
        write_lora(place / "run" / f"{name}.safetensors", base, strength, seed=number)
    (place / "photos" / "10_cat").mkdir(parents=True)
    for number in range(4):
        noise = torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(number))
        Image.fromarray((noise * 255).byte().numpy()).resize((48, 64)).save(place / "photos/10_cat" / f"{number}.png")
    return {
        "base": base, "run": place / "run", "photos": place / "photos",
        "clip": write_clip(place / "clip"), "dino": write_dino(place / "dino"),
    }  # fmt: skip


def write_lora(path: Path, base: Path, std: float, seed: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    with open_checkpoint(base) as checkpoint:
        shapes = model_families.target_shapes(checkpoint)
    for name in sorted(shapes)[::8]:
        adapter = LoRA(shapes[name], 2, alpha=2)
        for parameter in adapter.parameters():
            parameter.data.normal_(std=std, generator=generator) if std else parameter.data.zero_()
        tensors |= {f"{name}.{key}": value.detach() for key, value in adapter.state_dict().items()}
    kohya.write(path, tensors, {"ss_network_dim": "2"})
    return path


@pytest.fixture(scope="module")
def judge(given: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    def run(
        judge: str, *more: object, loras: Path | None = None, pictures: Path | None = None,
        output: Path | None = None, code: int = 0,
    ) -> dict[str, Any]:  # fmt: skip
        folder = output or tmp_path_factory.mktemp("judged") / "out"
        words = [
            loras or given["run"], "--base", given["base"], "--pictures", pictures or given["photos"],
            "--prompts", *PROMPTS, "--unrelated-prompts", *OTHERS, "--images", 2, "--steps", 1, "--device", "cpu",
            "--judge", given.get(judge, judge), "--output", folder, "--batch-size", 8, *more,
        ]  # fmt: skip
        assert main(["judge", *map(str, words)]) == code
        if code:
            return {}
        made = sorted(folder.parent.glob(f"{folder.name}*"))[-1]
        return json.loads((made / "judge.json").read_text(encoding="utf-8")) | {"folder": made}

    return run


@pytest.fixture(scope="module")
def judged(judge: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What CLIP says of all three LoRAs."""
    return judge("clip")


def test_scores_are_those_of_the_pictures_that_were_written(judged: dict[str, Any], given: dict[str, Path]) -> None:
    told = judged
    model = CLIPModel.from_pretrained(given["clip"])
    processor = CLIPImageProcessorPil.from_pretrained(given["clip"])

    def features(paths: list[Path]) -> torch.Tensor:
        pixels = processor(images=[Image.open(path).convert("RGB") for path in paths], return_tensors="pt")
        with torch.no_grad():
            return F.normalize(model.get_image_features(**pixels).pooler_output, dim=1)  # pyright: ignore

    training = features(sorted(given["photos"].rglob("*.png")))
    base = features([told["folder"] / one["file"] for one in told["base_pictures"]["unrelated"]])
    for one in told["candidates"]:
        drawn = features([told["folder"] / each["file"] for each in one["pictures"]])
        others = features([told["folder"] / each["file"] for each in one["unrelated"]])
        assert one["scores"]["likeness"] == pytest.approx((drawn @ training.T).mean().item(), abs=1e-5)
        assert one["scores"]["damage"] == pytest.approx(1 - (base * others).sum(1).mean().item(), abs=1e-5)
        own_prompts = (1 - (drawn[0] @ drawn[1]).item()) / 2 + (1 - (drawn[2] @ drawn[3]).item()) / 2
        assert one["scores"]["diversity"] == pytest.approx(own_prompts, abs=1e-5)
        assert [(each["prompt"], each["seed"]) for each in one["pictures"]] == [(p, s) for p in PROMPTS for s in (1, 2)]


def test_each_lora_is_tried_at_each_strength_and_stands_in_the_table(
    judge: Callable[..., dict[str, Any]], given: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    loras = [given["run"] / f"{name}.safetensors" for name in ("last", "step-00000020")]

    told = judge("dino", *loras[1:], "--strengths", "0.5", "1", "--images", "1", loras=loras[0])
    out = capsys.readouterr().out

    names = [one["name"] for one in told["candidates"]]
    assert names == ["last at 0.5", "last at 1", "step-00000020 at 0.5", "step-00000020 at 1"]
    assert [one["seed"] for one in told["base_pictures"]["pictures"]] == [1, 1]
    assert [one["seed"] for one in told["base_pictures"]["unrelated"]] == [1, 2, 3]
    assert len({one["scores"]["damage"] for one in told["candidates"]}) == 4
    assert all(re.search(rf"^{name} +-?[\d.]+ ", out, re.MULTILINE) for name in ["base model", *names])
    assert told["verdict"] in out
    # what one prompt's picture and a judge of pictures alone cannot tell
    for one in told["candidates"]:
        assert one["scores"]["adherence"] is None
        assert one["scores"]["diversity"] is None
        assert set(one["shares"]) == {"likeness", "copying", "damage"}
    assert "adherence is not scored" in out
    assert "diversity is not scored" in out


def test_a_lora_that_changes_nothing_is_worth_nothing_and_does_no_damage(judged: dict[str, Any]) -> None:
    told = judged

    still = next(one for one in told["candidates"] if "step-00000010" in one["name"])
    base = told["reference"]["base"]

    assert still["scores"] == pytest.approx(base)
    assert still["scores"]["damage"] == 0
    assert still["overall"] == 0
    assert next(one for one in told["candidates"] if "last" in one["name"])["scores"]["damage"] > 1e-4


def test_a_lora_whose_pictures_were_trained_on_copies_them(
    judge: Callable[..., dict[str, Any]], judged: dict[str, Any], given: dict[str, Path], tmp_path: Path
) -> None:
    lora = given["run"] / "last.safetensors"
    [first] = [one for one in judged["candidates"] if one["name"] == "last at 1"]
    photos = tmp_path / "photos"
    photos.mkdir()
    for one in first["pictures"]:
        Image.open(judged["folder"] / one["file"]).save(photos / Path(one["file"]).name)

    told = judge("clip", loras=lora, pictures=photos)

    scores = told["candidates"][0]["scores"]
    assert scores["copying"] == 1
    assert [Path(one["nearest"]).name for one in told["candidates"][0]["pictures"]] == sorted(
        path.name for path in photos.iterdir()
    )
    assert scores["likeness"] > first["scores"]["likeness"]
    assert told["recommended"] is None


def test_the_page_stands_alone_and_its_links_lead_to_pictures(judged: dict[str, Any]) -> None:
    told = judged

    page = (told["folder"] / "index.html").read_text(encoding="utf-8")

    assert told["verdict"].partition(":")[0] in page
    assert all(source.startswith("data:image/jpeg;base64,") for source in re.findall(r'src="([^"]*)"', page))
    links = re.findall(r'href="([^"]*)"', page)
    assert len(links) >= 4 * (4 + 3)  # four rows: the base model's and three LoRAs'
    for link in links:
        with Image.open(told["folder"] / link) as picture:
            assert picture.size == (64, 64)
            [name] = re.findall(r"^cells/\d+-\d+-\d+-(.*?)(?:-1)?\.png$", link)
            assert ("Lora hashes" in picture.info["parameters"]) == (name != "base")
            assert (f"<lora:{name}:1>" in picture.info["parameters"]) == (name != "base")


def test_the_embedded_judge_judges_the_demo_and_has_other_prompts_for_it(
    judge: Callable[..., dict[str, Any]], given: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    told = judge("demo", "--prompts", "a sks robot", "--images", "1")

    assert all(0 <= one["scores"]["adherence"] <= 1 for one in told["candidates"])
    assert "the embedded model's own judge" in capsys.readouterr().out


def test_one_that_was_stopped_goes_on_and_another_judge_takes_the_same_pictures(
    judge: Callable[..., dict[str, Any]], given: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    real, calls = drawing.draw, []

    def stopping(*args: Any, **settings: Any) -> Any:
        calls.append(settings["seeds"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **settings)

    monkeypatch.setattr(drawing, "draw", stopping)
    lora, place = given["run"] / "last.safetensors", tmp_path / "judged"
    common = {"loras": lora, "output": place}
    assert judge("clip", "--batch-size", 4, **common, code=130) == {}
    assert re.search(r"^7 of 14 pictures are drawn", capsys.readouterr().out, re.MULTILINE)
    before = {path.name: path.read_bytes() for path in place.rglob("*.png")}
    assert not (place / "index.html").exists()

    told = judge("clip", **common)
    assert "7 of these were drawn before" in capsys.readouterr().out
    assert sum(map(len, calls[3:])) == 14 - 7
    assert before.items() <= {path.name: path.read_bytes() for path in (place / "cells").iterdir()}.items()
    by_others = judge("dino", **common)
    assert (tmp_path / "judged-2" / "index.html").exists() and sum(map(len, calls[3:])) == 14 - 7
    assert by_others["candidates"][0]["scores"] != told["candidates"][0]["scores"]
    assert (place / "judge.json").read_text() != (tmp_path / "judged-2" / "judge.json").read_text()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"--judge": None}, "missing: --judge"),
        ({"--pictures": None}, "missing: --pictures"),
        ({"--prompts": None}, "missing: --prompts"),
        ({"--base": None}, "missing: --base"),
        ({"--lora": None}, "missing: LORA"),
        ({"--lora": "nowhere.safetensors"}, "nowhere.safetensors: there is no such LoRA file"),
        ({"--lora": "{empty}"}, "no LoRA lies in this folder"),
        ({"--pictures": "{empty}"}, "no pictures found in"),
        ({"--pictures": "nowhere"}, "nowhere"),
        ({"--judge": "nowhere"}, "--judge nowhere: there is no such folder"),
        ({"--judge": "{base}"}, "this is a file"),
        ({"--judge": "demo"}, "names none of them"),
        ({"--prompts": "a {red|blue} cat"}, "have variants"),
        ({"--prompts": "a cat <lora:robot:1>"}, "none can name LoRAs"),
        ({"--unrelated-prompts": "a sea"}, "give two or more"),
        ({"--unrelated-prompts": "{empty}.txt"}, "--unrelated-prompts {empty}.txt: no prompt in it"),
        ({"--strengths": "0"}, "strength 0 is the base model alone"),
        ({"--output": "{clip}/config.json/x"}, "no folder can be made there"),
        ({"--prompts": f"a cat --d {2**63 - 1}"}, "is too large; seeds go up to"),
        ({"--prompts": "a cat --n {bad|worse}"}, "have variants"),
        ({"--negative": "{bad|worse}"}, "have variants"),
        ({"--prompts": "{twice}"}, "'a cat' is drawn twice from seed 2"),
        ({"--size": "68,64"}, "not a multiple of 8"),
        ({"--lora": "{sd2}"}, "is a LoRA for SD 2.x"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_a_line_before_a_model_is_loaded(
    given: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str | None],
    told: str,
) -> None:
    for place in ("lorasmith.picture_run.drawing.model_families.load", "lorasmith.picture_judges.load"):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("something was loaded"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "twice.txt").write_text("a cat --d 2\na cat\n")
    places = {**given, "empty": tmp_path / "empty", "twice": tmp_path / "twice.txt"}
    if "{sd2}" in changes.values():
        other = write_tiny(tmp_path / "sd2.safetensors", "sd2", resolution=64)
        places["sd2"] = write_lora(tmp_path / "loras" / "two.safetensors", other, 0.1, seed=0)
    options: dict[str, Any] = {
        "--lora": given["run"], "--base": given["base"], "--pictures": given["photos"], "--prompts": "a cat",
        "--judge": given["clip"], "--output": tmp_path / "out", **changes,
    }  # fmt: skip
    words = [word for name, value in options.items() if value is not None for word in (name, str(value))]

    code = main(["judge", *(re.sub(r"\{(\w+)\}", lambda match: str(places[match[1]]), word) for word in words)])

    error = capsys.readouterr().err
    assert code == 2
    assert told.replace("{empty}", str(places["empty"])) in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_unreadable_training_picture_is_named(
    given: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "broken.png").write_bytes(b"no picture")

    code = main(
        [
            "judge", str(given["run"]), "--base", str(given["base"]), "--pictures", str(tmp_path / "photos"),
            "--prompts", "a cat", "--judge", str(given["clip"]), "--output", str(tmp_path / "out"),
        ]
    )  # fmt: skip

    assert code == 2
    assert "broken.png" in capsys.readouterr().err
