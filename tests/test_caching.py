"""What is encoded once: every part of what an entry is made from gives it another name, and nothing else does."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lorasmith.cache_folder import Part, Store
from lorasmith.caching import Wanted, cached_encoder, lasting_captions, weights_hash
from lorasmith.data.buckets import CropPlan
from lorasmith.data.captions import CaptionOptions
from lorasmith.data.records import ImageRecord
from lorasmith.data.subsets import Augmentation, Subset
from lorasmith.processes import Processes

RECORD = ImageRecord(Path("a.png"), "a cat", (80, 64), content_hash="12ab")
CROP = CropPlan((80, 64), (8, 0, 72, 64), 0.2)
WANTED = Wanted(RECORD, CROP, Subset())


@pytest.mark.parametrize(
    "other",
    [
        replace(WANTED, record=replace(RECORD, content_hash="12ac")),
        replace(WANTED, crop=replace(CROP, resize=(81, 64))),
        replace(WANTED, crop=replace(CROP, crop=(9, 0, 73, 64))),
        replace(WANTED, subset=Subset(alpha_color="black")),
        replace(WANTED, is_mirrored=True),
    ],
)
def test_each_part_of_what_latents_are_made_from_gives_another_name(other: Wanted) -> None:
    assert other.name != WANTED.name


def test_nothing_else_gives_another_name() -> None:
    record = replace(
        RECORD, path=Path("elsewhere/b.jpg"), caption="a dog", repeats=7, is_prior=True, group="g", dataset=1, subset=3
    )
    subset = Subset(place="x", repeats=5, caption="y", captions=CaptionOptions(shuffle=True))
    other = Wanted(record, replace(CROP, lost_area=0.3), replace(subset, augmentation=Augmentation(flip=True)))
    assert other.name == WANTED.name


def test_weights_are_told_apart_by_name_type_shape_and_value() -> None:
    def module(**tensors: torch.Tensor) -> nn.Module:
        made = nn.Module()
        for name, tensor in tensors.items():
            made.register_buffer(name, tensor)
        return made

    value = torch.tensor([1.0, 2.0, 3.0, 4.0])
    others = [
        module(b=value), module(a=value.half()), module(a=value.reshape(2, 2)), module(a=value + 1e-7), module(),
        module(a=value, b=value), module(a=value.view(torch.int32)),
    ]  # fmt: skip
    hashes = {weights_hash(one) for one in [module(a=value), *others]}
    assert len(hashes) == len(others) + 1
    assert weights_hash(module(a=torch.stack([value, value], dim=1)[:, 0])) == weights_hash(module(a=value))


def test_only_captions_that_come_again_are_kept() -> None:
    varied = [CaptionOptions(shuffle=True), CaptionOptions(tag_dropout=0.1), CaptionOptions(wildcards=True)]
    steady = [CaptionOptions(prefix="my"), CaptionOptions(dropout=0.2), CaptionOptions(dropout_every_epochs=2)]
    for options in [*varied, CaptionOptions(token_warmup_steps=9)]:
        assert lasting_captions([RECORD], [Subset(captions=options)]) == set()
    found = [lasting_captions([RECORD, RECORD], [Subset(captions=options)]) for options in steady]
    assert found == [{"my a cat"}, {"a cat", ""}, {"a cat", ""}]


class Encoder:
    """Encodes a caption as its length, and tells what it was asked for."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls: list[str] = []

    def encode_text(self, captions: list[str]) -> dict[str, torch.Tensor]:
        self.calls.extend(captions)
        return {"text": torch.ones(1, 77, 1) * len(captions[0])}


def test_frozen_text_is_encoded_once_but_not_kept_without_end(tmp_path: Path) -> None:
    encoder: Any = Encoder()
    store = Store(tmp_path, Part("text", "0" * 64, ""), print)
    encode = cached_encoder(encoder, store, {"a", "bb"}, Processes("cpu"))
    assert encode(["a", "bb", "a"])["text"][:, 0, 0].tolist() == [1, 2, 1] and encoder.calls == ["a", "bb"]
    for number in range(2000):
        encode([str(number)])
    encode(["1999", "0"])
    assert encoder.calls[-1] == "0" and encoder.calls.count("0") == 2 and encoder.calls.count("1999") == 1
    store.flush()
    encoder.calls.clear()
    encode = cached_encoder(
        encoder, Store(tmp_path, Part("text", "0" * 64, ""), print), {"a", "bb", "c"}, Processes("cpu")
    )
    assert encode(["bb", "c", "a"])["text"][:, 0, 0].tolist() == [2, 1, 1] and encoder.calls == ["c"]


def test_who_shares_the_encoder_runs_it_as_often_as_who_needs_it_most(tmp_path: Path) -> None:
    encoder: Any = Encoder()
    store = Store(tmp_path, Part("text", "0" * 64, ""), print)
    others: Any = SimpleNamespace(most=lambda number: max(number, 2))
    encode = cached_encoder(encoder, store, {"a", "bb"}, others)
    assert encode(["a", "a"])["text"][:, 0, 0].tolist() == [1, 1]
    assert encode(["a"])["text"][:, 0, 0].tolist() == [1]
    assert encoder.calls == ["a", "", "", ""]
