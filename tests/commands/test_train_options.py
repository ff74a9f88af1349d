"""Every option of `lorasmith train` does what it says, through the front door, on miniature models.

What an option does is read off the weights that are saved, the log, the metadata or the pictures drawn, and compared
with a run that ought to give the same, or ought not to.
"""

import base64
import contextlib
import io
import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasmith import config
from lorasmith.cli import main
from lorasmith.config import TrainConfig
from lorasmith.models.keys import sd as keys
from lorasmith.training_run import session
from tests.tiny import write_tiny

COMMON = [
    "--resolution", "64", "--no-before-after", "--no-tensorboard", "--no-progress", "--workers", "0",
    "--state-every-steps", "0", "--save-precision", "float",
]  # fmt: skip
SGD = ["--optimizer", "torch.optim.SGD", "--weight-decay", "0", "--learning-rate", "0.01"]  # steps without a memory
TEXT = ["--train", "text_encoder"]  # half the time of a run with both parts
TAGS = [f"{color}, sks, thing, round, small, shiny, new" for color in ("red", "blue", "green")]


@dataclass(frozen=True)
class Result:
    """What a run left behind."""

    folder: Path
    printed: str

    @property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "last.safetensors")

    @property
    def metadata(self) -> dict[str, str]:
        with safe_open(self.folder / "last.safetensors", "pt") as file:
            return file.metadata()

    def logged(self, name: str) -> list[float]:
        return [json.loads(line)[name] for line in (self.folder / "logs" / "loss.jsonl").read_text().splitlines()]

    @property
    def plan(self) -> str:
        return " ".join(self.printed.split())


class Place:
    """Models and pictures, and runs on them; equal runs are made once."""

    def __init__(self, path: Path) -> None:
        self.path, self._results = path, dict[tuple[str, ...], Result]()
        self.base = write_tiny(path / "sd1.safetensors", width=8)
        self.pictures = write_pictures(path / "pictures" / "2_sks thing", dict(enumerate(TAGS)))

    def train(self, *options: object, base: Path | None = None, images: Path | None = None) -> Result:
        """Run two steps (unless the options say otherwise) with one picture each."""
        words = ["--base", base or self.base, "--images", images or self.pictures.parent, *COMMON]
        words += [] if "--weights" in options else ["--rank", 2]
        words += [] if {"--steps", "--epochs"} & set(options) else ["--steps", 2]
        words += [] if "--learning-rate" in options else ["--learning-rate", 0.001]
        arguments = tuple(str(word) for word in (*words, *options))
        if arguments not in self._results:
            folder = self.path / "runs" / str(len(self._results))
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                assert main(["train", *arguments, "--output", str(folder)]) == 0
            self._results[arguments] = Result(folder, printed.getvalue())
        return self._results[arguments]


def write_pictures(folder: Path, captions: Mapping[int, str | None], extension: str = ".txt") -> Path:
    """Write a coloured picture for each number, the same for the same number, with its caption beside it."""
    folder.mkdir(parents=True)
    for number, caption in captions.items():
        pixels = random.Random(number).randbytes(80 * 64 * 3)
        Image.frombytes("RGB", (80, 64), pixels).save(folder / f"{number}.png")
        if caption is not None:
            (folder / f"{number}{extension}").write_text(caption)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SOURCE_DATE_EPOCH", "1700000000")
        patched.setattr(session, "write_report", lambda folder, contents: folder)  # half of a run's time
        yield Place(tmp_path_factory.mktemp("place"))


def same(a: Result, b: Result) -> bool:
    """Whether two runs learned the same to the last bit."""
    first, second = a.tensors, b.tensors
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def distance(a: Result, b: Result) -> float:
    """Return how far apart two runs' learned halves, which begin at zero, are in proportion to them."""
    first, second = learned(a.tensors), learned(b.tensors)
    assert first.keys() == second.keys()
    return float(sum((first[n] - t).square().sum() for n, t in second.items()) ** 0.5 / norm(second))


def learned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.endswith("lora_up.weight")}


def norm(tensors: Mapping[str, Tensor]) -> float:
    return float(sum(tensor.double().square().sum() for tensor in tensors.values()) ** 0.5)


def parts(tensors: Mapping[str, Tensor]) -> set[str]:
    return {name[: name.index("_", len("lora_"))] for name in tensors}


def test_every_option_is_named_in_the_tests_of_the_command() -> None:
    written = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_train*.py"))
    named = set(re.findall(r'"(--[a-z0-9-]+)"', written))
    missing = [
        option.flag
        for option in config.options(TrainConfig)
        if not named & {option.flag, option.flag.replace("--", "--no-", 1)}
    ]
    assert missing == []


# ---- what changes the weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["--seed", 7],
        ["--clip-skip", 2],
        ["--prediction", "v_prediction"],
        ["--rank", 3],
        ["--alpha", 1],
        ["--learning-rate", 0.002],
        ["--weight-decay", 0.9],
        ["--optimizer", "torch.optim.SGD"],
        ["--lr-schedule", "linear"],
        ["--lr-warmup-steps", 1],
        ["--batch-size", 2],
        ["--gradient-accumulation", 2],
        ["--precision", "bf16"],
        ["--resolution", "64,80"],
        ["--shuffle-caption"],
        ["--caption-dropout", 1],
    ],
    ids=lambda options: options[0],
)
def test_an_option_changes_what_is_learned(place: Place, options: list[object]) -> None:
    assert not same(place.train(*TEXT, *options), place.train(*TEXT))


@pytest.mark.parametrize(
    "options",
    [
        ["--device", "cpu"],
        ["--precision", "fp32"],
        ["--adapter", "lorasmith.adapters.lora"],
        ["--optimizer", "adamw"],
        ["--prediction", "epsilon"],
        ["--no-v2"],
        ["--alpha", 2],
        ["--text-encoder-lr", 0.001],
        ["--lr-schedule", "constant"],
        ["--cache-latents"],
        ["--keep-tokens", 1],
        ["--ema"],
        ["--workers", 3],
        ["--gradient-checkpointing"],
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_a_spelled_out_default_and_what_only_costs_time_change_nothing(place: Place, options: list[object]) -> None:
    assert same(place.train(*TEXT, *options), place.train(*TEXT))


# ---- base models ---------------------------------------------------------------------------------------------------


def test_a_diffusers_folder_gives_the_same_lora_as_the_single_file(place: Place) -> None:
    folder = write_tiny(place.path / "folder", width=8, layout="diffusers")
    assert same(place.train(base=folder), place.train())


@pytest.mark.parametrize("suffix", ["ckpt", "pt"])
def test_a_pickled_file_with_a_nested_state_dict_gives_the_same_lora(place: Place, suffix: str) -> None:
    wide = place.path / "wide.safetensors"
    if not wide.exists():
        write_tiny(wide)
    pickled = write_tiny(place.path / f"wide-{suffix}.{suffix}", layout="ckpt")
    assert "state_dict" in torch.load(pickled, weights_only=True)
    assert same(place.train("--steps", 1, base=pickled), place.train("--steps", 1, base=wide))


def rewritten(place: Place, name: str, tensors: Mapping[str, Tensor]) -> Path:
    """Write the base model with other tensors."""
    with safe_open(place.base, "pt") as file:
        save_file(dict(tensors), place.path / name, file.metadata())
    return place.path / name


def test_the_text_encoders_old_names_give_the_same_lora(place: Place) -> None:
    old = {name.replace(".text_model.", "."): tensor for name, tensor in load_file(place.base).items()}
    assert old.keys() != load_file(place.base).keys()
    assert same(place.train(base=rewritten(place, "old.safetensors", old)), place.train())


def test_ema_trains_on_the_moving_average(place: Place) -> None:
    tensors = load_file(place.base)
    unet = [name for name in tensors if name.startswith("model.diffusion_model.")]
    averages = {name: tensors[name] * 0.9 for name in unet}
    both = rewritten(place, "both.safetensors", tensors | {keys.ema_name(name): averages[name] for name in unet})
    plain = rewritten(place, "average.safetensors", tensors | averages)
    assert same(place.train("--ema", base=both), place.train(base=plain))
    assert same(place.train(base=both), place.train())


def test_a_separate_vae_is_used(place: Place) -> None:
    tensors = load_file(place.base)
    vae = {name: tensor for name, tensor in tensors.items() if name.startswith("first_stage_model.")}
    without = rewritten(place, "without.safetensors", {name: t for name, t in tensors.items() if name not in vae})
    alone = rewritten(place, "vae.safetensors", {name.partition(".")[2]: tensor for name, tensor in vae.items()})
    other = write_tiny(place.path / "other.safetensors", width=8, seed=5)
    result = place.train("--vae", alone, base=without)
    assert same(result, place.train()) and result.metadata["ss_vae_name"] == "vae.safetensors"
    assert not same(place.train("--vae", other), place.train())


def test_sd2_is_trained_in_both_kinds(place: Place) -> None:
    base = write_tiny(place.path / "sd2.safetensors", "sd2", width=8)
    epsilon = place.train("--prediction", "epsilon", "--steps", 1, base=base)
    v = place.train("--v2", "--prediction", "v_prediction", "--steps", 1, base=base)
    for result, version, spec in [(epsilon, "sd_v2", "epsilon"), (v, "sd_v2_v", "v")]:
        assert len(learned(result.tensors)) == 330 and "330 modules" in result.plan
        assert result.metadata["ss_v2"] == "True" and result.metadata["ss_base_model_version"] == version
        assert result.metadata["modelspec.prediction_type"] == spec
        still = {name for name, tensor in learned(result.tensors).items() if not tensor.any()}
        # the middle block sees a single latent here, which has nobody but itself to attend to
        assert all(re.search(r"mid_block_.*attn1_to_[qk]", name) for name in still)
    assert not same(epsilon, v)
    said = write_tiny(place.path / "said.safetensors", "sd2", width=8, prediction="v_prediction")
    assert same(place.train("--steps", 1, base=said), v)


# ---- the network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "count", "prefix"), [("unet", 192, "lora_unet"), ("text_encoder", 72, "lora_te")])
def test_one_part_alone(place: Place, part: str, count: int, prefix: str) -> None:
    result = place.train("--train", part)
    assert len(learned(result.tensors)) == count and parts(result.tensors) == {prefix}
    assert f"{count} modules" in result.plan


def test_without_alpha_the_scale_is_1_and_it_is_printed(place: Place) -> None:
    assert "rank 2, alpha 2, effective scale 1:" in place.train().plan
    assert "rank 2, alpha 1, effective scale 0.5:" in place.train("--alpha", 1).plan
    for result, alpha in [(place.train(), 2), (place.train("--alpha", 1), 1), (place.train("--rank", 3), 3)]:
        alphas = [float(tensor) for name, tensor in result.tensors.items() if name.endswith(".alpha")]
        assert alphas == [alpha] * 264 and result.metadata["ss_network_alpha"] == str(float(alpha))


@pytest.mark.parametrize(
    ("option", "quick", "slow"), [("--unet-lr", "unet", "te"), ("--text-encoder-lr", "te", "unet")]
)
def test_a_part_has_its_own_learning_rate(place: Place, option: str, quick: str, slow: str) -> None:
    """One step of plain descent is the rate times the gradient."""
    alike = place.train(*SGD, "--steps", 1, "--max-grad-norm", 0).tensors
    own = place.train(*SGD, "--steps", 1, "--max-grad-norm", 0, option, 0.03).tensors
    for name, tensor in learned(own).items():
        times = {quick: 3, slow: 1}[name.split("_")[1]]
        torch.testing.assert_close(tensor, alike[name] * times)


def test_starting_weights_are_gone_on_from(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain descent on one picture whose noise is the same at every step: two steps are one and then another."""
    from lorasmith.data import dataset

    derive = dataset.derive
    monkeypatch.setattr(dataset, "derive", lambda seed, purpose, step, index: derive(seed, purpose, 0, index))
    folder = write_pictures(place.path / "single" / "1_sks thing", {0: None})
    options = [*SGD, "--max-grad-norm", 0]
    two = place.train(*options, "--steps", 2, images=folder)
    one = place.train(*options, "--steps", 1, images=folder)
    more = place.train(*options, "--steps", 1, "--weights", one.folder / "last.safetensors", images=folder)
    assert same(more, two) and not same(more, one)
    assert "starting from" in more.plan and "which fits" in more.plan
    kept = place.train("--learning-rate", 1e-30, "--weights", one.folder / "last.safetensors", images=folder)
    assert same(kept, one)


# ---- pictures and captions -----------------------------------------------------------------------------------------


def test_captions_come_from_files_a_json_an_option_or_the_folders_name(place: Place) -> None:
    plain = write_pictures(place.path / "plain", {0: None, 1: None})
    named = write_pictures(place.path / "named" / "2_sks thing", {0: None, 1: None})
    given = place.train("--caption", "sks thing", "--repeats", 2, images=plain)
    assert same(given, place.train(images=named.parent))
    assert "= 0.5 epochs of 4 samples" in given.plan

    tags = {0: "a red thing", 1: "a blue thing"}
    beside = place.train(images=write_pictures(place.path / "beside", tags))
    other = write_pictures(place.path / "other", tags, ".tags")
    (other / "0.txt").write_text("something else")
    (other / "1.txt").write_text("something else")
    assert same(place.train("--caption-extension", ".tags", images=other), beside)
    assert not same(place.train(images=other), beside)
    (place.path / "meta.json").write_text(json.dumps({str(n): {"caption": text} for n, text in tags.items()}))
    assert same(place.train("--captions", place.path / "meta.json", images=plain), beside)


def test_kept_tokens_are_not_shuffled(place: Place) -> None:
    assert same(place.train("--shuffle-caption", "--keep-tokens", 7), place.train())
    half = place.train("--shuffle-caption", "--keep-tokens", 2)
    assert not same(half, place.train()) and not same(half, place.train("--shuffle-caption"))


def test_a_dropped_caption_has_no_influence(place: Place) -> None:
    others = write_pictures(place.path / "others" / "2_sks thing", dict.fromkeys(range(3), "something else"))
    assert not same(place.train(images=others.parent), place.train())
    assert same(place.train("--caption-dropout", 1, images=others.parent), place.train("--caption-dropout", 1))


@pytest.mark.parametrize("option", ["--flip", "--color", "--random-crop"])
def test_an_augmentation_changes_the_pictures(place: Place, option: str) -> None:
    whole_epoch = ["--batch-size", 3, "--train", "unet"]
    plain = place.train(*whole_epoch, "--no-cache-latents")
    assert distance(plain, place.train(*whole_epoch)) < 1e-3
    augmented = place.train(*whole_epoch, option)
    assert distance(augmented, plain) > 1e-2
    assert ("mirrored ones too, for flip" if option == "--flip" else "encoded anew for every step") in augmented.plan
    assert "latents cached cache" in place.train().plan and "mirrored" not in place.train().plan


def test_cached_mirror_images_teach_what_mirrored_pictures_do(place: Place) -> None:
    whole_epoch = ["--batch-size", 3, "--train", "unet", "--flip"]
    assert distance(place.train(*whole_epoch), place.train(*whole_epoch, "--no-cache-latents")) < 1e-3


def test_folders_in_folders_are_used_when_asked_for(place: Place) -> None:
    top = write_pictures(place.path / "nested", {0: "sks thing, red"})
    write_pictures(top / "more", {3: "sks thing, blue"})
    write_pictures(top / "more" / "2_sks other", {1: None, 2: None})
    assert place.train("--dry-run", images=top).plan.count("not used; --recursive would use them") == 1
    plan = place.train("--dry-run", "--recursive", images=top).plan
    assert "epochs of 6 samples" in plan and '"sks other" (2 pictures)' in plan


def test_regularization_counts_as_much_as_its_weight(place: Place) -> None:
    """The loss of a step that holds the whole epoch is (own + weight * prior) / count."""
    own = write_pictures(place.path / "own" / "1_sks thing", {0: None, 1: None}).parent
    prior = write_pictures(place.path / "prior" / "1_thing", {7: None}).parent
    whole_epoch = ["--batch-size", 4, "--steps", 1, "--regularization", prior]
    results = {weight: place.train(*whole_epoch, "--prior-loss-weight", weight, images=own) for weight in (0, 0.5, 1)}
    losses = {weight: result.logged("loss")[0] for weight, result in results.items()}
    assert losses[0.5] == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-5)
    assert losses[1] > losses[0] > 0 and not same(results[0], results[1])
    assert same(place.train(*whole_epoch, images=own), results[1])
    assert results[1].metadata["ss_num_reg_images"] == "2" == results[1].metadata["ss_num_train_images"]


def test_buckets_keep_the_shapes_and_obey_their_limits(place: Place) -> None:
    folder = write_pictures(place.path / "shapes" / "1_sks thing", {0: None})
    for number, size in enumerate([(64, 128), (128, 64), (200, 50)], start=1):
        Image.effect_noise(size, 40).save(folder / f"{number}.png")

    def shapes(*options: object) -> set[tuple[int, int]]:
        result = place.train("--steps", 1, *options, images=folder.parent)
        buckets = json.loads(result.metadata["ss_bucket_info"])["buckets"].values()
        assert sum(bucket["count"] for bucket in buckets) == 4
        return {tuple(bucket["resolution"]) for bucket in buckets}

    wide = shapes("--buckets", "--bucket-min", 16, "--bucket-max", 128, "--bucket-step", 8)
    assert len(wide) == 4 and max(map(max, wide)) > 96 and min(map(min, wide)) < 48
    assert {side % 16 for shape in shapes("--buckets", "--bucket-min", 16, "--bucket-step", 16) for side in shape} == {
        0
    }
    narrow = shapes("--buckets", "--bucket-min", 48, "--bucket-max", 96, "--bucket-step", 8)
    assert max(map(max, narrow)) <= 96 and min(map(min, narrow)) >= 48
    assert place.train().metadata["ss_enable_bucket"] == "False"


# ---- the optimizer and its steps -----------------------------------------------------------------------------------


def test_a_step_is_no_longer_than_the_clipped_gradient(place: Place) -> None:
    free = norm(learned(place.train(*SGD, "--steps", 1, "--max-grad-norm", 0).tensors))
    limit = free / 0.01 / 2
    clipped = norm(learned(place.train(*SGD, "--steps", 1, "--max-grad-norm", limit).tensors))
    assert clipped == pytest.approx(free / 2, rel=1e-4)


def test_weight_decay_shrinks_what_has_no_gradient_yet(place: Place) -> None:
    """At the first step the half that begins at zero stops the other's gradient, so that one only decays."""
    none, some = (place.train("--steps", 1, "--weight-decay", value).tensors for value in (0, 0.5))
    for name, tensor in none.items():
        if name.endswith("lora_down.weight"):
            torch.testing.assert_close(some[name], tensor * (1 - 0.001 * 0.5))


def test_accumulating_two_batches_is_one_of_both(place: Place) -> None:
    folder = write_pictures(place.path / "twice" / "2_sks thing", {0: None}).parent
    options = [*SGD, "--max-grad-norm", 0]
    accumulated = place.train(*options, "--gradient-accumulation", 2, images=folder)
    at_once = place.train(*options, "--batch-size", 2, images=folder)
    assert distance(accumulated, at_once) < 1e-4
    assert accumulated.logged("loss") == pytest.approx(at_once.logged("loss"), rel=1e-5)
    assert "effective batch 2 = 1 on each of 1 process x 2 accumulated" in accumulated.plan


def test_checkpointing_computes_the_activations_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.resnet import ResnetBlock2D
    from transformers.models.clip.modeling_clip import CLIPMLP

    calls = dict.fromkeys([ResnetBlock2D, CLIPMLP], 0)
    for kind in calls:
        monkeypatch.setattr(kind, "forward", counted(kind, calls))
    place.train("--steps", 1, "--seed", 3, "--no-disk-cache")
    plain = dict(calls)
    result = place.train("--steps", 1, "--seed", 3, "--no-disk-cache", "--gradient-checkpointing")
    assert all(calls[kind] > 2 * plain[kind] for kind in calls)
    assert result.metadata["ss_gradient_checkpointing"] == "True"
    assert same(result, place.train("--steps", 1, "--seed", 3, "--no-disk-cache"))


def counted(kind: Any, calls: dict[Any, int]) -> Any:
    forward = kind.forward

    def count(self: Any, *arguments: Any, **named: Any) -> Any:
        calls[kind] += 1
        return forward(self, *arguments, **named)

    return count


def test_plain_attention_gives_what_the_fused_one_gives(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    calls, attend = [], AttnProcessor.__call__
    monkeypatch.setattr(AttnProcessor, "__call__", lambda *args, **named: (calls.append(1), attend(*args, **named))[1])
    fused = place.train(*SGD, "--attention", "sdpa")
    assert not calls
    assert distance(place.train(*SGD, "--attention", "plain"), fused) < 1e-3 and calls


def test_bf16_is_near_fp32(place: Place) -> None:
    half, full = place.train(*SGD, "--precision", "bf16"), place.train(*SGD, "--precision", "fp32")
    assert half.metadata["ss_mixed_precision"] == "bf16" and full.metadata["ss_mixed_precision"] == "no"
    assert half.logged("loss") == pytest.approx(full.logged("loss"), rel=0.05)
    assert 0 < distance(half, full) < 0.3
    assert all(tensor.dtype == torch.float32 for tensor in half.tensors.values())


def test_an_epoch_is_every_picture_as_often_as_it_counts(place: Place) -> None:
    only = ["--train", "text_encoder"]
    epoch = place.train(*only, "--epochs", 1)
    assert same(epoch, place.train(*only, "--steps", 6)) and epoch.metadata["ss_steps"] == "6"
    assert epoch.metadata["ss_num_epochs"] == "1" and "6 steps = 1 epochs of 6 samples" in epoch.plan


# ---- what is saved -------------------------------------------------------------------------------------------------


def names(result: Result) -> set[str]:
    return {path.name for path in result.folder.iterdir() if path.is_file()} - {"run.toml"}


def test_files_are_called_as_in_the_document_unless_they_have_a_name(place: Place) -> None:
    options = ["--batch-size", 3, "--train", "text_encoder", "--epochs", 2]  # two steps each
    options += ["--save-every-epochs", 1, "--save-every-steps", 3]
    often = place.train(*options)
    assert names(often) == {"last.safetensors", "epoch-000001.safetensors", "step-00000003.safetensors"}
    named = place.train(*options, "--name", "robot")
    assert names(named) == {"robot.safetensors", "robot-000001.safetensors", "robot-step00000003.safetensors"}


@pytest.mark.parametrize("suffix", ["pt", "ckpt"])
def test_other_formats_hold_the_same_tensors(place: Place, suffix: str) -> None:
    saved = place.train("--format", suffix)
    assert names(saved) == {f"last.{suffix}"}
    tensors, expected = torch.load(saved.folder / f"last.{suffix}", weights_only=True), place.train().tensors
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_the_saved_precision_is_that_asked_for(place: Place, precision: str, dtype: torch.dtype) -> None:
    saved, exact = place.train("--save-precision", precision).tensors, place.train().tensors
    assert all(torch.equal(tensor, exact[name].to(dtype)) for name, tensor in saved.items())


def test_the_default_precision_of_a_saved_lora_is_fp16() -> None:
    assert TrainConfig().save.save_precision == "fp16"


def test_states_are_saved_when_due_and_the_newest_are_kept(place: Place) -> None:
    options = ["--steps", 4, "--train", "text_encoder"]
    every = place.train(*options, "--state-every-steps", 1, "--keep-states", 2)
    assert [path.name for path in sorted((every.folder / "states").iterdir())] == ["step-00000003", "step-00000004"]
    none = place.train(*options)
    assert [path.name for path in (none.folder / "states").iterdir()] == ["step-00000004"]


def test_only_the_newest_saves_are_kept_where_asked(place: Place) -> None:
    options = ["--train", "text_encoder", "--steps", 6]  # an epoch
    epochs = place.train("--train", "text_encoder", "--batch-size", 3, "--epochs", 4, "--save-every-epochs", 1,
                         "--keep-last-epochs", 2)  # fmt: skip
    assert names(epochs) == {"last.safetensors", "epoch-000002.safetensors", "epoch-000003.safetensors"}
    steps = place.train(*options, "--save-every-steps", 1, "--keep-last-steps", 2)
    assert names(steps) == {"last.safetensors", *(f"step-{step:08d}.safetensors" for step in (3, 4, 5))}


def test_saves_are_spread_over_the_run(place: Place) -> None:
    saved = place.train("--train", "text_encoder", "--batch-size", 3, "--epochs", 5, "--saves", 2)
    assert names(saved) == {"last.safetensors", "epoch-000002.safetensors", "epoch-000004.safetensors"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--keep-last-epochs", "1"], "keep_last_epochs is for LoRAs saved after epochs"),
        (["--keep-last-steps", "1"], "keep_last_steps is for LoRAs saved after steps"),
        (["--saves", "1", "--save-every-epochs", "1"], "saves and save_every_epochs both say"),
    ],
)
def test_saves_that_contradict_each_other_are_refused(
    place: Place, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    assert main(["train", "--base", "x", "--images", "x", "--output", "x", *options]) == 2
    assert told in capsys.readouterr().err


def test_a_thumbnail_and_hints_go_into_the_metadata(place: Place, tmp_path: Path) -> None:
    picture = tmp_path / "me.png"
    Image.new("RGB", (600, 300), "red").save(picture)
    metadata = place.train(
        "--thumbnail", picture, "--usage-hint", "say sks", "--merged-from", "a, b", "--preprocessor", "canny"
    ).metadata
    hints = ("usage_hint", "merged_from", "preprocessor")
    assert [metadata[f"modelspec.{name}"] for name in hints] == ["say sks", "a, b", "canny"]
    head, _, data = metadata["modelspec.thumbnail"].partition(",")
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == "data:image/jpeg;base64" and shown.size == (256, 128)
    assert shown.getpixel((128, 64))[0] > 240  # type: ignore[index]


def test_minimal_metadata_says_nothing_of_the_training(place: Place) -> None:
    metadata, full = place.train("--metadata", "minimal").metadata, place.train().metadata
    own = {name for name in metadata if name.startswith("ss_")}
    assert own == {"ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha"}
    assert all(metadata[name] == full[name] for name in own)
    assert metadata["sshs_model_hash"] == full["sshs_model_hash"]


def test_the_file_says_what_it_was_told_of_itself(place: Place) -> None:
    told = {"title": "Robot", "author": "Ada", "description": "A robot.", "license": "CC0", "tags": "robot, toy"}
    options = [word for name, value in told.items() for word in (f"--{name}", value)]
    metadata = place.train(*options, "--trigger-phrase", "sks robot", "--comment", "third try").metadata
    assert {name: metadata[f"modelspec.{name}"] for name in told} == told
    assert metadata["modelspec.trigger_phrase"] == "sks robot" and metadata["ss_training_comment"] == "third try"
    for flag in ("--title", "--author", "--description", "--license", "--tags"):
        assert flag in options


def test_the_file_says_how_it_was_made(place: Place) -> None:
    metadata = place.train().metadata
    told = {
        "ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_steps": "2", "ss_max_train_steps": "2",
        "ss_seed": "42", "ss_learning_rate": "0.001", "ss_resolution": "(64, 64)", "ss_base_model_version": "sd_v1",
        "ss_sd_model_name": "sd1.safetensors", "ss_num_train_images": "6", "ss_cache_latents": "True",
        "ss_batch_size_per_device": "1", "ss_max_grad_norm": "1.0", "ss_v2": "False",
        "modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.title": "last",
    }  # fmt: skip
    assert {name: metadata.get(name) for name in told} == told
    assert len(metadata["sshs_model_hash"]) == 64 and len(metadata["sshs_legacy_hash"]) == 8
    assert json.loads(metadata["ss_dataset_dirs"]) == {"2_sks thing": {"n_repeats": 2, "img_count": 3}}
    assert json.loads(metadata["ss_tag_frequency"])["2_sks thing"]["sks"] == 3


def test_captions_are_kept_to_oneself(place: Place) -> None:
    quiet = place.train("--no-share-captions")
    assert "sks" not in json.dumps(quiet.metadata) and same(quiet, place.train())


# ---- samples -------------------------------------------------------------------------------------------------------

DRAWING = ["--train", "text_encoder", "--steps", 1, "--before-after", "--sample-steps", 1]


def pictures(result: Result, moment: str = "step-00000001") -> list[Image.Image]:
    return [Image.open(path) for path in sorted((result.folder / "samples" / moment).glob("*.png"))]


@pytest.mark.parametrize(
    "options",
    [
        ["--prompts", "a cow"],
        ["--negative", "round"],
        ["--sample-steps", 2],
        ["--guidance", 3],
        ["--sample-seed", 9],
        ["--sample-size", "64,72"],
    ],
    ids=lambda options: options[0],
)
def test_an_option_changes_the_samples_and_not_what_is_learned(place: Place, options: list[object]) -> None:
    usual, other = place.train(*DRAWING, "--prompts", "a cat"), place.train(*DRAWING, "--prompts", "a cat", *options)
    assert [p.tobytes() for p in pictures(other)] != [p.tobytes() for p in pictures(usual)]
    assert same(other, usual)
    assert pictures(other)[0].size == ((64, 72) if "--sample-size" in options else (64, 64))


def test_prompts_come_from_the_option_a_file_or_the_captions(place: Place, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# mine\na cat\n\na dog\n")
    from_file = place.train(*DRAWING, "--prompts", tmp_path / "prompts.txt")
    given = place.train(*DRAWING, "--prompts", "a cat", "a dog")
    assert [p.tobytes() for p in pictures(from_file)] == [p.tobytes() for p in pictures(given)]
    assert len(pictures(place.train(*DRAWING))) == 2 and f'"{TAGS[0]}"' in place.train(*DRAWING).plan


def test_a_prompt_may_have_options_of_its_own(place: Place, tmp_path: Path) -> None:
    """They outweigh the run's; the same ones give the same picture, and the plan shows them."""
    own = "a cat --w 72 --h 64 --d 7 --s 2 --l 3 --n round --ss k_euler_a"
    two = place.train(*DRAWING, "--prompts", own, "a cat")
    assert [picture.size for picture in pictures(two)] == [(72, 64), (64, 64)]
    settings = ["--sample-size", "72,64", "--sample-seed", 7, "--guidance", 3, "--negative", "round",
                "--sampler", "euler_a"]  # fmt: skip
    alone = place.train(*DRAWING, "--sample-steps", 2, "--prompts", "a cat", *settings)
    assert pictures(alone)[0].tobytes() == pictures(two)[0].tobytes()
    plain = place.train(*DRAWING, "--prompts", "a dog", "a cat")
    assert pictures(plain)[1].tobytes() == pictures(two)[1].tobytes()
    assert '"a cat", size 72x64, steps 2, guidance 3, sampler euler_a, negative "round"' in two.plan
    (tmp_path / "prompts.toml").write_text(
        '[prompt]\nwidth = 72\nheight = 64\n[[prompt.subset]]\nprompt = "a cat"\nseed = 7\nsample_steps = 2\n'
        'scale = 3\nnegative_prompt = "round"\nsample_sampler = "euler_a"\n'
    )
    from_file = place.train(*DRAWING, "--prompts", tmp_path / "prompts.toml")
    assert pictures(from_file)[0].tobytes() == pictures(two)[0].tobytes()


def test_samples_can_be_drawn_at_first_and_at_the_end_without_the_report_asking(place: Place) -> None:
    options = ["--train", "text_encoder", "--steps", 2, "--sample-steps", 1, "--prompts", "a cat"]
    drawn = place.train(*options, "--at-first", "--sample-every-steps", 2)
    assert [path.name for path in sorted((drawn.folder / "samples").glob("step-*"))] == [
        "step-00000000", "step-00000002",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--prompts", "a cat --widht 3"], "did you mean --w?"),
        (["--prompts", "a cat --ss eular"], "did you mean euler?"),
        (["--sampler", "eular"], "did you mean euler?"),
    ],
)
def test_wrong_samples_are_told_before_training(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    words = ["train", "--base", str(place.base), "--images", str(place.pictures), "--output", str(tmp_path / "out")]
    assert main([*words, "--dry-run", *options]) == 2
    assert expected in " ".join(capsys.readouterr().err.split())


def test_samples_are_drawn_when_they_are_due(place: Place) -> None:
    options = ["--train", "text_encoder", "--batch-size", 3, "--steps", 5, "--sample-steps", 1, "--prompts", "a cat"]
    drawn = place.train(*options, "--sample-every-steps", 3, "--sample-every-epochs", 1)  # of two steps each
    moments = [path.name for path in sorted((drawn.folder / "samples").glob("step-*"))]
    assert moments == [f"step-{step:08d}" for step in (2, 3, 4)]
    assert (drawn.folder / "samples" / "sheet.png").is_file()
    assert [path.name for path in sorted((place.train(*DRAWING).folder / "samples").glob("step-*"))] == [
        "step-00000000", "step-00000001",
    ]  # fmt: skip
    assert not (place.train().folder / "samples").exists()


# ---- what is shown, and options in a file --------------------------------------------------------------------------


def test_tensorboard_logs_hold_the_loss_and_the_rates(place: Place) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = place.train("--tensorboard", "--unet-lr", 0.002)
    events = EventAccumulator(str(result.folder / "logs" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(result.logged("loss"))
    rates = {name: events.Scalars(f"lr/{name}")[0].value for name in ("unet", "text_encoder")}
    assert rates == pytest.approx({"unet": 0.002, "text_encoder": 0.001})
    assert not (place.train().folder / "logs" / "tensorboard").exists()


def test_progress_is_shown_unless_it_is_not_wanted(place: Place) -> None:
    shown = place.train("--progress")
    for part in ("step 2/2", "  loss ", "steps/s", "left", "ram "):
        assert part in shown.printed
    assert "step 2/2" not in place.train().printed


def test_options_in_a_file_count_and_the_command_line_wins(place: Place) -> None:
    file = place.path / "run.toml"
    file.write_text(
        '[network]\nalpha = 1\n[training]\nseed = 7\n[data]\nshuffle_caption = true\n[save]\nauthor = "Ada"\n'
    )
    result = place.train("--config", file, "--seed", 8)
    assert same(result, place.train("--alpha", 1, "--shuffle-caption", "--seed", 8))
    assert result.metadata["ss_seed"] == "8" and result.metadata["modelspec.author"] == "Ada"
    again = place.train("--config", result.folder / "run.toml")  # what a run writes down is itself such a file
    assert same(again, result)
