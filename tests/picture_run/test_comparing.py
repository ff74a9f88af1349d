"""Names of pictures that are compared; the drawing itself is in the tests of the commands grid and judge."""

import re

import pytest

from lorasmith.picture_run.comparing import file_name, plain_number


@pytest.mark.parametrize("name", ["robot", 'a/b\\c:d*e?f"g<h>i|j\x00k', "猫" * 200, "..", "con"])
def test_a_file_of_any_lora_can_lie_on_any_system(name: str) -> None:
    file = file_name(1, 2**63 - 1, 12, name, -0.1)
    assert not set(file) & set('/\\:*?"<>|\x00') and len(file.encode()) <= 200
    assert re.match(r"01-\d+-12-", file) and file.endswith("--0.1.png")


def test_names_differ_where_pictures_do() -> None:
    loras = [(1, "a", 1.0), (1, "a", 1.0000001), (2, "a:", 1.0), (3, "a?", 1.0)]
    files = [file_name(prompt, seed, *lora) for prompt in (1, 2) for seed in (1, 11) for lora in loras]
    files += [file_name(prompt, seed) for prompt in (1, 2) for seed in (1, 11)]
    assert len(set(files)) == len(files)


@pytest.mark.parametrize(
    ("number", "shown"), [(1.0, "1"), (-0.25, "-0.25"), (1.23456789, "1.23456789"), (1e30, "1e+30")]
)
def test_numbers_are_short_and_still_the_same(number: float, shown: str) -> None:
    assert plain_number(number) == shown and float(shown) == number
