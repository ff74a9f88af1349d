"""Cleaning: each table does its own work and no other, a second time changes nothing, and bad tables are told."""

import random
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lorasmith.data.caption_cleaning import (
    Cleaner,
    Rules,
    add_first,
    fold,
    frequencies,
    limit,
    load_rules,
    split_tags,
)
from lorasmith.errors import UserError

SHIPPED = load_rules()
CLEANER = Cleaner(SHIPPED)

# Texts made of what the rules look for, and of anything.
WORDS = [
    "hair", "long_hair", "long hair", "very long hair", "Hair", "eyes", "blue eyes", "rating:safe", "^_^", "o_o", ":(",
    ":)", "grey hair", "1girls", "a_", "__", "", " ", "arafed", "girl girl", "anime", "cartoon", "there is a", "girl",
    "(", ")", "(red", "blue:1.2)", "[a", "b]", "\\(", "{x|y}", "long  hair", "sks", "Long_Hair", "_", "woman's",
]  # fmt: skip
PIECES = st.sampled_from(WORDS) | st.text(max_size=4)
TEXTS = st.lists(PIECES, max_size=12).flatmap(
    lambda pieces: st.sampled_from([", ", ",", " ", "\n", ",,"]).map(lambda between: between.join(pieces))
)
TAGS = PIECES.filter(lambda text: text.strip() and "," not in text)


@st.composite
def cleaners(draw: st.DrawFn) -> Cleaner:
    rules = Rules(
        tidy=draw(st.booleans()),
        underscores_to_spaces=draw(st.booleans()),
        keep=tuple(draw(st.lists(TAGS, max_size=2))),
        remove=tuple(draw(st.lists(TAGS, max_size=2))),
        rename=draw(st.dictionaries(TAGS, TAGS, max_size=3)),
        general=draw(st.dictionaries(TAGS, st.lists(st.sampled_from(["* hair", "hair *", "sks", "o_o"])), max_size=3)),
        replace=draw(st.dictionaries(TAGS, PIECES, max_size=3)),
    )
    try:
        return Cleaner(rules)
    except UserError:  # rules that go round in circles
        return CLEANER


@given(cleaner=st.just(CLEANER) | cleaners(), text=TEXTS)
@example(CLEANER, "(a, x [, b), (a, b), hair, hair")
@example(CLEANER, "girl girl girl girl girl")
def test_cleaning_a_second_time_changes_nothing(cleaner: Cleaner, text: str) -> None:
    try:
        tags, caption = ", ".join(cleaner.tags(text)[0]), cleaner.caption(text)[0]
    except UserError:  # a circle that shows only between words of a caption
        return
    assert cleaner.tags(tags) == (cleaner.tags(tags)[0], []) and ", ".join(cleaner.tags(tags)[0]) == tags
    assert cleaner.caption(caption) == (caption, [])


@given(text=TEXTS)
def test_nothing_changes_without_rules(text: str) -> None:
    cleaner = Cleaner(Rules())
    assert cleaner.tags(text) == (split_tags(text), []) and cleaner.caption(text) == (text, [])


@given(text=TEXTS)
def test_what_stays_of_the_tags_stays_in_its_order(text: str) -> None:
    before = [" ".join(tag.split()) for tag in split_tags(text, {fold(tag) for tag in SHIPPED.keep})]
    after = CLEANER.tags(text)[0]
    unchanged = [tag for tag in after if tag in before]
    assert sorted(unchanged, key=before.index) == unchanged
    assert len(after) == len({fold(tag) for tag in after})


LETTERS = st.text("abcxyzäß'’-_1", min_size=1, max_size=6)


@given(before=LETTERS, after=LETTERS, word=st.sampled_from(sorted(SHIPPED.replace)))
def test_nothing_is_changed_inside_other_words(before: str, after: str, word: str) -> None:
    for joined in (f"{before}{word}", f"{word}{after}", f"{before}{word}{after}"):
        inner = [part for part in SHIPPED.replace if re.search(rf"(^|\s){re.escape(part)}(\s|$)", joined)]
        if not inner:
            assert CLEANER.caption(f"one {joined} two")[0] == f"one {joined} two"
        assert CLEANER.tags(joined.replace("_", ""))[0] == [joined.replace("_", "")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("long_hair,  solo ,", ["long hair", "solo"]),
        ("^_^, o_O, some_tag", ["^_^", "o_O", "some tag"]),
        ("hair, hair ornament", ["hair", "hair ornament"]),  # no kind of hair
        ("hair, long_hair, absurdly long hair", ["absurdly long hair"]),
        ("chair, armchair, long chair", ["chair", "armchair", "long chair"]),  # not listed
        ("Solo, solo, SOLO", ["Solo"]),
        ("rating:safe, Rating:Explicit, rating:5", ["rating:5"]),
        ("grey_hair, gray hair", ["gray hair"]),
        ("(red, blue:1.2), red, red", ["(red, blue:1.2)", "red"]),
        (":(, long_hair, :)", [":(", "long hair", ":)"]),  # faces are no brackets
        ("hatsune_miku_\\(cosplay\\), (never closed, a_b", ["hatsune miku \\(cosplay\\)", "(never closed", "a b"]),
        ("one\ntwo_three\r\nfour", ["one", "two three", "four"]),
        (" , ,", []),
    ],
)
def test_tags(text: str, expected: list[str]) -> None:
    assert CLEANER.tags(text)[0] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Arafed  woman with a , , hat,", "woman with a, hat"),
        ("an anime anime anime girl girl", "an anime girl"),
        ("a girl, girl's hair", "a girl, girl's hair"),
        ("there is a cat\n\n, there are dogs", "a cat\ndogs"),
        ("1,000 cats, snake_case ok", "1,000 cats, snake_case ok"),
    ],
)
def test_captions(text: str, expected: str) -> None:
    assert CLEANER.caption(text)[0] == expected


def test_a_replacement_keeps_a_capital_letter_and_tells_itself() -> None:
    cleaner = Cleaner(Rules(replace={"red car": "blue car", "usa": "USA"}))
    text, changes = cleaner.caption("Red  car, a RED CAR, redcar, the usa")
    assert text == "Blue car, a Blue car, redcar, the USA"
    assert [(change.before, change.after) for change in changes] == [
        ("Red  car", "Blue car"), ("RED CAR", "Blue car"), ("usa", "USA"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (Rules(rename={"a": "b", "b": "a"}), "rename tags in a circle: a -> b -> a"),
        (Rules(rename={"a": "b_c", "b c": "a"}, underscores_to_spaces=True), "in a circle: a -> b_c -> b c -> a"),
        (Rules(replace={"girl": "girl girl"}), "never come to an end: girl -> girl girl"),
        (Rules(replace={"a": "b", "b": "a"}), "never come to an end"),
        (Rules(replace={"cat": "a cat here"}), "never come to an end"),
    ],
)
def test_rules_that_undo_each_other_are_refused(rules: Rules, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        Cleaner(rules)


# ---- over all pictures ---------------------------------------------------------------------------------------------

LISTS = st.lists(st.lists(st.sampled_from(["a", "A", "b", "c", "d", "e"]), unique_by=fold), max_size=8)


@given(lists=LISTS, min_count=st.integers(1, 4), max_tags=st.none() | st.integers(1, 4), kept=st.sets(st.just("a")))
def test_rare_tags_and_those_too_many_are_left_out(
    lists: list[list[str]], min_count: int, max_tags: int | None, kept: set[str]
) -> None:
    result, changes = limit(lists, kept=kept, min_count=min_count, max_tags=max_tags)
    counts = Counter(fold(tag) for tags in result for tag in tags)
    assert all(number >= min_count for tag, number in counts.items() if tag not in kept)
    assert all(len(tags) <= (max_tags or 99) for tags in result)
    for before, after, own in zip(lists, result, changes, strict=True):
        assert after == [tag for tag in before if tag in after]
        assert sorted([*after, *(change.before for change in own)]) == sorted(before)
    assert limit(result, kept=kept, min_count=min_count, max_tags=max_tags) == (result, [[] for _ in result])


@given(tags=st.lists(st.sampled_from(["a", "B", "b", "c"]), unique_by=fold))
def test_added_tags_come_first_and_once(tags: list[str]) -> None:
    result, changes = add_first(tags, ["b", "x"])
    assert result == ["b", "x", *(tag for tag in tags if fold(tag) != "b")]
    assert bool(changes) == (tags[:2] != ["b", "x"]) and add_first(result, ["b", "x"]) == (result, [])


def test_frequencies_count_pictures_and_not_spellings() -> None:
    assert frequencies([["Cat", "dog"], ["cat", "CAT"], []]) == {"Cat": 2, "dog": 1}


@given(text=TEXTS)
def test_splitting_loses_nothing_but_commas_and_spaces(text: str) -> None:
    def letters(given: str) -> str:
        return re.sub(r"[\s,]", "", given)

    units = split_tags(text)
    assert letters("".join(units)) == letters(text) and all(unit.strip() == unit for unit in units)
    if not re.search(r"[()\[\]{}]", text):
        assert not any("," in unit for unit in units)


# ---- tables --------------------------------------------------------------------------------------------------------


def rules_of(tmp_path: Path, text: str) -> Rules:
    path = tmp_path / "rules.toml"
    path.write_text(text, encoding="utf-8-sig")
    return load_rules(path)


def test_a_table_extends_the_one_that_comes_along_or_replaces_it(tmp_path: Path) -> None:
    text = '[tags]\nremove = ["solo"]\n[tags.rename]\n"grey hair" = "grey hair"\n[captions.replace]\nwoman = "girl"\n'
    extended = Cleaner(rules_of(tmp_path, text))
    assert extended.tags("solo, a_b, grey hair, grey eyes")[0] == ["a b", "grey hair", "gray eyes"]
    assert extended.caption("arafed woman")[0] == "girl"
    alone = Cleaner(rules_of(tmp_path, f"extend = false\n{text}"))
    assert alone.tags("solo, a_b, grey hair, grey eyes, hair, a_b")[0] == ["a_b", "grey hair", "grey eyes", "hair"]
    assert alone.caption("arafed woman")[0] == "arafed girl"
    off = "[tags]\nunderscores_to_spaces = false\n[tags.general]\nhair = []\n"
    assert Cleaner(rules_of(tmp_path, off)).tags("a_b, hair, long hair")[0] == ["a_b", "hair", "long hair"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tags = 3", "line 1: tags: expected a table of its own"),
        ("\n[tag]\n", 'line 2: there is no "tag"; did you mean tags?'),
        ('[tags]\nkeep = []\nremoved = ["a"]', 'line 3: there is no "removed" in [tags]; did you mean remove?'),
        ("[tags]\nxyz = 1", 'there is no "xyz" in [tags]; known are underscores_to_spaces, keep, remove'),
        ('[tags]\nremove = "a"', 'line 2: remove: expected a list of texts, such as ["a", "b"], found \'a\''),
        ("[tags]\nremove = [1]", "line 2: remove: expected a text in quotes"),
        ('[tags]\nremove = ["a, b"]', 'line 2: remove: "a, b" has a comma, which divides tags'),
        ('[tags]\nremove = [""]', "an empty text is no tag"),
        ("extend = 1", "line 1: extend: expected true or false, found 1"),
        (
            '[tags.rename]\nok = "fine"\na = ""',
            "line 3: a: an empty text is no tag; to leave the tag out, put it into re",
        ),
        ('[tags.rename]\na = "b, c"', '"b, c" has a comma'),
        ("[tags.rename]\na = 1", "line 2: a: expected a text in quotes"),
        ('[tags.general]\n"hair" = "* hair"', "line 2: hair: expected a list of texts"),
        ('[tags.general]\n"hair" = ["long*hair"]', "a star stands for words at the beginning or the end"),
        ("[captions.replace]\n\n\na = 3", "line 4: a: expected a text in quotes"),
        ('[captions.replace]\n"" = "x"', "line 2: replace: an empty text on the left names nothing"),
        ("[tags\n", "is not valid TOML"),
    ],
)
def test_a_table_with_mistakes_is_told_with_their_lines(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        rules_of(tmp_path, text)
    assert message in str(error.value) and "rules.toml" in str(error.value)


def test_a_table_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be opened"):
        load_rules(tmp_path / "gone.toml")
    (tmp_path / "rules.toml").write_bytes("a = 'é'".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_rules(tmp_path / "rules.toml")


def test_the_work_grows_with_the_text_and_no_faster() -> None:
    """Counts calls, as a clock would tell of other things too: what becomes of a tag is worked out once."""
    rng = random.Random(0)
    cleaner, calls = Cleaner(SHIPPED), Counter[str]()
    followed = cleaner._followed
    cleaner._followed = lambda tag: calls.update([tag]) or followed(tag)  # type: ignore[method-assign]
    names = [f"tag_{number}" for number in range(200)]
    for _ in range(500):
        cleaner.tags(", ".join(rng.sample(names, 30)))
    assert len(calls) == 400 and max(calls.values()) == 1  # each as it was, and cleaned
