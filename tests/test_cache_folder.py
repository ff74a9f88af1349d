"""The cache folder: what was put is found again, to the bit, and nothing that is damaged; only ours is removed."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasmith import cache_folder
from lorasmith.cache_folder import (
    CachedFile,
    Part,
    Store,
    cached_files,
    choose_unwanted,
    default_place,
    identify,
    in_words,
    open_cache,
    remove,
    require_cache,
)
from lorasmith.errors import UserError

PART = Part("latents", identify("a VAE"), "model.safetensors")
NAMES = [identify(number) for number in range(5)]


class Told(list[str]):
    """What was said to a person."""

    def __call__(self, text: str) -> None:
        self.append(text)


def entry(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        "moments": torch.randn(2, 4, 3, number + 1, generator=generator),
        "half": torch.randn(3, generator=generator).bfloat16(),
    }


def same(found: Any, expected: Any) -> bool:
    return (
        found is not None
        and found.keys() == expected.keys()
        and all(found[key].dtype == expected[key].dtype and torch.equal(found[key], expected[key]) for key in expected)
    )


def filled(cache: Path, *numbers: int, part: Part = PART) -> list[Path]:
    """Write entries in a segment of their own; return all segments."""
    store = Store(cache, part, print)
    for number in numbers:
        store.put(NAMES[number], entry(number))
    store.flush()
    return sorted(cache.rglob("*.safetensors"))


def found(cache: Path, told: Told | None = None, part: Part = PART) -> dict[int, Any]:
    store = Store(cache, part, told if told is not None else Told())
    store.look_up(NAMES)
    return {number: store.get(name) for number, name in enumerate(NAMES) if name in store}


def test_what_was_put_is_found_by_another_process_to_the_bit(tmp_path: Path) -> None:
    filled(tmp_path, 0, 1)
    filled(tmp_path, 3)
    assert all(same(value, entry(number)) for number, value in found(tmp_path).items())
    assert set(found(tmp_path)) == {0, 1, 3}
    assert found(tmp_path, part=Part("latents", identify("another VAE"), "")) == {}
    assert found(tmp_path, part=Part("text", PART.id, "")) == {}


def test_entries_are_there_before_and_after_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_folder, "_MOST_BYTES", 300)
    store = Store(tmp_path, PART, print)
    for number in range(5):
        store.put(NAMES[number], entry(number))
        assert all(same(store.get(NAMES[i]), entry(i)) for i in range(number + 1))
    assert len(found(tmp_path)) > 2  # written by itself when it is much
    store.flush()
    store.flush()
    assert len(found(tmp_path)) == 5


def test_what_takes_long_is_written_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(cache_folder.time, "monotonic", lambda: clock[0])
    store = Store(tmp_path, PART, print)
    store.put(NAMES[0], entry(0))
    clock[0] = 59
    store.put(NAMES[1], entry(1))
    assert found(tmp_path) == {}
    clock[0] = 61
    store.put(NAMES[2], entry(2))
    assert set(found(tmp_path)) == {0, 1, 2}


def test_of_two_copies_the_newer_one_counts(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    store = Store(tmp_path, PART, print)
    store.put(NAMES[1], entry(2))
    store.flush()
    assert same(found(tmp_path)[1], entry(2))


def test_without_a_folder_everything_stays_in_memory() -> None:
    store = Store(None, PART, print)
    store.put(NAMES[1], entry(1))
    store.flush()
    store.look_up(NAMES)
    assert same(store.get(NAMES[1]), entry(1)) and NAMES[2] not in store and not store.is_writable


def test_any_damage_is_noticed(tmp_path: Path) -> None:
    (segment,) = filled(tmp_path, 0, 1)
    whole = segment.read_bytes()
    for place in range(0, len(whole), 13):
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :]):
            segment.write_bytes(damaged)
            for number, value in found(tmp_path).items():
                assert value is None or same(value, entry(number))
    segment.write_bytes(whole)
    assert len(found(tmp_path)) == 2


def test_a_cut_segment_is_told_of_once_and_goes(tmp_path: Path) -> None:
    first, second = filled(tmp_path, 0)[0], filled(tmp_path, 1)[-1]
    for segment in (first, second):
        segment.write_bytes(segment.read_bytes()[:-1])
    filled(tmp_path, 2)
    told = Told()
    assert set(found(tmp_path, told)) == {2} and len(told) == 1 and str(first) in told[0]
    told.clear()
    assert set(found(tmp_path, told)) == {2} and told == []


def test_a_flipped_bit_costs_its_entry_alone(tmp_path: Path) -> None:
    (segment,) = filled(tmp_path, 0, 1)
    data = bytearray(segment.read_bytes())
    data[-1] ^= 1
    segment.write_bytes(data)
    told = Told()
    values = found(tmp_path, told)
    assert sorted(value is None for value in values.values()) == [False, True]
    assert len(told) == 1 and "damaged" in told[0]


def test_a_segment_in_the_wrong_place_is_not_believed(tmp_path: Path) -> None:
    (segment,) = filled(tmp_path, 0)
    other = Part("latents", identify("another VAE"), "")
    place = tmp_path / "latents" / other.id[:32]
    place.mkdir()
    (place / segment.name).write_bytes(segment.read_bytes())
    assert found(tmp_path, part=other) == {} and set(found(tmp_path)) == {0}


def test_what_is_pruned_while_a_run_reads_is_missing_not_an_error(tmp_path: Path) -> None:
    store = Store(tmp_path, PART, told := Told())
    (segment,) = filled(tmp_path, 0, 1)
    store.look_up(NAMES)
    remove(cached_files(tmp_path))
    assert not segment.parent.exists()
    assert store.get(NAMES[0]) is None and NAMES[0] not in store and told == []
    store.put(NAMES[0], entry(0))
    store.flush()
    assert same(found(tmp_path)[0], entry(0))


def test_a_folder_that_cannot_be_written_to_is_told_of_once_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(cache_folder, "write_safetensors", full)
    store = Store(tmp_path, PART, told := Told())
    for number in range(3):
        store.put(NAMES[number], entry(number))
        store.flush()
    assert all(same(store.get(NAMES[number]), entry(number)) for number in range(3))
    assert len(told) == 1 and "cannot be written to (the disk is full)" in told[0] and not store.is_writable


def test_a_new_folder_becomes_a_cache_and_one_with_other_things_is_refused(tmp_path: Path) -> None:
    told = Told()
    assert open_cache(tmp_path / "a" / "b", told) == tmp_path / "a" / "b"
    require_cache(tmp_path / "a" / "b")
    assert open_cache(tmp_path / "a" / "b", told) is not None
    with pytest.raises(UserError, match=r"holds other things \(b\); give a new or empty folder"):
        open_cache(tmp_path / "a", told)
    with pytest.raises(UserError, match="not made by lorasmith"):
        require_cache(tmp_path / "a")
    with pytest.raises(UserError, match="no such folder"):
        require_cache(tmp_path / "c")
    assert told == []
    (tmp_path / "file").touch()
    assert open_cache(tmp_path / "file", told) is None
    assert open_cache(tmp_path / "file" / "below", told) is None
    assert len(told) == 2 and all("going on in memory" in text for text in told)


def test_a_cache_that_another_process_makes_at_the_same_moment_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = os.listdir

    def listdir(path: Path) -> list[str]:
        monkeypatch.setattr(os, "listdir", listed)
        assert open_cache(path, print) == path
        filled(path, 0)
        return os.listdir(path)

    monkeypatch.setattr(os, "listdir", listdir)
    assert open_cache(tmp_path / "cache", print) == tmp_path / "cache"


@pytest.mark.parametrize(
    ("platform", "name", "environment", "expected"),
    [
        ("linux", "posix", {"LORASMITH_CACHE": "~/x"}, "/home/me/x"),
        ("linux", "posix", {}, "/home/me/.cache/lorasmith"),
        ("linux", "posix", {"XDG_CACHE_HOME": "/big"}, "/big/lorasmith"),
        ("linux", "posix", {"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/lorasmith"),
        ("darwin", "posix", {"XDG_CACHE_HOME": "/big"}, "/home/me/Library/Caches/lorasmith"),
        ("win32", "nt", {"LOCALAPPDATA": "/local"}, "/local/lorasmith/cache"),
        ("win32", "nt", {}, "/home/me/AppData/Local/lorasmith/cache"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="paths of other systems")
def test_each_system_has_its_place_for_caches(
    monkeypatch: pytest.MonkeyPatch, platform: str, name: str, environment: dict[str, str], expected: str
) -> None:
    for variable in ("LORASMITH_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in {"HOME": "/home/me", **environment}.items():
        monkeypatch.setenv(variable, value)
    home = Path(expected)  # made before the system is another
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(cache_folder, "_IS_WINDOWS", name == "nt")
    assert default_place() == home


# ---- upkeep --------------------------------------------------------------------------------------------------------


def file(number: int, last_used: float, size: int) -> CachedFile:
    return CachedFile(Path(f"{number:032x}.safetensors"), "latents", "", "", 1, size, last_used)


FILES = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 50)), max_size=8).map(
    lambda pairs: [file(number, float(time), size) for number, (time, size) in enumerate(pairs)]
)


@given(FILES, st.none() | st.integers(0, 100), st.none() | st.integers(0, 200))
def test_what_is_old_goes_and_then_the_longest_unused_until_the_size_fits(
    files: list[CachedFile], older_than: float | None, max_size: int | None
) -> None:
    unwanted = choose_unwanted(files, now=100.0, older_than=older_than, max_size=max_size)
    left = [one for one in files if one not in unwanted]
    if older_than is None and max_size is None:
        assert left == []
        return
    if older_than is not None:
        assert all(100 - one.last_used <= older_than for one in left)
    if max_size is not None:
        assert sum(one.size for one in left) <= max_size
    young = [one for one in unwanted if older_than is None or 100 - one.last_used <= older_than]
    if young:  # each went for the size alone, and none that is left was used earlier
        assert max_size is not None
        newest = sorted(young, key=lambda one: one.last_used)[-1]  # of those of one moment the last one
        assert sum(one.size for one in left) + newest.size > max_size or newest.size == 0
        assert all(one.last_used >= newest.last_used for one in left)


def test_only_what_we_wrote_is_removed(tmp_path: Path) -> None:
    cache = open_cache(tmp_path / "cache", print)
    assert cache is not None
    (segment,) = filled(cache, 0)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / segment.name).write_bytes(b"mine")
    strangers = [cache / "latents" / "notes.txt", segment.parent / "mine.safetensors", cache / "facts" / "mine.json"]
    for stranger in strangers:
        stranger.parent.mkdir(exist_ok=True)
        stranger.write_text("mine")
    (cache / "latents" / ("0" * 32)).symlink_to(outside, target_is_directory=True)
    (segment.parent / ("0" * 32 + ".safetensors")).symlink_to(outside / segment.name)
    files = cached_files(cache)
    assert [one.path for one in files] == [segment]
    assert remove(choose_unwanted(files, now=0.0)) == []
    assert not segment.exists()
    assert all(stranger.read_text() == "mine" for stranger in strangers)
    assert (outside / segment.name).read_bytes() == b"mine" and cached_files(cache) == []


def test_what_a_killed_process_left_goes_when_it_is_old(tmp_path: Path) -> None:
    (segment,) = filled(tmp_path, 0)
    rest = segment.parent / f".{segment.name}.abc123"
    rest.write_bytes(b"half")
    files = cached_files(tmp_path)
    now = rest.stat().st_mtime
    assert {one.path: one.num_entries for one in files} == {segment: 1, rest: 0}
    assert choose_unwanted(files, now=now + 10, older_than=1e6) == []
    assert [one.path for one in choose_unwanted(files, now=now + 7200, older_than=1e6)] == [rest]


@pytest.mark.parametrize(
    ("size", "words"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1.34e9, "1.3 GB"), (2.5e15, "2500.0 TB")]
)
def test_sizes_are_told_for_people(size: float, words: str) -> None:
    assert in_words(size) == words
