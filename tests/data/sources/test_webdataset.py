"""Tar shards: grouping by WebDataset's rule, captions of all kinds, shares of processes, and everything broken."""

import io
import json
import os
import random
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from PIL import Image

from lorasmith import file_facts
from lorasmith.data import images
from lorasmith.data.captions import CaptionOptions
from lorasmith.data.images import open_record
from lorasmith.data.records import Scan
from lorasmith.data.sources.webdataset import read_shard, scan_share
from lorasmith.data.subsets import Subset
from lorasmith.errors import UserError


def png(seed: int = 0, size: tuple[int, int] = (12, 8)) -> bytes:
    data = io.BytesIO()
    Image.frombytes("RGB", size, random.Random(seed).randbytes(size[0] * size[1] * 3)).save(data, "PNG")
    return data.getvalue()


def pack(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, options.pop("mode", "w"), **options) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def scan(place: Path, index: int = 0, count: int = 1, **options: Any) -> Scan:
    return scan_share(Subset(place=str(place), source="webdataset", **options), index, count)


def captions(found: Scan) -> dict[str, str]:
    return {record.path.name: record.caption for record in found.records}


TRICKY = [
    "a.png", "a.txt", "dir/b.seg.png", "dir/b.txt", "x.y/c.JPG", "x.y/c.Json", "./d.png", "./d.cls", "noext",
    "x.y/noext", "deep/er/e.tar.gz", "ünï/ö.png", "two words.png", "f..png", "long" * 40 + "/" + "name" * 30 + ".png",
]  # fmt: skip


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_grouped_as_a_foreign_reader_of_webdataset_groups_them(tmp_path: Path, form: int) -> None:
    names = [name for name in TRICKY if form != tarfile.USTAR_FORMAT or len(name) < 100]
    path = pack(tmp_path / "a.tar", {name: name.encode() for name in names}, format=form)
    with tarfile.open(path) as tar:
        pairs = [(info.name, tar.extractfile(info)) for info in tar]
        decoders, WebDataset.DECODERS = WebDataset.DECODERS, {}
        try:
            plain = [(name, data) for name, data in pairs if not name.endswith(".gz")]  # which it would unpack
            theirs = list(WebDataset._get_pipeline_from_tar(str(path), plain))
        finally:
            WebDataset.DECODERS = decoders
    expected = {
        one.pop("__key__"): {name.lower(): data for name, data in one.items() if name != "__url__"} for one in theirs
    }
    ours = {
        sample.key: {suffix: member.read() for suffix, member in sample.members.items()}
        for sample in read_shard(path).samples
    }
    assert ours.pop("deep/er/e") == {"tar.gz": b"deep/er/e.tar.gz"}
    assert ours == expected and len(ours) >= 7


def test_samples_whose_members_do_not_stand_together_are_put_together(tmp_path: Path) -> None:
    members = [("a.png", png()), ("b.png", png(1)), ("b.txt", b"two"), ("._a.png", b"mac"), ("a.txt", b"one")]
    found = scan(pack(tmp_path / "a.tar", members))
    assert captions(found) == {"a.png": "one", "b.png": "two"}


def test_pictures_are_read_from_their_places_and_known_by_their_content(tmp_path: Path) -> None:
    members = {f"{i}.png": png(i, (12 + i, 8)) for i in range(3)} | {f"{i}.txt": b"x" for i in range(3)}
    found = scan(pack(tmp_path / "set" / "a.tar", members), repeats=4)
    assert [(record.size, record.repeats, record.group, record.shard) for record in found.records] == [
        ((12 + i, 8), 4, "set", 0) for i in range(3)
    ]
    assert [record.path for record in found.records] == [tmp_path / "set" / "a.tar" / f"{i}.png" for i in range(3)]
    for i, record in enumerate(found.records):
        with Image.open(io.BytesIO(png(i, (12 + i, 8)))) as image:
            assert open_record(record).tobytes() == image.tobytes()
    assert len({record.content_hash for record in found.records}) == 3


def test_captions_come_from_the_first_kind_of_member_there_is(tmp_path: Path) -> None:
    told = {
        "all": {"caption": b"c", "txt": b"t", "json": b'{"caption": "j"}', "cls": b"k"},
        "text": {"txt": b"\xef\xbb\xbft\r\nmore", "json": b'{"caption": "j"}'},
        "json": {"json": json.dumps({"caption": "a cat", "tags": ["cat", "red"], "url": "x", "width": 3}).encode()},
        "tags": {"json": b'{"caption": null, "tags": "cat, red"}', "cls": b"3"},
        "class": {"cls": b"dog\n"},
        "number": {"cls": b"3"},
        "null": {"json": b"{}"},
    }
    members = {f"{key}.png": png() for key in told}
    members |= {f"{key}.{suffix}": data for key, texts in told.items() for suffix, data in texts.items()}
    found = scan(pack(tmp_path / "a.tar", members), caption="default")
    assert captions(found) == {
        "all.png": "c", "text.png": "t", "json.png": "a cat, cat, red", "tags.png": "cat, red", "class.png": "dog",
        "number.png": "default", "null.png": "default",
    }  # fmt: skip
    assert found.notes[0] == (
        "1 shard (a.tar): 7 pictures, each once an epoch; captions: 1 from .caption, 1 from .txt, 2 from .json, "
        '1 from .cls, 2 the default, "default"'
    )
    assert found.notes[1] == f"only the first line is used of 1 captions ({tmp_path}/a.tar/text.txt)"
    lines = scan(tmp_path / "a.tar", caption="default", captions=CaptionOptions(wildcards=True))
    assert captions(lines)["text.png"] == "t\nmore"
    only = scan(tmp_path / "a.tar", caption="default", caption_extension="txt")
    assert captions(only)["all.png"] == "t" and captions(only)["json.png"] == "default"


def test_each_process_opens_its_own_shards_only(tmp_path: Path) -> None:
    whole = [{f"{i}{j}.png": png(i * 3 + j) for j in range(2)} for i in range(4)]
    for i, members in enumerate(whole):
        pack(tmp_path / f"{i % 2}" / f"s-{i}.tar", members)  # the disks of two machines
    for index in range(2):
        found = scan(tmp_path / str(index) / "s-{0..3}.tar", index, 2, caption="x")
        assert [(record.shard, record.path.name) for record in found.records] == [
            (i, f"{i}{j}.png") for i in range(index, 4, 2) for j in range(2)
        ]
        assert found.shards == tuple(f"s-{i}.tar" for i in range(4))
    assert scan(tmp_path / "0" / "s-{0..3}.tar", 5, 6, caption="x").records == []  # no shard is left for it
    with pytest.raises(UserError, match=r"2 of 4 shards cannot be read:\n.*s-1\.tar: it cannot be opened \(No such"):
        scan(tmp_path / "0" / "s-{0..3}.tar", caption="x")


def test_a_picture_that_is_gone_from_its_shard_is_told_of(tmp_path: Path) -> None:
    (record,) = scan(pack(tmp_path / "a.tar", {"a.png": png()}), caption="x").records
    (tmp_path / "a.tar").write_bytes(b"short")
    with pytest.raises(UserError, match=r"a\.tar.a\.png: its bytes cannot be read \(.*a\.tar is shorter than it was\)"):
        open_record(record)


GOOD = {"a.png": png(), "a.txt": b"a cat"}
BAD: list[tuple[Any, str]] = [
    (
        {"a.png": png()},
        r"1 pictures have no caption; .* \.caption, \.txt, or a \.json .*--caption .*\n  .*a\.tar/a\.png",
    ),
    ({**GOOD, "b.png": png()}, r"1 pictures have no caption[\s\S]*/b\.png"),
    (
        [*GOOD.items(), ("a.txt", b"another")],
        r"1 names come twice in their shard; keep one of each:\n  .*a\.tar/a\.txt",
    ),
    ({**GOOD, "a.jpg": png()}, r"1 samples have more than one picture.*first dot.*\n  .*a\.tar/a: \.png, \.jpg"),
    ({"v1.5 a.png": png(), "v1.5 b.png": png()}, r"1 samples have more than one picture"),
    (
        {**GOOD, "b.png": png()[:60], "b.txt": b"x"},
        r"1 of 2 pictures cannot be read.*--skip-unreadable:\n  .*/b\.png: da",
    ),
    ({"a.png": png(), "a.txt": b"\xff\xfec\0"}, r"1 caption members are not UTF-8; save .*\n  .*a\.tar/a\.txt"),
    ({"a.png": png(), "a.txt": b"\nlater"}, r"1 caption members have an empty first line; write the caption there"),
    ({"a.png": png(), "a.json": b"{"}, r'are no JSON such as \{"caption": "a cat".*\n  .*a\.json: Expecting'),
    ({"a.png": png(), "a.json": b"[]"}, r"a\.json: it holds a list"),
    ({"a.png": png(), "a.json": b'{"caption": 3}'}, r"a\.json: caption is a int"),
    (
        {"a.npz": b"", "a.txt": b"x"},
        r"no pictures found in .*a\.tar; found 1 \.npz, 1 \.txt, but pictures are known by",
    ),
    ({}, r"no pictures found in .*a\.tar; found nothing with an extension"),
]


@pytest.mark.parametrize(("members", "message"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_what_is_wrong_in_a_shard_is_listed(tmp_path: Path, members: Any, message: str) -> None:
    path = pack(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=message):
        scan(path)


@pytest.mark.parametrize(("mode", "command"), [("w:gz", "gunzip a.tar"), ("w:bz2", "bunzip2"), ("w:xz", "unxz")])
def test_compressed_shards_are_refused_with_the_reason(tmp_path: Path, mode: str, command: str) -> None:
    path = pack(tmp_path / "a.tar", GOOD, mode=mode)
    with pytest.raises(UserError, match=rf"1 of 1 shards cannot be read:\n.*compressed .*unpack it \({command}"):
        scan(path)


def test_files_that_are_no_tar_files_are_refused(tmp_path: Path) -> None:
    pack(tmp_path / "good.tar", GOOD)
    (tmp_path / "text.tar").write_bytes(b"hello" * 300)
    (tmp_path / "empty.tar").touch()
    with pytest.raises(UserError) as caught:
        scan(tmp_path)
    lines = [re.sub(".*/", "", line) for line in str(caught.value).splitlines()]
    assert lines == ["2 of 3 shards cannot be read:", "empty.tar: empty (0 bytes)", "text.tar: not a tar file"]


def test_a_shard_that_is_not_whole_is_told_of_wherever_it_is_cut(tmp_path: Path) -> None:
    members = {**GOOD, "b.png": png(1, (30, 30)), "b.txt": b"b"}
    whole = pack(tmp_path / "whole.tar", members).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        infos = {info.name: info for info in tar}
    b, b_text = infos["b.png"], infos["b.txt"]
    header = bytearray(whole)
    header[b_text.offset : b_text.offset + 100] = b"\xff" * 100
    broken = {
        "in a file": whole[: b.offset_data + 100],
        "in the padding": whole[: b.offset_data + b.size + 1],
        "in a header": whole[: b_text.offset + 100],
        "between files": whole[: b_text.offset],
        "before the mark": whole[: b_text.offset_data + 512],
        "damaged header": bytes(header),
        "two in one": whole + whole,
    }
    for name, data in broken.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"1 of 1 shards are not whole; .*--skip-unreadable:\n") as caught:
            scan(path, caption="x")
        assert ("put together" in str(caught.value)) == (name == "two in one")
        found = scan(path, caption="x", skip_unreadable=True)
        assert [record.path.name for record in found.records] == (
            ["a.png"] if name == "in a file" else ["a.png", "b.png"]
        ), name
        assert any(note.startswith(f"{name}.tar is used as far as it is whole") for note in found.notes)


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    members = {**GOOD, "b.txt": b"alone", "c.png": b"broken", "c.txt": b"c"}
    found = scan(pack(tmp_path / "a.tar", members), caption="x", skip_unreadable=True)
    assert captions(found) == {"a.png": "a cat"}
    assert "1 samples have no picture that is read and are not used (b.txt)" in found.notes
    assert 'caption = "x" is not used: every picture has one of its own' in found.notes
    assert any(note.startswith("left out because they cannot be read (1 of 2)") for note in found.notes)


def test_the_pictures_of_an_unchanged_shard_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_facts, "_RACY", -1)
    decoded: list[str] = []
    decode = images._decode

    def counting(path: Path, *args: Any, **options: Any) -> Any:
        decoded.append(path.name)
        return decode(path, *args, **options)

    monkeypatch.setattr(images, "_decode", counting)
    first, second = tmp_path / "shards" / "0.tar", tmp_path / "shards" / "1.tar"
    pack(first, {"a.png": png(1), "a.txt": b"a", "b.png": png(2), "b.txt": b"b"})
    pack(second, {"c.png": png(3), "c.txt": b"c"})

    def scanned() -> tuple[dict[str, str], list[str]]:
        decoded.clear()
        with images.remembering(tmp_path / "cache", print):
            records = scan(tmp_path / "shards").records
        return {record.path.name: record.content_hash for record in records}, sorted(decoded)

    hashes, all_decoded = scanned()
    assert all_decoded == ["a.png", "b.png", "c.png"]
    assert scanned() == (hashes, [])
    stat = first.stat()
    pack(first, {"a.png": png(4), "a.txt": b"a", "b.png": png(2), "b.txt": b"b"})
    os.utime(first, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as an edit that puts the time back
    changed, decoded_again = scanned()
    assert decoded_again == ["a.png", "b.png"] and changed["a.png"] != hashes["a.png"]
    assert {name: changed[name] for name in ("b.png", "c.png")} == {name: hashes[name] for name in ("b.png", "c.png")}
