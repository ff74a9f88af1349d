"""Which tags are taken, how they are spelled and ordered: properties, whatever a tagger finds."""

from hypothesis import given
from hypothesis import strategies as st

from lorasmith.data.tags import ScoredTag, TagRules, choose, key, read_list, read_replacements, spelled, with_missing

NAMES = st.text(alphabet="abc_ ()", min_size=1, max_size=6).filter(lambda name: bool(key(name)))
SCORED = st.lists(
    st.builds(ScoredTag, NAMES, st.sampled_from(["general", "character", "rating", "meta"]), st.floats(0, 1)),
    max_size=12,
)
ORDERS = st.sampled_from(["confidence", "alphabetical", "category"])


@given(SCORED, st.floats(0, 1), st.floats(0, 1), ORDERS, st.lists(NAMES, max_size=3), st.booleans())
def test_exactly_the_tags_above_their_threshold_each_once(scored, general, character, order, bad, has_rating) -> None:  # type: ignore[no-untyped-def]
    blacklist = frozenset(map(key, bad))
    chosen = choose(scored, TagRules(general, character, has_rating, order=order, blacklist=blacklist))
    limits = {"character": character, "general": general, "meta": general}
    wanted = {key(tag.name) for tag in scored if tag.score >= limits.get(tag.category, 2)} - blacklist
    ratings = [tag for tag in scored if tag.category == "rating"] if has_rating else []
    best = {key(max(ratings, key=lambda tag: tag.score).name)} - blacklist if ratings else set()
    assert sorted(map(key, chosen)) == sorted(wanted | best)


@given(SCORED, ORDERS, st.randoms())
def test_the_order_in_which_a_tagger_lists_its_tags_changes_nothing(scored, order, rng) -> None:  # type: ignore[no-untyped-def]
    rules = TagRules(0, 0, order=order)
    distinct = list({key(tag.name): tag for tag in scored}.values())
    shuffled = list(distinct)
    rng.shuffle(shuffled)
    assert choose(distinct, rules) == choose(shuffled, rules)


@given(st.lists(NAMES.map(str.strip), min_size=1, max_size=6), st.text(alphabet="abc_, \n", max_size=12))
def test_adding_changes_nothing_that_is_there_and_is_done_once(tags, older) -> None:  # type: ignore[no-untyped-def]
    text = with_missing(older, tags, ", ")
    assert with_missing(text, tags, ", ") == text
    assert text.startswith(older.partition("\n")[0].rstrip().removesuffix(",").rstrip())
    assert text.partition("\n")[2] == older.partition("\n")[2]
    assert {key(tag) for tag in tags} <= {key(part) for part in text.partition("\n")[0].split(",")}


def test_emoticons_keep_their_mouths() -> None:
    assert [spelled(tag, keeps_underscores=False) for tag in ("^_^", "o_o", "long_hair")] == ["^_^", "o_o", "long hair"]


def test_lists() -> None:
    assert read_list(None) == [] == read_list(" , ")
    assert read_list(r"a, b\,c , d_e") == ["a", "b,c", "d_e"]
    assert read_replacements(r"a:b, :d:smile, x\:y:z") == {"a": "b", ":d": "smile", "x:y": "z"}
