"""The second pass: its size and steps, and upscalers that fail."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image

from lorasmith.config import GenerateConfig
from lorasmith.errors import UserError
from lorasmith.models.base import ModelFacts
from lorasmith.picture_run import highres
from lorasmith.picture_run.highres import Highres


class _Facts:
    latent_factor = 8


FACTS = cast(ModelFacts, _Facts())


@pytest.mark.parametrize("scale, expected", [(2, (128, 192)), (512 / 288, (112, 168)), (1.5, (96, 144))])
def test_sides_are_rounded_down_to_what_can_be_drawn(scale: float, expected: tuple[int, int]) -> None:
    assert Highres(GenerateConfig(highres_scale=scale), FACTS).size((64, 96)) == expected
    assert Highres(GenerateConfig(highres_scale=512 / 288), FACTS).size((288, 288)) == (512, 512)


def test_steps_are_those_of_the_first_pass_unless_they_are_given() -> None:
    assert Highres(GenerateConfig(highres_scale=2), FACTS).drawn_steps(20) == 10
    assert Highres(GenerateConfig(highres_scale=2, highres_steps=30, highres_denoise=0.3), FACTS).drawn_steps(20) == 9


@pytest.mark.parametrize(
    "body, said",
    [
        ("raise ValueError('too dark')", r"--highres-upscaler bad_\w+.enlarge failed: ValueError: too dark"),
        ("return picture.size", "gave tuple; a PIL picture is expected of it"),
    ],
)
def test_an_upscaler_that_fails_is_told(body: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = f"bad_{abs(hash(body))}"
    (tmp_path / f"{module}.py").write_text(f"def enlarge(picture):\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(highres, "decoded", lambda *_: [Image.new("RGB", (64, 64))])
    second = Highres(GenerateConfig(highres_scale=2, highres_upscaler=f"{module}.enlarge"), FACTS)
    with pytest.raises(UserError, match=said):
        second.beginning(cast(Any, SimpleNamespace(encode_image=None)), torch.zeros(1, 4, 8, 8), (128, 128))
