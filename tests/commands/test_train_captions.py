"""Every rule for captions, through the command: a run with a rule learns what a run learns whose captions are so."""

import contextlib
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lorasmith.cli import main
from lorasmith.training_run import session
from tests.commands.test_train_options import COMMON, Result, same, write_pictures
from tests.tiny import write_tiny

TAGS = ["red, sks, small", "blue, sks, round", "green, sks, new"]


class Place:
    """A model, and runs on pictures with any captions; equal runs are made once."""

    def __init__(self, path: Path) -> None:
        self.path, self._numbers = path, itertools.count()
        self._folders, self._results = dict[tuple[str, ...], Path](), dict[tuple[str, ...], Result]()
        self.base = write_tiny(path / "sd1.safetensors", width=8)

    def folder(self, captions: Sequence[str]) -> Path:
        """Return a folder with the same pictures for every list of captions."""
        key = tuple(captions)
        if key not in self._folders:
            folder = self.path / str(next(self._numbers)) / "1_sks thing"
            self._folders[key] = write_pictures(folder, dict(enumerate(captions))).parent
        return self._folders[key]

    def words(self, captions: Sequence[str], *options: object) -> list[str]:
        """Return the command line, without --output."""
        words = ["train", "--base", self.base, "--images", self.folder(captions), *COMMON, "--rank", 2]
        words += ["--train", "text_encoder"]
        words += [] if {"--steps", "--epochs"} & set(options) else ["--steps", 3]
        return [str(word) for word in (*words, "--learning-rate", 0.001, *options)]

    def train(self, captions: Sequence[str], *options: object) -> Result:
        words = tuple(self.words(captions, *options))
        if words not in self._results:
            folder, printed = self.path / str(next(self._numbers)), io.StringIO()
            with contextlib.redirect_stdout(printed):
                assert main([*words, "--output", str(folder)]) == 0
            self._results[words] = Result(folder, printed.getvalue())
        return self._results[words]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SOURCE_DATE_EPOCH", "1700000000")
        patched.setattr(session, "write_report", lambda folder, contents: folder)  # half of a run's time
        yield Place(tmp_path_factory.mktemp("place"))


def swapped(old: str, new: str) -> list[str]:
    return [tags.replace(old, new) for tags in TAGS]


# ---- what stands in a caption --------------------------------------------------------------------------------------


def test_prefix_and_suffix_are_words_of_every_caption(place: Place) -> None:
    written = place.train([f"a photo of {tags} by me" for tags in TAGS])
    assert same(place.train(TAGS, "--caption-prefix", "a photo of", "--caption-suffix", "by me"), written)
    assert not same(written, place.train(TAGS))


def test_the_separator_divides_the_parts(place: Place) -> None:
    dotted = swapped(",", ".")
    shuffled = place.train(dotted, "--shuffle-caption", "--caption-separator", ".")
    assert same(shuffled, place.train(TAGS, "--shuffle-caption")) and not same(shuffled, place.train(TAGS))
    assert not same(place.train(dotted, "--shuffle-caption"), shuffled)


def test_parts_before_the_mark_are_kept_like_counted_ones(place: Place) -> None:
    marked = swapped(", sks", " ||| sks")
    kept = place.train(marked, "--shuffle-caption", "--keep-tokens-separator", "|||")
    assert same(kept, place.train(TAGS, "--shuffle-caption", "--keep-tokens", 1))
    assert not same(kept, place.train(TAGS, "--shuffle-caption"))
    assert same(place.train(marked, "--keep-tokens-separator", "|||"), place.train(TAGS))
    assert json.loads(kept.metadata["ss_tag_frequency"])["1_sks thing"]["sks"] == 3


def test_the_second_separator_holds_parts_together(place: Place) -> None:
    held = swapped(", sks", ";;;sks")
    assert same(place.train(held, "--secondary-separator", ";;;"), place.train(TAGS))
    alone = ["red;;;sks;;;small", "blue;;;sks;;;round", "green;;;sks;;;new"]
    assert same(place.train(alone, "--shuffle-caption", "--secondary-separator", ";;;"), place.train(TAGS))


def test_variants_and_lines_are_chosen_and_without_the_option_they_are_text(place: Place) -> None:
    one = [f"{{{tags}}}" for tags in TAGS]
    assert same(place.train(one, "--wildcards"), place.train(TAGS))
    assert not same(place.train(one), place.train(TAGS))
    lines = [f"{tags}\n{tags}" for tags in TAGS]
    assert same(place.train(lines, "--wildcards"), place.train(TAGS)) and same(place.train(lines), place.train(TAGS))
    several = [f"{{{tags}|something}} else\nno {{{{braces}}}}" for tags in TAGS]
    results = [place.train(several, "--wildcards", "--seed", seed) for seed in (1, 2)]
    assert not same(*results) and "only the first line is used" not in results[0].plan
    assert "only the first line is used" in place.train(lines).plan


# ---- what is left out ----------------------------------------------------------------------------------------------


def test_parts_that_are_left_out_have_no_influence(place: Place) -> None:
    first = [tags.partition(",")[0] for tags in TAGS]
    assert same(place.train(TAGS, "--tag-dropout", 1, "--keep-tokens", 1), place.train(first))
    half = place.train(TAGS, "--tag-dropout", 0.5, "--keep-tokens", 1)
    assert not same(half, place.train(first)) and not same(half, place.train(TAGS))
    assert half.metadata["ss_caption_tag_dropout_rate"] == "0.5"


def test_every_second_epoch_is_without_captions(place: Place) -> None:
    options = ["--caption-dropout-every-epochs", 2]
    assert same(place.train(TAGS, "--epochs", 1, *options), place.train(TAGS, "--epochs", 1))
    assert not same(place.train(TAGS, "--epochs", 2, *options), place.train(TAGS, "--epochs", 2))
    every = place.train(TAGS, "--caption-dropout-every-epochs", 1)
    assert same(every, place.train(TAGS, "--caption-dropout", 1))
    assert every.metadata["ss_caption_dropout_every_n_epochs"] == "1"


def test_a_warm_up_begins_with_the_leading_parts(place: Place) -> None:
    two = [tags.rpartition(",")[0] for tags in TAGS]
    options = ["--token-warmup-steps", 2, "--token-warmup-min", 2]
    assert same(place.train(TAGS, "--steps", 1, *options), place.train(two, "--steps", 1))
    whole = place.train(TAGS, *options)
    assert not same(whole, place.train(two)) and not same(whole, place.train(TAGS))
    share = place.train(TAGS, "--token-warmup-steps", 0.7, "--token-warmup-min", 2)  # of 3 steps
    assert same(share, whole)
    assert "parts of a caption: 2 at first, besides those kept in place, and all after 2 steps" in share.plan


# ---- how captions are read -----------------------------------------------------------------------------------------


def test_long_captions_are_used_whole_in_chunks_and_cut_ones_are_told(place: Place) -> None:
    words = "one two three four five " * 16
    long = [f"{words} {tags}" for tags in TAGS]
    cut = place.train(long)
    assert same(cut, place.train([words] * 3))
    assert "3 captions are longer than 75 tokens, and the last words are not used: 0.png, 1.png, 2.png" in cut.plan
    whole = place.train(long, "--max-token-length", 150)
    assert not same(whole, place.train([words] * 3, "--max-token-length", 150))
    assert "longer than" not in whole.plan and whole.metadata["ss_max_token_length"] == "150"
    assert cut.metadata["ss_max_token_length"] == "None" and "longer than" not in place.train(TAGS).plan


def test_a_cut_caption_is_told_where_another_folder_has_a_picture_of_that_name(place: Place) -> None:
    parent = place.path / "twins"
    write_pictures(parent / "1_a", {0: "cat " * 90})
    write_pictures(parent / "1_b", {0: "cat"})
    words, printed = place.words(TAGS, "--images", parent, "--output", place.path / "dry", "--dry-run"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(words) == 0
    assert "1 caption is longer than 75 tokens, and the last words are not used: 0.png" in printed.getvalue()


def test_weights_count_only_when_asked_for(place: Place) -> None:
    weighted = [f"({tags}:1.5)" for tags in TAGS]
    result = place.train(weighted, "--weighted-captions")
    assert not same(result, place.train(TAGS)) and not same(result, place.train(weighted))
    assert same(place.train([f"({tags}:1)" for tags in TAGS], "--weighted-captions"), place.train(TAGS))
    assert same(place.train(TAGS, "--weighted-captions"), place.train(TAGS))


# ---- the run -------------------------------------------------------------------------------------------------------

VARIED = [
    "--shuffle-caption", "--keep-tokens", 1, "--caption-prefix", "p", "--caption-dropout", 0.2, "--tag-dropout", 0.3,
    "--token-warmup-steps", 3, "--caption-dropout-every-epochs", 3, "--wildcards", "--weighted-captions",
]  # fmt: skip


SEVERAL = [f"({tags}:1.2), {{one|two|three}}\nanother {{line|caption}}" for tags in TAGS]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_resumed_run_has_the_same_captions(place: Place, workers: int) -> None:
    whole = place.train(SEVERAL, *VARIED, "--steps", 7)
    with contextlib.redirect_stdout(io.StringIO()):
        cut = place.path / f"cut-{workers}"
        words = place.words(SEVERAL, *VARIED, "--steps", 7, "--output", cut)
        assert main([*words, "--state-every-steps", "2", "--keep-states", "9"]) == 0
        (cut / "last.safetensors").unlink()
        state = cut / "states" / "step-00000004"
        assert main(["train", "--resume", str(state), "--workers", str(workers), "--state-every-steps", "0"]) == 0
    assert (cut / "last.safetensors").read_bytes() == (whole.folder / "last.safetensors").read_bytes()
    assert not same(whole, place.train(SEVERAL, *VARIED, "--steps", 7, "--seed", 1))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("caption-prefix", "q"), ("caption-suffix", "q"), ("caption-separator", "."), ("keep-tokens", "2"),
        ("secondary-separator", ";;;"), ("tag-dropout", "0.1"), ("caption-dropout-every-epochs", "2"),
        ("max-token-length", "150"), ("token-warmup-steps", "4"), ("token-warmup-min", "2"),
    ],
)  # fmt: skip
def test_a_resumed_run_keeps_its_rules(
    place: Place, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    folder = place.train(TAGS, *VARIED, "--steps", 7).folder
    before = (folder / "last.safetensors").read_bytes()
    assert main(["train", "--resume", str(folder), "--steps", "9", f"--{option}", value]) == 2
    error = capsys.readouterr().err
    assert "a resumed run keeps its options" in error and f"data.{option.replace('-', '_')}" in error
    assert (folder / "last.safetensors").read_bytes() == before


def test_the_plan_says_how_captions_vary_and_shows_it(place: Place) -> None:
    plan = place.train(TAGS, *VARIED, "--steps", 7).plan
    assert "0.2 of the samples are trained without a caption" in plan
    assert "every sample of each 3. epoch is trained without a caption" in plan
    assert '"blue, sks, round" becomes, for example, "p blue' in plan
    assert "becomes" not in place.train(TAGS).plan


def test_captions_are_drawn_as_samples_without_their_marks(place: Place) -> None:
    marked = swapped(", sks", " ||| sks")
    words = place.words(marked, "--keep-tokens-separator", "|||", "--shuffle-caption", "--caption-prefix", "p")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([*words, "--output", str(place.path / "dry"), "--before-after", "--dry-run"]) == 0
    assert '"p red, sks, small"' in printed.getvalue() and '"p blue, sks, round"' in printed.getvalue()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep-tokens", "1", "--keep-tokens-separator", "|||"], "both say which parts stay in place"),
        (["--secondary-separator", ",,"], "secondary_separator = ,, cannot be told from the other separators"),
        (["--keep-tokens-separator", ".", "--caption-separator", ". "], "is part of caption_separator"),
        (["--caption-separator", ""], "an empty text separates nothing"),
        (["--token-warmup-min", "2"], "token_warmup_steps, how long it takes, is missing"),
        (["--max-token-length", "100"], "100 tokens of a caption cannot be used; give 75, 150 or 225"),
        (["--tag-dropout", "1.5"], "--tag-dropout 1.5: expected a number at least 0 and at most 1"),
    ],
)
def test_contradictions_are_told(
    place: Place, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main([*place.words(TAGS, *options), "--output", str(place.path / "none")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (place.path / "none").exists()
