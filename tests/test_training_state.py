"""States: what is written comes back to the last bit, and what is not whole is never gone on from."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorasmith.errors import UserError
from lorasmith.training_state import (
    StateFacts,
    data_fingerprint,
    find_state,
    list_states,
    load_state,
    save_state,
)

FILES = ["state.json", "network.safetensors", "optimizer.pt"]


class Learner:
    """A small model with AdamW that learns from data which depends on the step alone."""

    def __init__(self) -> None:
        first, last = nn.Linear(5, 7), nn.Linear(7, 1)
        self.model = nn.Sequential(first, nn.Tanh(), last)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, generator=generator)
        groups = [{"params": part.parameters(), "lr": lr} for part, lr in ((first, 0.1), (last, 0.01))]
        self.optimizer = torch.optim.AdamW(groups)

    def step(self, number: int) -> None:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
        self.optimizer.zero_grad()
        (self.model(x) ** 2).sum().backward()
        self.optimizer.step()

    def save(self, states: Path, number: int, keep: int = 9) -> Path:
        return save_state(
            states, facts(number), self.model.state_dict(), self.optimizer.state_dict(), {"scale": 2.0}, keep=keep
        )


def facts(step: int) -> StateFacts:
    return StateFacts(step, "ab12", 1.7e9 + 0.1, (2,), "adamw")


def save(states: Path, *steps: int, keep: int = 9) -> None:
    for step in steps:
        save_state(states, facts(step), {"weight": torch.full((3,), float(step))}, {"state": {}}, {}, keep=keep)


def numbers(states: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_states(states)]


def assert_equal(one: Any, two: Any) -> None:
    assert type(one) is type(two)
    if isinstance(one, Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two)
    elif isinstance(one, dict):
        assert list(one) == list(two)
        for key in one:
            assert_equal(one[key], two[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for pair in zip(one, two, strict=True):
            assert_equal(*pair)
    else:
        assert one == two


def test_everything_comes_back_as_it_was(tmp_path: Path) -> None:
    learner = Learner()
    learner.step(0)
    network = {
        "half": torch.randn(3, 4).half(), "brain": torch.randn(2).bfloat16(), "turned": torch.randn(3, 4).T,
        "alpha": torch.tensor(4.0), "strange": torch.tensor([-0.0, 1e-45, 3.4e38]),
    }  # fmt: skip
    optimizer, scaler = learner.optimizer.state_dict(), {"scale": 65536.0, "growth_tracker": 3}
    state = load_state(save_state(tmp_path / "states", facts(120), network, optimizer, scaler, keep=1))
    assert state.facts == facts(120)
    assert_equal({name: state.network[name] for name in network}, network)
    assert_equal(state.optimizer, optimizer)
    assert_equal(state.scaler, scaler)


@pytest.mark.parametrize("stop", [1, 4])
def test_a_restored_learner_goes_on_to_the_same_bits(tmp_path: Path, stop: int) -> None:
    straight, stopped, resumed = Learner(), Learner(), Learner()
    for number in range(8):
        straight.step(number)
    for number in range(stop):
        stopped.step(number)
    state = load_state(stopped.save(tmp_path, stop))
    resumed.step(99)  # whatever it was before
    resumed.model.load_state_dict(state.network)
    resumed.optimizer.load_state_dict(state.optimizer)
    for number in range(state.facts.step, 8):
        resumed.step(number)
    assert_equal(dict(resumed.model.state_dict()), dict(straight.model.state_dict()))
    assert_equal(resumed.optimizer.state_dict(), straight.optimizer.state_dict())


def test_equal_states_are_equal_files(tmp_path: Path) -> None:
    folders = []
    for name in ("one", "two"):
        learner = Learner()
        learner.step(0)
        folders.append(learner.save(tmp_path / name, 1))
    for file in FILES:
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "changed", "other"])
def test_a_state_that_is_not_whole_is_refused(tmp_path: Path, file: str, damage: str) -> None:
    folder = Learner().save(tmp_path, 3)
    data = (folder / file).read_bytes()
    if damage == "gone":
        (folder / file).unlink()
    else:
        changed = bytes([data[len(data) // 2] ^ 0xFF])
        (folder / file).write_bytes({
            "empty": b"", "cut": data[: len(data) // 2], "other": b'{"step": 3}',
            "changed": data[: len(data) // 2] + changed + data[len(data) // 2 + 1 :],
        }[damage])  # fmt: skip
    with pytest.raises(UserError, match="missing or damaged") as error:
        load_state(folder)
    assert str(folder / file) in str(error.value)


@pytest.mark.parametrize("facts_now", ["[]", '{"sha256": 3}', '{"sha256": {}}', '{"sha256": {}, "step": 1, "more": 2}'])
def test_facts_of_another_shape_are_refused(tmp_path: Path, facts_now: str) -> None:
    folder = Learner().save(tmp_path, 3)
    (folder / "state.json").write_text(facts_now)
    with pytest.raises(UserError, match="missing or damaged"):
        load_state(folder)


@pytest.mark.parametrize("missing", FILES)
def test_the_newest_whole_state_is_found_though_a_newer_one_was_left_half(tmp_path: Path, missing: str) -> None:
    save(tmp_path / "states", 5, 10, 15)
    (tmp_path / "states" / "step-00000015" / missing).unlink()
    assert find_state(tmp_path).name == "step-00000010"


def test_a_folder_still_being_written_is_no_state(tmp_path: Path) -> None:
    save(tmp_path / "states", 5, 10)
    (tmp_path / "states" / "step-00000010").rename(tmp_path / "states" / ".step-00000010.abc123")
    assert find_state(tmp_path).name == "step-00000005"


def test_states_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    save(tmp_path, 5, 99_999_999, 100_000_000)
    assert numbers(tmp_path) == [5, 99_999_999, 100_000_000]


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    save(tmp_path, 10, 20, 30, 40, keep=keep)
    assert numbers(tmp_path) == [10, 20, 30, 40][-keep:]


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_a_run_that_went_back_finds_its_own_newest_state(tmp_path: Path, keep: int) -> None:
    save(tmp_path / "states", 10, 20, 30)
    save(tmp_path / "states", 15, keep=keep)
    assert find_state(tmp_path).name == "step-00000015"
    assert numbers(tmp_path / "states") == [10, 15][-keep:]


def test_a_state_of_the_same_step_takes_the_place_of_the_older_one(tmp_path: Path) -> None:
    save(tmp_path, 10)
    learner = Learner()
    assert load_state(learner.save(tmp_path, 10)).network.keys() == learner.model.state_dict().keys()
    assert numbers(tmp_path) == [10]


def test_a_users_own_copy_is_neither_found_nor_removed(tmp_path: Path) -> None:
    save(tmp_path / "states", 10)
    copies = [tmp_path / "states" / name for name in ("step-00000010 (copy)", "step-good", "step-00000010.bak")]
    for copy in copies:
        shutil.copytree(tmp_path / "states" / "step-00000010", copy)
    save(tmp_path / "states", 20, keep=1)
    assert find_state(tmp_path).name == "step-00000020"
    assert all(load_state(copy).facts.step == 10 for copy in copies)


def test_what_a_killed_run_left_half_written_is_cleared_by_the_next_state(tmp_path: Path) -> None:
    save(tmp_path, 10)
    shutil.copytree(tmp_path / "step-00000010", tmp_path / ".step-00000020.abc123")
    save(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000020"]


def test_a_disk_that_fills_up_leaves_the_older_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object) -> None:
        raise OSError(28, "No space left on device")

    save(tmp_path, 10)
    monkeypatch.setattr("lorasmith.training_state.torch.save", fill)
    with pytest.raises(UserError, match="the disk is full"):
        save(tmp_path, 20, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]
    load_state(tmp_path / "step-00000010")


@pytest.mark.parametrize("given", [".", "states", "states/step-00000010"])
@pytest.mark.parametrize("is_inside", [False, True])
def test_a_state_is_found_from_the_run_its_states_or_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, is_inside: bool
) -> None:
    save(tmp_path / "states", 5, 10)
    monkeypatch.chdir(tmp_path / given if is_inside else tmp_path)
    found = find_state(Path("." if is_inside else given))
    assert found.name == "step-00000010"
    assert found.parent.parent.resolve() == tmp_path.resolve()  # where the run's options lie


@pytest.mark.parametrize(
    ("given", "message"), [("nowhere", "no such folder"), (".", "no state in it"), ("file", "no state in it")]
)
def test_nothing_to_go_on_from_is_told(tmp_path: Path, given: str, message: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        find_state(tmp_path / given)


def test_the_facts_are_readable_by_others(tmp_path: Path) -> None:
    stored = json.loads((Learner().save(tmp_path, 3) / "state.json").read_text(encoding="utf-8"))
    assert stored["step"] == 3 and set(stored["sha256"]) == {"network.safetensors", "optimizer.pt"}


def test_other_data_have_another_fingerprint() -> None:
    data = [["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""], ["a"], [], ['a", "b']]
    assert len({data_fingerprint(parts) for parts in data}) == len(data)
    assert data_fingerprint(["a", "b"]) == data_fingerprint(["a", "b"])
