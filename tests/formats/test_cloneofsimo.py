"""Positional files: which sidecar is meant, and that a list is told by its length."""

from pathlib import Path

import pytest
import torch

from lorasmith.errors import UserError
from lorasmith.formats import cloneofsimo
from tests.formats import writers


@pytest.mark.parametrize("is_old", [True, False])
def test_the_order_is_the_one_of_published_files_or_of_later_ones(is_old: bool) -> None:
    layers = [f"lora_{part}" for part in ("unet_x", "te_x")]
    assert cloneofsimo.place_of(layers, is_old_order=is_old) == {
        part: writers.first_programs_names(part, new_order=not is_old) for part in ("unet", "text_encoder")
    }


def test_two_sidecars_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    assert cloneofsimo.find_sidecar(path) is None
    (tmp_path / "a_txt.pt").touch()
    assert cloneofsimo.find_sidecar(path) == tmp_path / "a_txt.pt"
    (tmp_path / "a.text_encoder.pt").touch()
    with pytest.raises(UserError, match="move away"):
        cloneofsimo.find_sidecar(path)


@pytest.mark.parametrize("depth, family", [(12, "sd1"), (23, "sd2")])
def test_a_text_encoder_is_told_by_its_number_of_pairs(depth: int, family: str) -> None:
    names = writers.first_programs_names("text_encoder", depth=depth)
    pairs = [(torch.ones(4, 1), torch.ones(1, 4))] * len(names)
    assert cloneofsimo.layers(Path("a.pt"), "text_encoder", pairs) == names
