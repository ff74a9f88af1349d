"""LoRA files of folders: in the order of their training, each once."""

import re
from pathlib import Path

import pytest
import torch

from lorasmith.checkpoint import write_safetensors
from lorasmith.errors import UserError
from lorasmith.picture_run.checkpoints import lora_files


def write(folder: Path, name: str, steps: int | None, value: int | None = None) -> Path:
    """Write a file; the same value makes the same tensors, of which the file tells the hash."""
    value = hash(name) % 10_000 if value is None else value
    facts = {} if steps is None else {"ss_steps": str(steps), "sshs_model_hash": str(value)}
    write_safetensors(folder / name, {"a": torch.tensor([float(value)])}, facts)
    return folder / name


def test_a_run_is_in_the_order_of_its_steps(tmp_path: Path) -> None:
    for name, steps in (("last", 400), ("epoch-000001", 100), ("step-00000250", 250), ("epoch-000003", 300)):
        write(tmp_path, f"{name}.safetensors", steps)
    (tmp_path / "states").mkdir()
    write(tmp_path / "states", "other.safetensors", 1)
    (tmp_path / "run.toml").write_text("")
    files, notes = lora_files([tmp_path])
    assert [path.stem for path in files] == ["epoch-000001", "step-00000250", "epoch-000003", "last"] and not notes


def test_files_that_tell_no_steps_are_in_the_order_of_their_names_numbers(tmp_path: Path) -> None:
    for name in ("dog-10", "dog-9", "dog", "dog-000011"):
        write(tmp_path, f"{name}.safetensors", 5 if name == "dog-9" else None)
    torch.save({}, tmp_path / "dog-2.pt")
    assert [path.stem for path in lora_files([tmp_path])[0]] == ["dog-2", "dog-9", "dog-10", "dog-000011", "dog"]


def test_one_that_is_the_same_as_another_is_left_out_and_told(tmp_path: Path) -> None:
    first, last = write(tmp_path, "epoch-000004.safetensors", 400, 1), write(tmp_path, "last.safetensors", 400, 1)
    other = write(tmp_path, "epoch-000003.safetensors", 300, 2)
    files, [note] = lora_files([tmp_path])
    assert files == [other, first] and note == f"{last} is left out, as it is the same as epoch-000004.safetensors"
    assert lora_files([last, first])[0] == [last, first], "what is named is taken"


def test_files_are_as_given(tmp_path: Path) -> None:
    late, early = write(tmp_path, "b.safetensors", 9), write(tmp_path, "a.safetensors", 1)
    assert lora_files([late, early]) == ([late, early], [])


def test_steps_that_no_run_has_are_not_read(tmp_path: Path) -> None:
    """Metadata are anyone's, and Python reads no number of that many digits."""
    for name, steps in (("a-2", "7"), ("b-1", "9" * 5000)):
        write_safetensors(tmp_path / f"{name}.safetensors", {"a": torch.ones(1)}, {"ss_steps": steps})
    assert [path.stem for path in lora_files([tmp_path])[0]] == ["b-1", "a-2"]


@pytest.mark.parametrize("part", ["", "unet"])
def test_a_folder_of_peft_is_a_lora(part: str, tmp_path: Path) -> None:
    (tmp_path / "robot" / part).mkdir(parents=True)
    write(tmp_path / "robot" / part, "adapter_model.safetensors", None)
    assert lora_files([tmp_path / "robot"]) == ([tmp_path / "robot"], [])


def test_mistakes(tmp_path: Path) -> None:
    file = write(tmp_path, "a.safetensors", 1)
    (tmp_path / "empty").mkdir()
    for given, said in (
        ([tmp_path / "gone.safetensors"], "there is no such LoRA file or folder"),
        ([tmp_path / "empty"], "no LoRA lies in this folder"),
        ([file, tmp_path], re.escape(f"{file} is given twice")),
    ):
        with pytest.raises(UserError, match=said):
            lora_files(given)
