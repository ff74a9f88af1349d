"""The plan as a page: everything is said, nothing is cut, lines fit where words let them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.data.buckets import cover_and_crop
from lorasmith.data.records import ImageRecord
from lorasmith.plan_page import caption_lines, memory_line, plan_page, shape_lines

WIDTH = 118
WORDS = st.lists(
    st.text(st.characters(categories=["Lu", "Ll", "Nd", "Pd", "Po"]), min_size=1, max_size=40), max_size=60
)


def records(*sizes: tuple[int, int], caption: str = "a dog") -> list[ImageRecord]:
    return [ImageRecord(Path(f"{number}.png"), caption, size) for number, size in enumerate(sizes)]


@given(WORDS)
def test_every_word_stands_whole_and_in_order_in_lines_that_fit(words: list[str]) -> None:
    page = plan_page("title", {"model": [" ".join(words)]})
    lines = page.splitlines()
    assert " ".join(" ".join(lines[2:]).split()) == " ".join(["model", *words])
    assert max(map(len, lines)) <= WIDTH


def test_a_path_is_never_broken() -> None:
    path = "/home/somebody/my-pictures/of-my-dog/" + "x-" * 80 + "last.safetensors"
    page = plan_page("title", {"output": [f"the file goes to the place that was asked for, which is {path}"]})
    assert path in page


def test_names_stand_once_at_the_left_and_their_lines_below_each_other() -> None:
    page = plan_page("the title", {"model": ["first", "second"], "steps": ["third"]})
    title, empty, *lines = page.splitlines()
    assert (title, empty) == ("the title", "")
    assert [line.split() for line in lines] == [["model", "first"], ["second"], ["steps", "third"]]
    assert len({line.index(word) for line, word in zip(lines, ["first", "second", "third"], strict=True)}) == 1


def test_a_paragraph_of_nothing_is_left_out() -> None:
    assert plan_page("title", {"pictures": [], "steps": ["4"]}) == plan_page("title", {"steps": ["4"]})


def test_captions_are_counted_commonest_first_and_none_is_forgotten() -> None:
    found = [*records((8, 8), caption="a cat"), *records((8, 8), (8, 8), caption="a dog")]
    assert caption_lines(found) == ['"a dog" (2 pictures)', '"a cat" (1 picture)']
    many = [ImageRecord(Path("x"), f"caption {number}", (8, 8)) for number in range(9)]
    assert caption_lines(many, shown=4)[-1] == "and 5 more different captions"
    assert len(caption_lines(many, shown=9)) == 9


def test_shapes_add_up_to_all_pictures() -> None:
    found = records((512, 512), (512, 768), (600, 600))
    shapes = [(512, 512), (512, 768), (512, 512)]
    crops = [cover_and_crop(record.size, shape) for record, shape in zip(found, shapes, strict=True)]
    assert shape_lines(found, crops) == ["2 pictures as 512x512", "1 picture as 512x768"]
    assert shape_lines(found, crops, shown=1)[1] == "and 1 more shapes"


def test_enlarged_pictures_are_named() -> None:
    found = records((512, 512), (100, 100))
    lines = shape_lines(found, [cover_and_crop(record.size, (256, 256)) for record in found])
    assert any("enlarged" in line and "1.png" in line and "0.png" not in line for line in lines)


def test_what_cropping_costs_is_told_with_the_worst_picture() -> None:
    found = records((512, 512), (1024, 512))
    lines = shape_lines(found, [cover_and_crop(record.size, (512, 512)) for record in found])
    assert "25% of the area on average, at most 50% (1.png)" in lines[-1] and "--buckets" in lines[-1]


@pytest.mark.parametrize("size", [0, 2**19])
def test_memory_of_a_miniature_lists_nothing(size: int) -> None:
    assert memory_line({"weights": size}) == "about 0.0 GiB while training"


def test_memory_lists_what_counts() -> None:
    line = memory_line({"weights": 2**30, "activations": 2**31, "latents": 5})
    assert line == "about 3.0 GiB while training (weights 1.00, activations 2.00)"
