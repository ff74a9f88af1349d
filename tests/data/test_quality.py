"""The rules on facts alone: what each finds, what it leaves alone, and that none fails whatever the facts are."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.data.mask_files import MaskLook
from lorasmith.data.quality import (
    RULES,
    SEVERITIES,
    Facts,
    Finding,
    Group,
    Picture,
    PictureMask,
    Wishes,
    duplicates,
    find_all,
    strays,
)

ROOT = Path("photos")
PLAIN = Group(ROOT, "photos")
DOG = Group(ROOT / "10_sks dog", "10_sks dog", 10, "sks dog")
CAT = Group(ROOT / "5_mia tabby cat", "5_mia tabby cat", 5, "mia tabby cat")


def count_words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


WISHES = Wishes((512, 512), count_words)


def picture(name: str, group: Group = DOG, caption: str | None = None, **known: object) -> Picture:
    file = None if caption is None else group.path / f"{name}.txt"
    path = group.path / f"{name}.png"
    facts = {"size": (512, 512), "content_hash": name, "caption": caption, "caption_file": file, **known}
    return Picture(path, group, **facts)  # type: ignore[arg-type]


def facts(*pictures: Picture) -> Facts:
    return Facts(ROOT, list(dict.fromkeys(one.group for one in pictures)), pictures)


def found(kind: str, *pictures: Picture, wishes: Wishes = WISHES) -> dict[str, str]:
    """What is said of each place of one kind of finding."""
    findings = find_all(facts(*pictures), wishes)
    return {place.path.name: place.detail for one in findings if one.kind == kind for place in one.places}


# ---- sizes ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([(512, 512), (768, 512), (448, 640)]))
def test_too_small_is_fewer_pixels_and_extreme_is_more_than_half_cut_away(
    width: int, height: int, resolution: tuple[int, int]
) -> None:
    wishes = replace(WISHES, resolution=resolution)
    one = picture("a", size=(width, height))
    assert bool(found("too-small", one, wishes=wishes)) == (width * height < resolution[0] * resolution[1])
    scale = max(resolution[0] / width, resolution[1] / height)  # of the whole picture, just covering the shape
    kept = resolution[0] * resolution[1] / (width * scale * height * scale)
    if abs(kept - 0.5) > 1e-9:
        assert bool(found("extreme-aspect", one, wishes=wishes)) == (kept < 0.5)


# ---- words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "is_missing"),
    [
        ("sks dog", False), ("a photo of SKS dog", False), ("dog, sks, grass", False), ("sks's dog", False),
        ("(sks:1.2) dog", False), ("dog_sks", False), ("a dog", True), ("asks a dog", True), ("sksy dog", True),
    ],
)  # fmt: skip
def test_the_trigger_is_looked_for_as_a_word(caption: str, is_missing: bool) -> None:
    assert bool(found("trigger-missing", picture("a", caption=caption))) == is_missing
    assert bool(found("trigger-missing", picture("a", PLAIN, caption), wishes=replace(WISHES, trigger="sks"))) == (
        is_missing
    )


def test_a_trigger_that_is_given_counts_instead_of_the_folders() -> None:
    pictures = picture("a", caption="sks dog"), picture("b", caption="ohwx dog")
    assert set(found("trigger-missing", *pictures)) == {"b.png"}
    assert set(found("trigger-missing", *pictures, wishes=replace(WISHES, trigger="ohwx"))) == {"a.png"}


def test_without_a_trigger_or_a_caption_file_nothing_is_missing() -> None:
    assert found("trigger-missing", picture("a", PLAIN, "a dog"), picture("b", DOG)) == {}


@pytest.mark.parametrize(
    ("group", "caption", "said"),
    [
        (DOG, "sks dog", None), (DOG, "two dogs", None), (DOG, "a Dog's ear", None), (DOG, "sks doghouse", "dog"),
        (DOG, "sks on a sofa", "dog"), (CAT, "mia, a tabby cat", None), (CAT, "mia, tabby_cat", None),
        (CAT, "mia the cat", "tabby cat"), (PLAIN, "anything", None),
        (Group(ROOT / "1_sks", "1_sks", 1, "sks"), "x", None),
    ],
)  # fmt: skip
def test_the_class_is_what_follows_the_identifier(group: Group, caption: str, said: str | None) -> None:
    details = list(found("class-contradicted", picture("a", group, caption)).values())
    assert details == ([] if said is None else [f'no "{said}" in: {caption}'])


def test_the_class_of_another_folder_is_named() -> None:
    pictures = picture("a", DOG, "a tabby cat"), picture("b", CAT, "mia tabby cat")
    assert found("class-contradicted", *pictures) == {
        "a.png": 'no "dog" in: a tabby cat (it says "tabby cat", another folder)'
    }


@given(st.integers(1, 300), st.sampled_from([75, 150, 225]))
def test_as_many_tokens_as_are_trained_are_not_too_many(number: int, most: int) -> None:
    wishes = replace(WISHES, max_tokens=most)
    details = found("caption-long", picture("a", caption="dog " * number), wishes=wishes)
    assert details == ({} if number <= most else {"a.png": f"{number} tokens, {number - most} too many"})


# ---- tags ----------------------------------------------------------------------------------------------------------

TAGGED = [picture(f"{i:02d}", caption="sks dog, long hair, red_collar") for i in range(10)]


@pytest.mark.parametrize(
    ("tag", "said"),
    [
        ("long hiar", "long hair"), ("long hairs", "long hair"), ("lon hair", "long hair"), ("log hair", "long hair"),
        ("red colar", "red collar"), ("snow", None),
    ],
)  # fmt: skip
def test_a_tag_that_occurs_once_and_what_it_may_be_a_slip_for(tag: str, said: str | None) -> None:
    odd = picture("odd", caption=f"sks dog, Long Hair, {tag}")
    expected = f'"{tag}"' + ("" if said is None else f', perhaps "{said}"?')
    assert found("tag-once", *TAGGED, odd) == {"odd.png": expected}


def test_a_tag_twice_or_spelt_otherwise_is_not_once() -> None:
    pictures = [picture(name, caption="sks dog, Red Collar, blue  sky") for name in "ab"]
    assert found("tag-once", *TAGGED, *pictures) == {}


def test_few_captions_and_sentences_are_no_tags() -> None:
    assert found("tag-once", *TAGGED[:8], picture("a", caption="sks dog, x, y")) == {}
    sentences = [picture(str(i), caption=f"a dog called sks, which runs in the field number {i}") for i in range(20)]
    assert found("tag-once", *sentences) == {}


# ---- files ---------------------------------------------------------------------------------------------------------


def test_of_copies_the_first_with_a_caption_stays() -> None:
    captions = {"a": None, "b": "sks dog", "c": "dog"}
    pictures = [picture(name, DOG, caption, content_hash="x") for name, caption in captions.items()]
    assert duplicates(pictures) == {pictures[0].path: pictures[1].path, pictures[2].path: pictures[1].path}
    broken = [picture("d", problem="cut", content_hash=""), picture("e", problem="cut", content_hash="")]
    assert duplicates(broken) == {}


@pytest.mark.parametrize(
    ("name", "is_text"),
    [
        ("Dog 1.JPG.txt", True), ("dog 1.txt.txt", True), ("dog 1.text", True), ("dog 1 .txt", True),
        ("dog 1.caption.txt", True), ("DOG 1.TXT", True), ("dog 1.jpg.docx", False), ("dog 1.json", False),
        ("dog 11.txt", None), ("dog.txt", None), ("dog 1.npz", None), ("dog 1.xyz.txt", None), ("dog 1.zip", None),
    ],
)  # fmt: skip
def test_files_that_were_meant_as_captions(name: str, is_text: bool | None) -> None:
    photo, file = Path("dog 1.jpg"), Path(name)
    texts, office = strays([file], [photo], [".jpg", ".png"])
    assert (texts, office) == {True: ({photo: file}, {}), False: ({}, {photo: file}), None: ({}, {})}[is_text]


def test_one_of_several_strays_is_taken_and_the_office_file_only_alone() -> None:
    photo = Path("a.jpg")
    texts, office = strays(map(Path, ["a.text", "a.jpg.txt", "a.docx"]), [photo], [".jpg"])
    assert (texts, office) == ({photo: Path("a.jpg.txt")}, {})


# ---- folders -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 40))
def test_balance_counts_pictures_times_repeats(dogs: int, cats: int) -> None:
    pictures = [picture(f"d{i}", DOG) for i in range(dogs)] + [picture(f"c{i}", CAT) for i in range(cats)]
    totals = sorted([dogs * 10, cats * 5])
    details = found("imbalance", *pictures)
    assert bool(details) == (totals[1] > 3 * totals[0])
    for path, group, number in ((DOG.path, DOG, dogs), (CAT.path, CAT, cats)):
        said = details.get(path.name, "")
        if "would be" in said:  # the advice mends it
            repeats = int(said.partition("`")[2].partition("_")[0])
            assert repeats * number == pytest.approx(totals[1], abs=number / 2)
            assert group.repeats < repeats


# ---- all rules -----------------------------------------------------------------------------------------------------

_pictures = st.builds(
    picture,
    name=st.sampled_from("abcdef"),
    group=st.sampled_from([PLAIN, DOG, CAT, Group(ROOT / "900_x", "900_x", 900, "x")]),
    caption=st.none() | st.text(max_size=20),
    problem=st.sampled_from(["", "", "cut off"]),
    size=st.tuples(st.integers(1, 2000), st.integers(1, 2000)),
    sharpness=st.floats(0, 1e4),
    has_transparency=st.booleans(),
    num_frames=st.integers(1, 3),
    mask=st.none()
    | st.builds(PictureMask, st.none() | st.just(ROOT / "mask.png"), st.none(), st.just("cut off"))
    | st.builds(
        PictureMask,
        st.none() | st.just(ROOT / "mask.png"),
        st.builds(
            MaskLook,
            st.tuples(st.integers(1, 2000), st.integers(1, 2000)),
            st.just(""),
            st.integers(0, 255),
            st.integers(0, 255),
            st.booleans(),
        ),
    ),
)
_WORDS = st.none() | st.text(st.characters(exclude_characters="{}"), max_size=5)


@given(
    st.lists(_pictures, max_size=8, unique_by=lambda one: one.path),
    _WORDS,
    _WORDS,
)
def test_no_rule_fails_or_speaks_of_nothing(pictures: list[Picture], trigger: str | None, caption: str | None) -> None:
    found = replace(facts(*pictures), has_masks=any(one.mask for one in pictures))
    findings = find_all(found, Wishes((512, 512), count_words, trigger, caption))
    order = [SEVERITIES.index(finding.severity) for finding in findings]
    assert order == sorted(order)
    assert len({finding.kind for finding in findings}) == len(findings)
    for finding in findings:
        check_words(finding)
        if finding.kind not in ("no-pictures", "trigger-missing-default"):
            assert finding.places
    assert ("no-pictures" in {finding.kind for finding in findings}) == all(one.problem for one in pictures)


def check_words(finding: Finding) -> None:
    for text in (finding.message, finding.fix):
        assert text.strip() and "{" not in text and not text.endswith(".")


def test_every_rule_is_in_the_table_once() -> None:
    assert len({rule.__name__ for rule in RULES}) == len(RULES)
    assert all(rule.__doc__ for rule in RULES)
