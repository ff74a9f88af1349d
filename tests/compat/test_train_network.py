"""train_network.py: all its options, and the document's line for training as it stands there."""

import ast
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from lorasmith import config
from lorasmith.cli import main as lorasmith
from lorasmith.compat import entry
from lorasmith.compat.network_args import block_rates
from lorasmith.compat.table import Flag
from lorasmith.demo import FOLDER
from lorasmith.training_run import session
from tests.compat.running import ROOT, run
from tests.tiny import write_tiny

NAME = "train_network.py"
SCRIPT = entry.SCRIPTS[NAME]
GOLDEN = Path(__file__).parent / "golden"
DOCUMENT = ROOT.parent / "shared" / "spec" / "train_network_README-en.txt"  # where this is developed
LINE = (
    r"accelerate launch --num_cpu_threads_per_process 12 train_network.py "
    r"--pretrained_model_name_or_path=..\models\model.ckpt --train_data_dir=..\data\db\char1 "
    r"--output_dir=..\lora_train1 --reg_data_dir=..\data\db\reg1 --prior_loss_weight=1.0 --resolution=448,640 "
    r"--train_batch_size=1 --learning_rate=1e-4 --max_train_steps=400 --use_8bit_adam --xformers "
    r"--mixed_precision=fp16 --save_every_n_epochs=1 --save_model_as=safetensors --clip_skip=2 --seed=42 --color_aug "
    r"--network_module=networks.lora"
)
WORDS = LINE.partition(f"{NAME} ")[2].split()
BASE = "--network_module=networks.lora"


def translate(*words: str) -> dict[str, Any]:
    return entry.translate(SCRIPT, entry.read(SCRIPT, words))


def mistake(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert entry.main(NAME, words) == 2
    told = capsys.readouterr().err
    assert told.startswith("lorasmith: ") and "Traceback" not in told
    return told


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the document's line names, around the folder where it is typed."""
    folder = tmp_path_factory.mktemp("document")
    for name, count in (("data/db/char1/2_sks girl", 3), ("data/db/reg1/1_girl", 2)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.linear_gradient("L").rotate(30 * number).convert("RGB").resize((480, 660)).save(
                folder / name / f"{number}.png"
            )
    (folder / "models").mkdir()
    write_tiny(folder / "models" / "model.ckpt", layout="ckpt")
    (folder / "sd-scripts").mkdir()
    return folder


@pytest.fixture
def typed_in(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(data / "sd-scripts")
    monkeypatch.setattr(session, "write_report", lambda folder, contents: folder)
    return data


# ---- the document's line --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not DOCUMENT.exists(), reason="the document is not beside the repository")
def test_the_line_is_the_documents() -> None:
    assert LINE in DOCUMENT.read_text(encoding="utf-8")


def test_the_documents_line_in_our_words(typed_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(NAME, [*WORDS, "--debug_dataset"]) == 0
    told = capsys.readouterr().out
    toml = told.partition("in train.toml:\n")[2].partition("# the end of train.toml")[0]
    assert toml == (GOLDEN / "train_network_document.toml").read_text()
    assert "alpha = --network_dim, scale 1, as in the document of 2022" in told
    assert "fp16 needs a GPU" in told or torch.cuda.is_available()


def test_the_documents_line_trains_what_ours_trains(typed_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--max_train_steps=2", "--resolution=64,96"]  # the later one of two counts
    assert run(NAME, *WORDS, *short) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("lorasmith train "))
    words = shlex.split(line)[1:]
    words[words.index("--output") + 1] = "../ours"
    assert lorasmith(words) == 0
    old, new = (load_file(typed_in / name / "last.safetensors") for name in ("lora_train1", "ours"))
    assert len(old) == 264 * 3 and all(torch.equal(new[name], tensor) for name, tensor in old.items())
    assert any(tensor.any() for name, tensor in old.items() if "lora_up" in name)
    with safe_open(typed_in / "ours" / "last.safetensors", "pt") as file:
        assert file.metadata()["ss_clip_skip"] == "2" and file.metadata()["ss_network_alpha"] == "4.0"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the line is given to a shell of Unix")
def test_the_documents_line_runs_as_it_stands_on_the_embedded_model(data: Path) -> None:
    shutil.rmtree(data / "lora_train1", ignore_errors=True)  # another test's
    model = data / "models" / "model.ckpt"
    model.unlink()
    shutil.copyfile(FOLDER / "sd1-mini.safetensors", model)  # what a miniature is like, its header alone can say
    (data / "sd-scripts" / NAME).symlink_to(ROOT / NAME)
    # with fewer steps than its 400, which take a quarter of an hour on two cores
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *LINE.split()[2:], "--max_train_steps=3"]
    done = subprocess.run(launcher, cwd=data / "sd-scripts", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(load_file(data / "lora_train1" / "last.safetensors")) == 264 * 3


# ---- the table ------------------------------------------------------------------------------------------------------


def test_all_of_todays_options_are_in_the_table() -> None:
    names = (GOLDEN / "train_network_options.txt").read_text().split()
    assert len(names) == 193
    assert {flag.key for flag in SCRIPT.flags} | {"config_file"} == set(names)


SAMPLES = {"text": "x", "path": "a/b", "integer": "3", "number": "0.5"}
GIVEN = {  # where a sample of the kind alone would not do
    "--resolution": "64,96", "--face_crop_aug_range": "2,4", "--max_token_length": "150", "--bucket_reso_steps": "32",
    "--min_bucket_reso": "128", "--max_bucket_reso": "512", "--huber_schedule": "constant", "--loss_type": "huber",
    "--clip_skip": "2", "--max_timestep": "500", "--multires_noise_iterations": "6", "--log_with": "wandb",
    "--huggingface_repo_id": "me/mine", "--text_encoder_lr": "1e-5",
}  # fmt: skip
WITH = {"in_json": ["--train_data_dir=a"], "huber_scale": ["--loss_type=huber"]}
FLAGS = {flag.key: flag for flag in SCRIPT.flags}


def words_for(flag: Flag) -> list[str]:
    if flag.kind == "switch":
        return [flag.name]
    return [flag.name, GIVEN.get(flag.name) or (flag.choices[-1] if flag.choices else SAMPLES[flag.kind])]


@pytest.mark.parametrize("flag", [flag for flag in SCRIPT.flags if flag.place], ids=lambda flag: flag.key)
def test_an_option_reaches_its_place_with_a_value_that_is_taken(flag: Flag) -> None:
    others = [*WITH.get(flag.key, []), *(words_for(FLAGS[flag.needs[0]]) if flag.needs else [])]
    values = translate(BASE, *others, *words_for(flag))
    if flag.kind == "switch":
        assert values[flag.place] == flag.value
    else:
        read: Any = {"integer": int, "number": float}.get(flag.kind, str)(words_for(flag)[1])
        read = [read] if flag.many else read
        assert values[flag.place] == (flag.convert(read) if flag.convert else read)
    config.build(config.TrainConfig, entry.nested(values))


@pytest.mark.parametrize(
    "name",
    ["min_snr_gamma", "v_pred_like_loss", "noise_offset", "multires_noise_iterations", "ip_noise_gamma",
     "scale_weight_norms", "network_alpha", "save_n_epoch_ratio", "sample_every_n_steps", "sample_every_n_epochs"],
)  # fmt: skip
def test_a_nought_turns_off_what_it_turns_off_there(name: str) -> None:
    others = [BASE, "--network_dim=4", "--learning_rate=1e-4"]
    values = translate(*others, f"--{name}=0")
    config.build(config.TrainConfig, entry.nested(values))
    assert values == translate(*others)


def test_a_learning_rate_of_nought_is_that_of_parts_without_their_own() -> None:
    both = {"optimizer.learning_rate": None, "optimizer.unet_lr": 1e-4, "optimizer.text_encoder_lr": 0.0}
    found = translate(BASE, "--learning_rate=0", "--unet_lr=1e-4")
    assert {place: found.get(place) for place in both} == both
    config.build(config.TrainConfig, entry.nested(found))
    alone = translate(BASE, "--learning_rate=0", "--unet_lr=1e-4", "--network_train_unet_only")
    config.build(config.TrainConfig, entry.nested(alone))


def test_what_is_refused_may_be_there_without_a_value(tmp_path: Path) -> None:
    """As a user interface writes it down."""
    file = tmp_path / "ui.toml"
    file.write_text(
        'network_module = "networks.lora"\nlr_scheduler_args = []\nnetwork_args = []\noptimizer_args = []\n'
        'wandb_api_key = ""\nloss_type = "l2"\nhuber_c = 0.1\nhuber_schedule = "snr"\nlr_scheduler = "cosine"\n'
        "lr_scheduler_num_cycles = 1\nlr_scheduler_power = 1\nnoise_offset = 0\ntext_encoder_lr = []\n"
        "max_token_length = 75\nmax_timestep = 1000\nprior_loss_weight = 1\nmin_bucket_reso = 256\n"
    )
    config.build(config.TrainConfig, entry.nested(translate("--config_file", str(file))))


@pytest.mark.parametrize("flag", [flag for flag in SCRIPT.flags if flag.needs], ids=lambda flag: flag.key)
def test_an_option_that_does_nothing_alone_is_left_out_with_a_note(flag: Flag) -> None:
    given = entry.read(SCRIPT, [BASE, *words_for(flag)])
    values = entry.translate(SCRIPT, given)
    assert flag.place not in values
    assert f"{flag.name} does nothing without --{flag.needs[0]}" in entry.page(SCRIPT, given, values)


@pytest.mark.parametrize(
    ("words", "places"),
    [
        (["--max_train_epochs=2", "--max_train_steps=5"], {"training.epochs": 2, "training.steps": None}),
        (["--max_train_steps=5"], {"training.steps": 5}),
        (["--mixed_precision=bf16"], {"training.precision": "bf16"}),
        ([], {"training.precision": "fp32", "samples.before_after": False, "network.alpha": None}),
        (["--network_train_unet_only"], {"network.train": "unet"}),
        (["--network_train_text_encoder_only"], {"network.train": "text_encoder"}),
        (["--use_8bit_adam"], {"optimizer.optimizer": "adamw8bit"}),
        (["--use_lion_optimizer"], {"optimizer.optimizer": "lion"}),
        (["--optimizer_type=Prodigy", "--optimizer_args", "d_coef=2"],
         {"optimizer.optimizer": "prodigy", "optimizer.optimizer_args": ["d_coef=2"]}),
        (["--optimizer_type=Adafactor"],
         {"optimizer.optimizer": "adafactor",
          "optimizer.optimizer_args": ["relative_step=True", "scale_parameter=True"]}),
        (["--optimizer_type=AdamWScheduleFree"], {"optimizer.weight_decay": 0.0}),
        (["--optimizer_type=Adafactor", "--optimizer_args", "relative_step=False"],
         {"optimizer.optimizer_args": ["relative_step=False", "scale_parameter=True"]}),
        (["--optimizer_args", "weight_decay=0.1", "betas=.9,.99"],
         {"optimizer.weight_decay": 0.1, "optimizer.optimizer_args": ["betas=.9,.99"]}),
        (["--optimizer_type=AdamW8bit", "--optimizer_args", "weight_decay=1e-3"],
         {"optimizer.weight_decay": 1e-3, "optimizer.optimizer_args": None}),
        (["--use_8bit_adam"], {"optimizer.weight_decay": None}),
        (["--optimizer_type=Prodigy", "--optimizer_args", "decouple=True", "weight_decay=0.01"],
         {"optimizer.weight_decay": 0.01, "optimizer.optimizer_args": ["decouple=True"]}),
        (["--optimizer_type=Lion"], {"optimizer.weight_decay": 0.0}),
        (["--optimizer_type=DAdaptAdam", "--optimizer_args", "weight_decay=0.2"],
         {"optimizer.weight_decay": 0.2, "optimizer.optimizer_args": ["decouple=False"]}),
        (["--optimizer_type=DAdaptAdam", "--optimizer_args", "weight_decay=0.2", "decouple=True"],
         {"optimizer.weight_decay": 0.2, "optimizer.optimizer_args": ["decouple=True"]}),
        (["--optimizer_type=torch.optim.Adagrad", "--optimizer_args", "weight_decay=0"],
         {"optimizer.weight_decay": 0.0}),
        (["--optimizer_type=torch.optim.Adagrad"], {"optimizer.optimizer": "torch.optim.Adagrad"}),
        (["--lr_scheduler=cosine_with_restarts"],
         {"optimizer.lr_schedule": "cosine_restarts", "optimizer.lr_cycles": 1}),
        (["--lr_scheduler=polynomial"], {"optimizer.lr_schedule": "polynomial", "optimizer.lr_power": 1.0}),
        (["--lr_scheduler=warmup_stable_decay", "--lr_decay_steps=0.1"], {"optimizer.lr_decay_steps": 0.1}),
        (["--lr_scheduler=cosine_with_min_lr", "--lr_scheduler_min_lr_ratio=0.1"],
         {"optimizer.lr_schedule": "cosine", "optimizer.lr_min_ratio": 0.1}),
        (["--enable_bucket"], {"data.buckets": True, "data.bucket_rule": "sd-scripts"}),
        (["--caption_extention=.cap"], {"data.caption_extension": ".cap"}),
        (["--caption_extension=.txt", "--in_json=meta.json"], {"data.caption_extension": None}),
        (["--masked_loss", "--conditioning_data_dir=m"], {"data.mask_loss": "all", "data.masks": "m"}),
        (["--sample_prompts=p.txt"], {"samples.prompts": ["p.txt"], "samples.before_after": True}),
        (["--sample_prompts=p.txt", "--sample_every_n_steps=3", "--sample_every_n_epochs=2"],
         {"samples.sample_every_epochs": 2, "samples.sample_every_steps": None, "samples.before_after": False}),
        (["--text_encoder_lr", "1e-5", "1e-6"], {"optimizer.text_encoder_lr": 1e-5}),
        (["--huggingface_repo_id=me/dog", "--huggingface_path_in_repo=/loras/", "--save_state_to_huggingface"],
         {"save.upload": "me/dog", "save.upload_folder": "loras", "save.upload_states": True,
          "save.upload_saves": True}),
        (["--torch_compile"], {"training.compile": "inductor"}),
        (["--torch_compile", "--dynamo_backend=aot_eager"], {"training.compile": "aot_eager"}),
        (["--dynamo_backend=aot_eager"], {"training.compile": None}),
        (["--torch_compile", "--dynamo_backend=no"], {"training.compile": None}),
        (["--save_state_to_huggingface"], {"save.upload_states": None, "save.upload_saves": None}),
        (["--network_module=my.module", "--network_args", "a=1", "b=c=d", "--network_dropout=0.1"],
         {"network.network_module": "my.module", "network.network_args": ["a=1", "b=c=d"],
          "network.neuron_dropout": 0.1, "network.adapter": None}),
    ],
)  # fmt: skip
def test_what_several_options_say_together(words: list[str], places: dict[str, Any]) -> None:
    found = translate(BASE, *words)
    assert {place: found.get(place) for place in places} == places


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "missing: --network_module"),
        ([BASE, "--network_train_unet_only", "--network_train_text_encoder_only"], "leave nothing to train"),
        ([BASE, "--use_8bit_adam", "--optimizer_type=Lion"], "AdamW8bit and Lion are asked for"),
        ([BASE, "--optimizer_args", "weight_decay=much"], "--optimizer_args weight_decay=much: expected a number"),
        ([BASE, "--lr_scheduler=cosin"], "--lr_scheduler cosin: expected one of constant"),
        ([BASE, "--caption_extension=.a", "--caption_extention=.b"], "say different things"),
        ([BASE, "--deepspeed"], "--deepspeed is refused: only a LoRA is trained"),
        ([BASE, "--huggingface_token=hf_x"], "set HF_TOKEN"),
        ([BASE, "--wandb_api_key=x"], "set WANDB_API_KEY"),
        ([BASE, "--lr_scheduler_type=a.B"], "--lr_scheduler_type is refused"),
        (["--network_module=networks.dylora"], "DyLoRA"),
        (["--network_module=networks.lora_flux"], "those for other models are not"),
        ([BASE, "--network_args", "conv_din=4"], "expected KEY=VALUE with a key of networks.lora"),
        ([BASE, "--network_args", "conv_dim=four"], "conv_dim=four: expected a number"),
        ([BASE, "--network_args", "down_lr_weight=1,2"], "expected 12 numbers"),
        (["--network_module=lycoris.kohya", "--network_args", "algo=abba"], "algo=abba: expected one of"),
        (["--network_module=lycoris.kohya", "--network_args", "preset=mine"], "preset=mine: expected one of"),
        ([BASE, "--pretrained_model_name=x"], "missing"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], words: list[str], told: str) -> None:
    assert told in mistake(capsys, *words)


# ---- --network_args -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "places"),
    [
        (["networks.lora", "conv_dim=4", "conv_alpha=2"], {"network.conv_rank": 4, "network.conv_alpha": 2.0}),
        (["networks.lora", "rank_dropout=0.1", "module_dropout=0.2", "loraplus_lr_ratio=4"],
         {"network.rank_dropout": 0.1, "network.module_dropout": 0.2, "optimizer.lora_plus_ratio": 4.0}),
        (["networks.lora", "block_dims=" + ",".join(["2"] * 25)], {"network.block_ranks": [2] * 25}),
        (["networks.lora", "mid_lr_weight=0.5"], {"optimizer.block_lr": [1.0] * 12 + [0.5] + [1.0] * 12}),
        (["lycoris.kohya"], {"network.adapter": "lora", "network.conv_rank": 8}),
        (["lycoris.kohya", "algo=loha", "conv_dim=2"], {"network.adapter": "loha", "network.conv_rank": 2}),
        (["lycoris.kohya", "algo=lokr", "factor=8", "full_matrix=True", "preset=attn-mlp"],
         {"network.adapter": "lokr", "network.adapter_options": ["factor=8", "full_matrix=true"],
          "network.conv_rank": None}),
        (["lycoris.kohya", "algo=locon", "dora_wd=True"], {"network.adapter": "dora"}),
        (["lycoris.kohya", "algo=loha", "dora_wd=True"], {"network.adapter_options": ["dora_wd=true"]}),
        (["lycoris.kohya", "algo=diag-oft", "constraint=0.001"], {"network.adapter": "oft", "network.alpha": 0.001}),
        (["lycoris.kohya", "algo=full", "preset=unet-transformer-only"],
         {"network.adapter": "full", "network.train": "unet"}),
    ],
)  # fmt: skip
def test_arguments_of_a_network(words: list[str], places: dict[str, Any]) -> None:
    module, *args = words
    given = [f"--network_module={module}", "--network_dim=8", *(["--network_args", *args] if args else [])]
    found = translate(*given)
    assert {place: found.get(place) for place in places} == places


OFF = ["bypass_mode=False", "use_scalar=False", "rank_dropout_scale=False", "train_norm=False"]


@pytest.mark.parametrize(
    "args",
    [
        ["algo=locon", "preset=full", "conv_dim=2", "conv_alpha=1", "use_tucker=False", "rank_dropout=0",
         "module_dropout=0", "dora_wd=False", *OFF],
        ["algo=lokr", "factor=-1", "decompose_both=False", "full_matrix=False", *OFF],
        ["algo=lora", "conv_dim=2", "disable_conv_cp=True", "dropout=0"],
        ["algo=full", *OFF],
        ["algo=ia3", "train_on_input=False"],
        ["algo=diag-oft", "constraint=0", "rescaled=False"],
    ],
    ids=lambda args: args[0],
)  # fmt: skip
def test_lycoris_lines_as_user_interfaces_write_them(
    typed_in: Path, capsys: pytest.CaptureFixture[str], args: list[str]
) -> None:
    """With rank and alpha for all types, and what is off for each."""
    words = [word for word in WORDS if not word.startswith("--network_module")]
    sizes = ["--network_module=lycoris.kohya", "--network_dim=2", "--network_alpha=1", "--output_dir=new"]
    assert entry.main(NAME, [*words, *sizes, "--debug_dataset", "--network_args", *args]) == 0
    told = " ".join(capsys.readouterr().out.split())
    has_alpha = args[0] in ("algo=locon", "algo=lokr", "algo=lora")
    assert ("rank 2, alpha 1" in told) == has_alpha and ("--network_alpha does nothing with" in told) != has_alpha


def test_what_lycoris_has_besides_is_refused_where_it_is_on(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--network_module=lycoris.kohya", "--network_args", "train_norm=True"]
    assert "--network_args train_norm=True: this is not built here" in mistake(capsys, *given)
    tucker = translate("--network_module=lycoris.kohya", "--network_args", "algo=loha", "disable_conv_cp=False")
    assert tucker["network.adapter_options"] == ["use_tucker=true"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--learning_rate is left out: 1e-4"),
        (["--optimizer_type=Prodigy"], "--learning_rate is left out: 1, by which"),
        (["--optimizer_type=Adafactor"], ""),
        (
            ["--optimizer_type=Adafactor", "--optimizer_args", "relative_step=False"],
            "--learning_rate is left out: 1e-4",
        ),
        (["--learning_rate=1e-3"], ""),
    ],
)
def test_what_a_rate_that_is_left_out_is(words: list[str], told: str) -> None:
    notes = [note for note in SCRIPT.notes(entry.read(SCRIPT, [BASE, *words])) if "learning_rate" in note]
    assert len(notes) == bool(told) and all(note.startswith(told) for note in notes)


def test_adafactor_takes_no_notice_of_rates_where_it_makes_its_own() -> None:
    rates = [BASE, "--optimizer_type=AdaFactor", "--unet_lr=1e-4", "--text_encoder_lr=1e-5", "--learning_rate=1e-3",
             "--lr_scheduler=cosine_with_restarts", "--lr_scheduler_num_cycles=3", "--lr_warmup_steps=10"]  # fmt: skip
    places = ("unet_lr", "text_encoder_lr", "learning_rate", "lr_schedule", "lr_cycles", "lr_warmup_steps")
    for args, are_taken in ((["relative_step=True"], False), (["relative_step=False"], True)):
        given = entry.read(SCRIPT, [*rates, "--optimizer_args", *args])
        values = entry.translate(SCRIPT, given)
        assert [f"optimizer.{place}" in values for place in places] == [are_taken] * 6
        told = entry.page(SCRIPT, given, values)
        assert ("--unet_lr does nothing with Adafactor's relative_step, and is left out" in told) != are_taken


def test_curves_of_rates_over_the_blocks() -> None:
    rates = block_rates({"down_lr_weight": "linear", "up_lr_weight": "reverse_linear+0.5", "mid_lr_weight": "2"})
    assert rates[:12] == pytest.approx([i / 11 for i in range(12)])
    assert rates[12] == 2 and rates[13:] == pytest.approx([1.5 - i / 11 for i in range(12)])
    assert block_rates({"down_lr_weight": "zeros"})[:13] == [0] * 12 + [1]
    sine, cosine = block_rates({"down_lr_weight": "sine"})[:12], block_rates({"down_lr_weight": "cosine"})[:12]
    assert sine == pytest.approx(cosine[::-1]) and sine[0] == 0 and sine[-1] == pytest.approx(1)
    assert [a * a + b * b for a, b in zip(sine, cosine, strict=True)] == pytest.approx([1] * 12)
    assert block_rates({"up_lr_weight": ",".join(["0.1"] * 6 + ["1"] * 6), "block_lr_zero_threshold": "0.1"})[13:] == (
        [0] * 6 + [1] * 6
    )


def test_lycoris_trains_and_its_file_says_so(typed_in: Path) -> None:
    options = ["--resolution=64", "--max_train_steps=1", "--network_dim=2", "--network_train_unet_only"]
    words = [word for word in WORDS if not word.startswith(("--network_module", "--resolution", "--output_dir"))]
    module = ["--network_module=lycoris.kohya", "--network_args", "algo=lokr", "factor=4", "preset=attn-mlp"]
    assert run(NAME, *words, *options, r"--output_dir=..\lokr", *module) == 0
    with safe_open(typed_in / "lokr" / "last.safetensors", "pt") as file:
        assert any("lokr_w1" in name for name in file.keys())  # noqa: SIM118  # no mapping
        assert file.metadata()["ss_network_module"] == "lycoris.kohya"
        assert ast.literal_eval(file.metadata()["ss_network_args"])["algo"] == "lokr"


def test_a_config_file_says_the_same(typed_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "old.toml"
    file.write_text(
        '[model]\npretrained_model_name_or_path = "../models/model.ckpt"\n[rest]\nnetwork_module = "networks.lora"\n'
        'train_data_dir = "../data/db/char1"\noutput_dir = "../configured"\nresolution = "64,64"\nnetwork_dim = 2\n'
    )
    assert entry.main(NAME, ["--config_file", str(file), "--network_dim=3", "--debug_dataset"]) == 0
    assert "--rank 3" in capsys.readouterr().out
