import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModel, CLIPModel, CLIPProcessor

from lorasmith import picture_judges
from lorasmith.demo import FOLDER
from lorasmith.errors import UserError
from tests.tiny_judges import write_clip, write_dino

CPU = torch.device("cpu")
KINDS = ["clip", "dinov2", "dinov2_with_registers", "vit"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("judges")
    return {kind: write_clip(place / kind) if kind == "clip" else write_dino(place / kind, kind) for kind in KINDS}


def pictures(count: int = 5, seed: int = 0) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(seed)
    noise = (torch.rand(count, 3, 5, 3, generator=generator) * 255).byte().numpy()
    return [Image.fromarray(one).resize((70, 44)) for one in noise]


@pytest.mark.parametrize("kind", [*KINDS, "demo"])
def test_vectors_are_of_length_1_differ_and_do_not_depend_on_neighbours(folders: dict[str, Path], kind: str) -> None:
    judge = picture_judges.load(picture_judges.find(str(folders.get(kind, "demo")), "--judge"), CPU)
    seen = pictures(18)

    found = judge.embed(seen)

    assert torch.allclose(found.norm(dim=1), torch.ones(18))
    assert torch.pdist(found).min() > 1e-3
    torch.testing.assert_close(found[17:], judge.embed(seen[17:]))


def test_clip_is_asked_as_its_own_classes_ask_it(folders: dict[str, Path]) -> None:
    judge = picture_judges.load(picture_judges.find(str(folders["clip"]), "--judge"), CPU)
    seen, prompts = pictures(3), ["a cat", "a red dog", "a cat"]
    model = CLIPModel.from_pretrained(folders["clip"])
    processor: Any = CLIPProcessor.from_pretrained(folders["clip"])
    with torch.no_grad():
        output = model(**processor(text=prompts, images=seen, return_tensors="pt", padding=True))

    features = judge.embed(seen)

    torch.testing.assert_close(features, output.image_embeds)
    found = judge.adherence(seen, features, prompts)
    torch.testing.assert_close(found, output.logits_per_image.diagonal() / model.logit_scale.exp(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        ("clip", {"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 32, "do_center_crop": True,
                  "size": 32}),
        ("vit", {"feature_extractor_type": "ViTFeatureExtractor", "do_resize": True, "size": 32}),
        ("dinov2", {"image_processor_type": "BitImageProcessor", "crop_size": {"height": 32, "width": 32},
                    "do_center_crop": True, "do_convert_rgb": True, "size": {"shortest_edge": 36}}),
    ],
)  # fmt: skip
def test_what_lies_beside_the_weights_on_the_hub_is_read(tmp_path: Path, kind: str, stored: dict[str, Any]) -> None:
    """The first CLIP's and DINO's files are of years ago; none of them needs torchvision."""
    folder = write_clip(tmp_path / kind) if kind == "clip" else write_dino(tmp_path / kind, kind)
    usual = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.4], "image_std": [0.25, 0.25, 0.25], "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(usual | stored))

    judge = picture_judges.load(picture_judges.find(str(folder), "--judge"), CPU)

    assert torch.pdist(judge.embed(pictures(3))).min() > 1e-3


def test_a_prompt_longer_than_clip_reads_is_cut(folders: dict[str, Path]) -> None:
    judge = picture_judges.load(picture_judges.find(str(folders["clip"]), "--judge"), CPU)
    seen = pictures(2)

    found = judge.adherence(seen, judge.embed(seen), ["a " * 200, "a " * 300])

    assert found is not None
    assert found.isfinite().all()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_dino_sees_by_its_class_token_and_reads_nothing(folders: dict[str, Path], kind: str) -> None:
    choice = picture_judges.find(str(folders[kind]), "--judge")
    judge = picture_judges.load(choice, CPU)
    seen = pictures(1)
    pixels = torch.rand(1, 3, 32, 32)
    model = AutoModel.from_pretrained(folders[kind])

    features = judge.embed(seen)

    assert not choice.reads_text
    assert "pictures alone" in choice.title
    assert judge.adherence(seen, features, ["a cat"]) is None
    assert features.shape[1] == model(pixel_values=pixels).last_hidden_state.shape[-1]


def test_the_embedded_judge_reads_thing_and_colours() -> None:
    judge = picture_judges.load(picture_judges.find("demo", "--judge"), CPU)
    path = sorted((FOLDER / "pictures").glob("*/*.png"))[0]
    ground = path.with_suffix(".txt").read_text().split(" on a ")[1].split()[0]
    other = "black" if ground != "black" else "white"
    prompts = [f"a sks robot on a {ground} background", f"a sks robot on a {other} background", "a boat", "a dream"]
    seen = [Image.open(path)] * 4

    found = judge.adherence(seen, judge.embed(seen), prompts)

    assert found is not None
    right, half, wrong, unknown = found.tolist()
    assert right > 0.95
    assert half == pytest.approx(right - 0.5, abs=0.01)
    assert wrong < 0.05
    assert unknown == 0


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "config.json").unlink(), "lacks config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "lacks *.safetensors"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "lacks preprocessor_config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "lacks tokenizer.json or vocab.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "is damaged"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "of the kind bert"),
    ],
)
def test_what_is_no_judge_is_refused_before_loading(
    tmp_path: Path, damage: Callable[[Path], object], told: str
) -> None:
    damage(write_clip(tmp_path / "judge"))

    with pytest.raises(UserError) as error:
        picture_judges.find(str(tmp_path / "judge"), "--judge")

    assert told in str(error.value)


def test_no_weights_are_filled_with_random_numbers(tmp_path: Path) -> None:
    folder = write_dino(tmp_path / "judge")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))

    with pytest.raises(UserError, match="weights are not in its files"):
        picture_judges.load(picture_judges.find(str(folder), "--judge"), CPU)


def test_damaged_weights_are_told_in_a_line(tmp_path: Path) -> None:
    folder = write_dino(tmp_path / "judge")
    (folder / "model.safetensors").write_bytes(b"no")

    with pytest.raises(UserError, match="cannot be loaded here") as error:
        picture_judges.load(picture_judges.find(str(folder), "--judge"), CPU)

    assert "\n" not in str(error.value)
