"""What a WD14 tagger is shown, and where it computes."""

import numpy as np
import pytest
from PIL import Image

from lorasmith.errors import UserError
from lorasmith.taggers.wd14 import _providers, prepare


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (20, 10)])
def test_pictures_are_padded_to_a_square_with_white_and_blue_comes_first(size: tuple[int, int]) -> None:
    pixels = prepare(Image.new("RGB", size, (255, 10, 0)), 20)
    assert pixels.shape == (20, 20, 3) and pixels.dtype == np.float32
    upright = pixels if size[0] > size[1] else pixels.transpose(1, 0, 2)
    assert (upright[[0, -1]] == 255).all() and (upright[[9, 10]] == [0, 10, 255]).all()


def test_a_picture_of_the_right_size_is_shown_as_it_is() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert (prepare(Image.fromarray(noise), 8)[:, :, ::-1] == noise).all()


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    here = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    gpu = ("CUDAExecutionProvider", {"device_id": "3"})
    assert _providers("auto", here) == [gpu, "CPUExecutionProvider"] == _providers("cuda, CPUExecutionProvider", here)
    assert _providers("tensorrt", here) == ["TensorrtExecutionProvider"]
    with pytest.raises(UserError, match="expected auto or some of tensorrt, cuda, cpu"):
        _providers("rocm", here)
