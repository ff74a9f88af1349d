"""Embeddings in captions, against diffusers' own loader, WebUI's search, and the tokens that they are made equal to."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorasmith import model_families
from lorasmith.caching import weights_hash
from lorasmith.checkpoint import open_checkpoint
from lorasmith.models import tokenizer
from lorasmith.models.embeddings import Embedding, Embeddings
from lorasmith.models.sd import StableDiffusion
from tests.tiny import build_tiny, write_tiny

WIDTHS = {"sd1": 24, "sd2": 32}


def vectors(count: int, width: int = 24, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def words(*texts: str) -> list[list[int]]:
    return [tokenizer.build()(text, add_special_tokens=False)["input_ids"] for text in texts]


def ids(embeddings: Embeddings, text: str) -> list[int]:
    return [number for word in embeddings.words([(text, 1.0)]) for number, _ in word]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: write_tiny(folder / f"{family}.safetensors", family, width=8) for family in WIDTHS}


def load(path: Path, *embeddings: Embedding, **options: Any) -> Any:
    with open_checkpoint(path) as checkpoint:
        return model_families.load(
            checkpoint, dtype=torch.float32, device=torch.device("cpu"), embeddings=Embeddings(embeddings), **options
        )


@torch.no_grad()
def encoded(model: Any, *captions: str) -> Tensor:
    return model.encode_text(list(captions))["text"]


# ---- what a caption becomes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_captions_are_encoded_as_by_diffusers(count: int) -> None:
    given = vectors(count)
    captions = ["a photo of <cat-toy>, red", "<cat-toy>", "(two <cat-toy> and <cat-toy>)", "a cat"]
    unet, vae, text = build_tiny("sd1", width=8)
    ours = StableDiffusion("sd1", unet, text, vae, "epsilon", embeddings=Embeddings([Embedding("<cat-toy>", given)]))
    expected = encoded(ours, *captions)
    unet, vae, text = build_tiny("sd1", width=8)
    words: Any = tokenizer.build.__wrapped__()  # one of its own, since diffusers adds tokens to it
    words.pad_token, words.model_max_length = "<|endoftext|>", 77
    build: Any = StableDiffusionPipeline
    pipeline = build(vae, text, words, unet, DDIMScheduler(), None, None, requires_safety_checker=False)
    pipeline.load_textual_inversion({"<cat-toy>": given})
    assert ("<cat-toy>_2" in words.get_vocab()) == (count == 3)
    theirs = torch.cat([pipeline.encode_prompt(caption, "cpu", 1, False)[0] for caption in captions])
    torch.testing.assert_close(expected, theirs)
    assert not torch.allclose(expected[1], expected[3])


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("options", [{}, {"max_token_length": 150, "weighted_captions": True, "clip_skip": 2}])
def test_the_vectors_of_words_are_encoded_as_these_words(
    family: str, options: dict[str, Any], files: dict[str, Path]
) -> None:
    table = load(files[family]).text_encoder.embeddings.token_embedding.weight
    cat, fox = words("cat", "red fox")
    model = load(files[family], Embedding("my-cat", table[cat]), Embedding("<pet>", table[fox]), **options)
    captions = ["a My-Cat on a mat", "(my-cat:1.3), <pet>, my-cat", "my-cat " * 75]
    plain = ["a cat on a mat", "(cat:1.3), red fox, cat", "cat " * 75]
    torch.testing.assert_close(encoded(model, *captions), encoded(load(files[family], **options), *plain))


def test_an_embedding_is_not_cut_in_two_by_the_end_of_a_chunk(files: dict[str, Path]) -> None:
    short = load(files["sd1"], Embedding("<pet>", vectors(2)))
    first, second = encoded(short, "dog " * 74, "<pet> cat")
    torch.testing.assert_close(encoded(short, f"{'dog ' * 74}<pet> cat")[0], first)
    long = load(files["sd1"], Embedding("<pet>", vectors(2)), max_token_length=150)
    both = encoded(long, f"{'dog ' * 74}<pet> cat")[0]
    torch.testing.assert_close(both, torch.cat([first[:76], second[1:]]))


def test_the_encoders_own_weights_are_the_same_and_frozen_and_adapters_learn_through_it(files: dict[str, Path]) -> None:
    plain, model = load(files["sd1"]), load(files["sd1"], Embedding("x", vectors(2)))
    assert weights_hash(model.text_encoder) == weights_hash(plain.text_encoder)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.adaptable_layers().keys() == plain.adaptable_layers().keys()
    weight = model.text_encoder.encoder.layers[0].mlp.fc1.weight.requires_grad_(True)
    model.encode_text(["x"])["text"].square().sum().backward()
    assert weight.grad.any()
    torch.testing.assert_close(encoded(model, "a cat"), encoded(plain, "a cat"))


def test_what_is_cached_with_other_embeddings_is_not_used(files: dict[str, Path]) -> None:
    def made_by(*embeddings: Embedding) -> Any:
        return load(files["sd1"], *embeddings).text_encoding()

    first, second = Embedding("a", vectors(1)), Embedding("b", vectors(2))
    made = [made_by(), made_by(first), made_by(second), made_by(first, second), made_by(Embedding("a", vectors(2)))]
    assert all(one != other for number, one in enumerate(made) for other in made[:number])
    assert made_by(second, first) == made_by(first, second) and "embeddings" not in made[0]


# ---- how names are found -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "text", "found"),
    [
        (
            ["cat"],
            "Cat, cats, a bobcat, cat_dog, cat2",
            [0, None, None, 0, 0],
        ),  # as WebUI's: letters alone go on a word
        (["my", "my style"], "my  style, my hat", [1, 0]),
        (["<toy>"], "<toy>, <TOY><toy>! toy", [0, 0, 0, None]),
        (["v1", "v10"], "v10 v1", [1, 0]),
        (["Käthe"], "ka\u0308the ka\u0308thes", [0, None]),  # letters as a Mac's file names have them
        (["a.b*"], "a.b* aXb* a.bb", [0, None, None]),
    ],
)
def test_names_are_found_whole_in_any_case_and_the_longest_first(
    names: list[str], text: str, found: list[int | None]
) -> None:
    embeddings = Embeddings([Embedding(name, vectors(1)) for name in names])
    order = [one.name for one in embeddings]
    own = [number - tokenizer.NUM_TOKENS for number in ids(embeddings, text) if number >= tokenizer.NUM_TOKENS]
    assert [names.index(order[number]) for number in own] == [number for number in found if number is not None]
    assert embeddings.used_in(text) == {names[number] for number in found if number is not None}


PIECES = st.tuples(
    st.sampled_from(["cat", "Cat", "cats", "dog", "my", "style"]),
    st.sampled_from([" ", "  ", "-", "_", ", ", "1", "2 "]),
)


@settings(max_examples=300)
@given(
    st.sets(st.sampled_from(["cat", "my-style", "my style", "style_2", "dog1", "cat-dog", "1cat"]), max_size=4),
    st.lists(PIECES, max_size=6).map(lambda pieces: "".join(word + sign for word, sign in pieces)),
)
def test_names_are_found_where_webui_finds_them(names: set[str], text: str) -> None:
    """WebUI compares the tokens of names and captions; signs do not touch here, since several become one token."""
    embeddings = Embeddings([Embedding(name, vectors(number)) for number, name in enumerate(sorted(names), start=1)])
    (tokens,), found, at = words(text), list[str](), 0
    spelled = sorted(((words(name)[0], name) for name in names), key=lambda pair: -len(pair[0]))
    own = {tuple(range(*_span(embeddings, name))): name for name in names}
    while at < len(tokens):
        match = next((pair for pair in spelled if tokens[at : at + len(pair[0])] == pair[0]), None)
        found.append(str(tokens[at]) if match is None else match[1])
        at += 1 if match is None else len(match[0])
    ours = [own.get(tuple(number for number, _ in word)) or [str(number) for number, _ in word] for word in
            embeddings.words([(text, 1.0)])]  # fmt: skip
    assert [one for word in ours for one in ([word] if isinstance(word, str) else word)] == found


def _span(embeddings: Embeddings, name: str) -> tuple[int, int]:
    first = tokenizer.NUM_TOKENS
    for one in embeddings:
        if one.name == name:
            return first, first + len(one.vectors)
        first += len(one.vectors)
    raise AssertionError(name)


@settings(max_examples=100)
@given(st.text())
def test_without_embeddings_a_text_is_the_tokenizers(text: str) -> None:
    assert Embeddings().words([(text, 1.0)]) == tokenizer.words([(text, 1.0)])
    other = Embeddings([Embedding("<nowhere>", vectors(1))])
    assert ids(other, text) == ids(Embeddings(), text) or "<" in text


# ---- places --------------------------------------------------------------------------------------------------------


def test_each_vector_takes_a_place_and_weights_are_those_of_the_name() -> None:
    embeddings = Embeddings([Embedding("x", vectors(3))])
    assert embeddings.words([("an x ", 1.0), ("x", 1.2)]) == [
        [(550, 1.0)], [(49408, 1.0), (49409, 1.0), (49410, 1.0)], [(49408, 1.2), (49409, 1.2), (49410, 1.2)],
    ]  # fmt: skip


def test_captions_that_lose_words_are_told_with_the_places_of_embeddings(files: dict[str, Path]) -> None:
    texts = ["cat " * 75, "cat " * 72 + "xyz", "cat " * 73 + "xyz", "xyz " * 26, "<long> cat", "<long>"]
    embeddings = Embeddings([Embedding("xyz", vectors(3)), Embedding("<long>", vectors(75))])
    with open_checkpoint(files["sd1"]) as checkpoint:

        def cut(length: int, *, is_weighted: bool) -> set[int]:
            found = model_families.cut_captions(
                checkpoint, texts, max_token_length=length, weighted_captions=is_weighted, embeddings=embeddings
            )
            return {number for number, text in enumerate(texts) if text in found}

        assert cut(75, is_weighted=False) == cut(75, is_weighted=True) == {2, 3, 4}
        assert cut(150, is_weighted=False) == set()
    assert load(files["sd1"], *embeddings).count_tokens(texts) == [75, 75, 76, 78, 76, 75]
