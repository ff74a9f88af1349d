"""`lorasmith cache`: what it lists, and that prune removes what was asked for and nothing else."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.cache_folder import Part, Store, identify, open_cache
from lorasmith.cli import main
from lorasmith.file_facts import FileFacts

DAY = 86400


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Latents of two models, of 40 and 2 days ago, text of 20 days ago, and facts of now."""
    cache = open_cache(tmp_path / "cache", print)
    assert cache is not None
    for kind, model, number, age in (
        ("latents", "a.ckpt", 3, 40),
        ("latents", "b.ckpt", 1, 2),
        ("text", "a.ckpt", 2, 20),
    ):
        store = Store(cache, Part(kind, identify([kind, model]), model), print)  # type: ignore[arg-type]
        for one in range(number):
            store.put(identify(one), {"x": torch.zeros(250_000)})
        store.flush()
        (segment,) = (cache / kind / identify([kind, model])[:32]).iterdir()
        used = segment.stat().st_mtime - age * DAY
        os.utime(segment, (used, used))
    picture = tmp_path / "picture.png"
    picture.touch()
    os.utime(picture, (0, 0))
    facts = FileFacts(cache / "facts", "x")
    facts._proofs[picture] = [0, 0, picture.stat().st_ctime_ns, picture.stat().st_ino]
    facts.remember({picture: 1})
    return cache


def listed(cache: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[tuple[str, list[str], int]]:
    capsys.readouterr()
    assert main(["cache", "ls", "--json", "--cache-dir", str(cache), *options]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["path"] == str(cache)
    for part in told["parts"]:
        files = [path for path in Path(part["path"]).iterdir() if path.is_file()]
        assert (part["files"], part["bytes"]) == (len(files), sum(path.stat().st_size for path in files))
        assert part["last_used"] == max(path.stat().st_mtime for path in files)
    return sorted((part["kind"], part["models"], part["entries"]) for part in told["parts"])


A, B, TEXT, FACTS = ("latents", ["a.ckpt"], 3), ("latents", ["b.ckpt"], 1), ("text", ["a.ckpt"], 2), ("facts", [], 1)


def test_ls_tells_of_each_part(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(cache, capsys) == sorted([A, B, TEXT, FACTS])
    assert listed(cache, capsys, "--kind", "latents") == [A, B]
    assert main(["cache", "ls", "--cache-dir", str(cache)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"cache folder {cache}: 6.0 MB" and len(lines) == 5
    assert any("latents" in line and " 3 entries" in line and "3.0 MB" in line and "a.ckpt" in line for line in lines)


def test_what_cannot_be_read_is_listed_as_such_and_can_be_pruned(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (segment,) = (cache / "text").rglob("*.safetensors")
    segment.write_bytes(b"nothing")
    assert main(["cache", "ls", "--cache-dir", str(cache), "--kind", "text"]) == 0
    assert " 0 entries" in (told := capsys.readouterr().out) and "damaged, or of another version" in told
    assert main(["cache", "prune", "--all", "--cache-dir", str(cache), "--kind", "text"]) == 0
    assert not segment.exists()


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--all"], []),
        (["--all", "--dry-run"], [A, B, TEXT, FACTS]),
        (["--all", "--kind", "latents"], [TEXT, FACTS]),
        (["--older-than", "30d"], [B, TEXT, FACTS]),
        (["--older-than", "1w"], [B, FACTS]),
        (["--older-than", "60 h", "--kind", "text"], [A, B, FACTS]),
        (["--max-size", "4MB"], [B, TEXT, FACTS]),
        (["--max-size", "0.001gb"], [FACTS]),
        (["--max-size", "1TB"], [A, B, TEXT, FACTS]),
        (["--max-size", "5MB", "--older-than", "1w"], [B, FACTS]),
    ],
)
def test_prune_removes_what_was_asked_for(
    cache: Path, capsys: pytest.CaptureFixture[str], options: list[str], left: list[Any]
) -> None:
    assert main(["cache", "prune", "--cache-dir", str(cache), *options]) == 0
    told = capsys.readouterr().out
    number = sum(part[2] for part in (A, B, TEXT, FACTS) if part not in left)
    assert told.startswith("would remove 7 entries" if "--dry-run" in options else f"removed {number} entries")
    assert listed(cache, capsys) == sorted(left)
    folders = {path.name for kind in ("latents", "text") for path in (cache / kind).iterdir()}
    assert len(folders) == len([part for part in left if part != FACTS])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "missing: ls or prune. For example: lorasmith cache ls"),
        (["list"], "--action list: expected one of ls, prune"),
        (["ls", "prune"], "'prune' belongs to no option"),
        (["prune"], "say what prune is to remove: --older-than 30d, --max-size 10GB, or --all"),
        (["prune", "--older-than", "30"], "--older-than 30: expected a number and m, h, d or w, such as 30d"),
        (["prune", "--older-than", "soon"], "--older-than soon: expected a number and m, h, d or w, such as 30d"),
        (["prune", "--max-size", "10"], "--max-size 10: expected a number and MB, GB or TB, such as 10GB"),
        (["prune", "--all", "--max-size", "1GB"], "all removes everything, but max_size would keep some"),
        (["prune", "--all", "--json"], "json is for ls"),
        (["prune", "--all", "--kind", "models"], "--kind models: expected one of latents, text, facts"),
        (["ls", "--all", "--dry-run"], "all and dry_run is for prune, and ls only lists; leave it out"),
        (["ls", "--cache-dir", "nowhere"], "nowhere is no cache folder: there is no such folder"),
    ],
)
def test_a_mistake_is_told_and_nothing_is_removed(
    cache: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    before = sorted(cache.rglob("*"))
    where = [] if "--cache-dir" in options else ["--cache-dir", str(cache)]
    assert main(["cache", *options, *where]) == 2
    assert message in capsys.readouterr().err
    assert sorted(cache.rglob("*")) == before


def test_a_folder_that_is_no_cache_of_ours_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = tmp_path / "latents" / ("0" * 32) / ("1" * 32 + ".safetensors")
    photo.parent.mkdir(parents=True)
    photo.touch()
    assert main(["cache", "prune", "--all", "--cache-dir", str(tmp_path)]) == 2
    assert "is no cache folder: it was not made by lorasmith" in capsys.readouterr().err and photo.exists()


def test_the_environment_says_which_cache_is_meant(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORASMITH_CACHE", str(cache))
    assert main(["cache", "ls"]) == 0
    assert capsys.readouterr().out.startswith(f"cache folder {cache}: ")
