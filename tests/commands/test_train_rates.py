"""Learning rates of `lorasmith train` through the front door: schedules, and what each part's rate does."""

from collections.abc import Iterator

import pytest

from lorasmith.cli import main
from lorasmith.report import ReportContents
from lorasmith.training_run import session
from tests.commands.test_train_options import Place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SOURCE_DATE_EPOCH", "1700000000")
        patched.setattr(session, "write_report", lambda folder, contents: folder)  # half of a run's time
        yield Place(tmp_path_factory.mktemp("place"))


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        (["--lr-schedule", "linear", "--lr-min-ratio", 0.5], [1, 0.875, 0.75, 0.625]),
        (["--lr-schedule", "linear", "--lr-warmup-steps", 2], [0, 0.5, 1, 0.5]),
        (["--lr-schedule", "cosine"], [1, 0.853553, 0.5, 0.146447]),
        (["--lr-schedule", "cosine_restarts"], [1, 0.5, 1, 0.5]),
        (["--lr-schedule", "cosine_restarts", "--lr-cycles", 4], [1, 1, 1, 1]),
        (["--lr-schedule", "polynomial"], [1, 0.5625, 0.25, 0.0625]),
        (["--lr-schedule", "polynomial", "--lr-power", 1], [1, 0.75, 0.5, 0.25]),
        (["--lr-schedule", "inverse_sqrt", "--lr-timescale", 1], [1, 0.707107, 0.577350, 0.5]),
        (["--lr-schedule", "inverse_sqrt", "--lr-warmup-steps", 1], [0, 1, 0.707107, 0.577350]),
        (["--lr-schedule", "warmup_stable_decay", "--lr-decay-steps", 2], [1, 1, 1, 0.5]),
        (["--lr-schedule", "warmup_stable_decay", "--lr-decay-steps", 0.5], [1, 1, 1, 0.5]),
        (["--lr-schedule", "piecewise", "--lr-table", "1:0.25,0.5:0.75,0.1"], [1, 0.5, 0.5, 0.1]),
        (["--lr-warmup-steps", 0.5], [0, 0.5, 1, 1]),
    ],
)
def test_the_learning_rate_follows_its_schedule(place: Place, options: list[object], shares: list[float]) -> None:
    result = place.train("--steps", 4, "--train", "text_encoder", *options)
    assert result.logged("lr") == pytest.approx([0.001 * share for share in shares], rel=1e-5)


def test_the_plan_draws_the_schedule(place: Place) -> None:
    drawn = place.train("--dry-run", "--steps", 200, "--lr-schedule", "cosine", "--lr-warmup-steps", 0.1).printed
    assert "cosine after 20 steps of warm-up" in drawn
    chart = [line for line in drawn.splitlines() if " |" in line]
    assert len(chart) == 5 and sum(line.count("*") for line in chart) == 60
    assert not [line for line in place.train("--dry-run").printed.splitlines() if " |" in line]


def test_the_report_draws_the_rate_of_all_that_learns(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[ReportContents] = []
    monkeypatch.setattr(session, "write_report", lambda folder, contents: given.append(contents) or folder)
    blocks = ["--block-lr", *[1] * 12, 0.5, *[1] * 12]
    options = ["--steps", 3, "--lr-schedule", "linear", "--text-encoder-lr", 0.002, "--unet-lora-plus-ratio", 4]
    result = place.train(*options, *blocks)
    shares = [1, 2 / 3, 1 / 3]
    expected = {
        "text encoder, U-Net (half that begins at zero): 0.002": 0.002, "U-Net: 0.001": 0.001, "U-Net: 0.0005": 0.0005,
        "U-Net (half that begins at zero): 0.004": 0.004,
    }  # fmt: skip
    (contents,) = given
    assert {name: dict(rates) for name, rates in contents.rates.items()} == {
        name: pytest.approx({step: rate * share for step, share in enumerate(shares, 1)})
        for name, rate in expected.items()
    }
    assert result.logged("lr") == pytest.approx([0.004 * share for share in shares])
    assert "1 of the U-Net's 25 blocks at 0.5 times its rate" in result.plan
    place.train("--train", "text_encoder", "--optimizer", "adafactor", "--optimizer-args", "relative_step=True")
    assert given[1].rates == {} and "of the U-Net's 25" not in place.train("--dry-run").plan


def test_the_plan_tells_of_an_average(place: Place) -> None:
    plan = place.train("--dry-run", "--ema-decay", 0.99).plan
    assert "average saved, drawn and validated is the moving average of the LoRA over some 100 steps" in plan
    assert "moving average" not in place.train("--dry-run").plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr-cycles", "3"], "lr_cycles shapes lr_schedule = cosine_restarts, but it is constant; change that"),
        (["--lr-schedule", "linear", "--lr-power", "3"], "lr_power shapes lr_schedule = polynomial, but it is linear"),
        (["--lr-min-ratio", "0.1"], "lr_min_ratio shapes lr_schedule = linear or cosine or"),
        (["--lr-schedule", "piecewise"], "lr_schedule = piecewise needs lr_table, its multipliers, such as"),
        (["--lr-schedule", "piecewise", "--lr-table", "1;2"], "'1;2' is no table of learning rates; give multipliers"),
        (["--lr-warmup-steps", "1.5"], "1.5 is neither a whole number of steps nor, below 1, a share of the run"),
        (["--lr-schedule", "sine"], "--lr-schedule sine"),
        (
            ["--lr-schedule", "warmup_stable_decay", "--lr-warmup-steps", "0.5", "--lr-decay-steps", "0.6"],
            "are more together than the run's 20 steps",
        ),
    ],
)
def test_mistakes(place: Place, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    words = ["train", "--base", str(place.base), "--images", str(place.pictures.parent), "--output", "nowhere"]
    assert main([*words, "--dry-run", "--steps", "20", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
