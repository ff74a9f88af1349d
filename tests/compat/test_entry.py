"""How old command lines are read, told and run, with a script that exists in no repository."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from lorasmith import config
from lorasmith.compat import entry
from lorasmith.compat.table import Flag, Script, Values, as_path
from tests.compat.running import run

SCRIPT = Script(
    "train_toy.py",
    "train",
    (
        Flag("--pretrained_model_name_or_path", "model.base", kind="path"),
        Flag("--train_data_dir", "data.images", kind="path"),
        Flag("--network_dim", "network.rank", kind="integer"),
        Flag("--network_train_unet_only", "network.train", kind="switch", value="unet"),
        Flag("--network_train_text_encoder_only", "network.train", kind="switch", value="text_encoder"),
        Flag("--learning_rate", "optimizer.learning_rate", kind="number", default=2e-6),
        Flag("--max_train_steps", "training.steps", kind="integer", convert=lambda steps: steps * 2),
        Flag("--caption_extension", "data.caption_extension"),
        Flag("--caption_prefix", "data.caption_prefix"),
        Flag("--save_precision", "save.save_precision", choices=("float", "fp16")),
        Flag("--shuffle_caption", "data.shuffle_caption", kind="switch"),
        Flag("--no_logs", "log.tensorboard", kind="switch", value=False),
        Flag("--lowram", kind="switch", note="nothing needs doing."),
        Flag("--wandb_api_key", refusal="keys belong into the environment; set WANDB_API_KEY."),
        Flag("--keep", kind="integer", becomes="`--keep-tokens`, if captions are shuffled"),
    ),
    complete=lambda given: {"data.keep_tokens": given["keep"]} if "keep" in given else {},
    has_config_file=True,
)

LAST = ["--network_dim=8"]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(entry.SCRIPTS, SCRIPT.name, SCRIPT)


def read(*words: str) -> Values:
    return entry.read(SCRIPT, words)


def translate(*words: str) -> Values:
    return entry.translate(SCRIPT, read(*words))


def mistake(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert entry.main(SCRIPT.name, words) == 2
    told = capsys.readouterr().err
    assert told.startswith("lorasmith: ") and "Traceback" not in told
    return told


@pytest.mark.parametrize(
    "words",
    [["--network_dim=8"], ["--network_dim", "8"], ["--network_d=8"], ["--network_di", "8"], ["--network_dim=4", *LAST]],
)
def test_both_ways_to_give_a_value_and_abbreviations(words: list[str]) -> None:
    assert read(*words) == {"network_dim": 8}


def test_a_name_that_is_short_for_two_spellings_of_one_option_will_do() -> None:
    script = entry.SCRIPTS["finetune/make_captions.py"]
    assert entry.read(script, ["photos", "--caption_ext=.txt"]) == {
        "train_data_dir": "photos", "caption_extention": ".txt",
    }  # fmt: skip


def test_every_kind_of_flag_finds_its_place() -> None:
    words = ["--network_train_unet_only", "--shuffle_caption", "--no_logs", "--max_train_steps=3", "--keep=1"]
    assert translate(*words) == {
        "network.train": "unet", "data.shuffle_caption": True, "data.keep_tokens": 1,
        "optimizer.learning_rate": 2e-6, "training.steps": 6, "log.tensorboard": False,
    }  # fmt: skip


def test_windows_paths_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert as_path("..\\model\\a.ckpt") == "../model/a.ckpt"
    assert as_path("org/name") == "org/name"
    (tmp_path / "odd\\name").touch()
    assert as_path("odd\\name") == "odd\\name"
    assert translate("--caption_extension=a\\b")["data.caption_extension"] == "a\\b"  # no path


def test_the_command_line_and_the_toml_say_the_same(tmp_path: Path) -> None:
    words = [
        "--pretrained_model_name_or_path=my models\\a.ckpt", "--train_data_dir=photos", "--network_dim=8", "--no_logs",
        "--caption_prefix=-x;", "--learning_rate=1e-4", "--save_precision=fp16", "--network_train_unet_only",
    ]  # fmt: skip
    values = translate(*words)
    printed = entry.page(SCRIPT, read(*words), values)
    text = re.search(r"(?s)train.toml:\n(.*)# the end of train.toml", printed)
    assert text and '"my models/a.ckpt"' in printed
    (tmp_path / "f.toml").write_text(text[1])
    from_file = config.build(config.TrainConfig, {}, tmp_path / "f.toml")
    assert from_file == config.build(config.TrainConfig, entry.nested(values))
    parser = entry.cli.parser_of("train", config.TrainConfig)
    typed = vars(parser.parse_args(entry.words_of(SCRIPT, values)))
    typed = {place: value for place, value in typed.items() if place not in ("help", "config")}
    assert config.build(config.TrainConfig, entry.nested(typed)) == from_file
    assert from_file.data.caption_prefix == "-x;" and not from_file.log.tensorboard


def test_notes_are_told_and_only_of_what_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--lowram"], []):
        assert entry.main(SCRIPT.name, words) == 2  # pictures are missing
        told = capsys.readouterr()
        assert ("note: --lowram: nothing needs doing." in told.out) == bool(words)
        assert "lorasmith train --learning-rate 2e-06" in told.out


def test_a_config_file_gives_options_and_the_command_line_wins(tmp_path: Path) -> None:
    (tmp_path / "old.toml").write_text(
        "network_dim = 16\n[a]\nlearning_rate = 1e-3\nlowram = false\n"
        "[b]\nshuffle_caption = true\nmax_train_steps = 5\n"
    )
    expected = {"network_dim": 8, "learning_rate": 1e-3, "shuffle_caption": True, "max_train_steps": 5}
    for name in ("old.toml", "old"):
        assert read(f"--config_file={tmp_path / name}", "--network_dim=8") == expected


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("netwrk_dim = 4", "has no option netwrk_dim; did you mean network_dim?"),
        ("network_dim = true", "network_dim = True: expected a whole number"),
        ("lowram = 1", "lowram = 1: expected true or false"),
        ("network_dim = 'x'", "--network_dim: expected a whole number, not 'x'"),
        ("network_dim", "line 1: this is not TOML"),
    ],
)
def test_mistakes_in_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, told: str) -> None:
    (tmp_path / "old.toml").write_text(line)
    assert told in mistake(capsys, "--config_file", str(tmp_path / "old.toml"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--netwrk_dim=4"], "train_toy.py has no option --netwrk_dim; did you mean --network_dim?"),
        (["--network-dim=4"], "did you mean --network_dim?"),
        (["photos"], "'photos' belongs to no option of train_toy.py"),
        (["--network_dim=x"], "--network_dim: expected a whole number, not 'x'"),
        (["--network_dim"], "--network_dim: expected one argument"),
        (["--network=x"], "--network is short for several options: --network_dim, --network_train_unet_only, "),
        (["--save_precision=fp8"], "--save_precision: invalid choice: 'fp8'"),
        (["--wandb_api_key=x"], "--wandb_api_key is refused: keys belong into the environment"),
        (["--network_train_unet_only", "--network_train_text_encoder_only"], "contradict each other"),
        (["--network_dim=0"], "--network_dim 0: expected a whole number above 0"),
    ],
)
def test_mistakes_are_told_in_the_words_of_the_old_script(
    capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert told in mistake(capsys, *words)


def test_help_says_what_becomes_of_each_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(SCRIPT.name, ["--network_dim", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for text in ("--network_train_unet_only --train unet", "--no_logs --tensorboard off", "refused: keys belong"):
        assert text in told


@pytest.mark.parametrize("script", entry.SCRIPTS.values(), ids=lambda script: script.name)
def test_a_table_is_whole_and_true(script: Script) -> None:
    options = script.options()
    assert len({flag.name for flag in script.flags}) == len(script.flags)
    for flag in script.flags:
        assert [flag.place or flag.note or flag.becomes, flag.refusal].count("") == 1, flag.name
        assert flag.place == "" or flag.place in options, flag.name
        assert entry.told(script, flag)


GENERATION = (  # of December 2022, and what was added later
    "--v2 --v_parameterization --prompt --from_file --interactive --no_preview --image_path --mask_path --strength "
    "--images_per_prompt --outdir --sequential_file_name --use_original_file_name --n_iter --H --W --batch_size "
    "--steps --sampler --scale --ckpt --vae --seed --iter_same_seed --fp16 --bf16 --xformers --diffusers_xformers "
    "--opt_channels_last --network_module --network_weights --network_mul --network_dim --clip_skip "
    "--max_embeddings_multiples --clip_guidance_scale --clip_image_guidance_scale --vgg16_guidance_scale "
    "--vgg16_guidance_layer --guide_image_path --highres_fix_scale --highres_fix_steps --highres_fix_save_1st "
    "--sdxl --v1 --zero_terminal_snr --pyramid_noise_prob --pyramid_noise_discount_range --noise_offset_prob "
    "--noise_offset_range --from_module --prompter_module_args --original_height --original_width "
    "--original_height_negative --original_width_negative --crop_top --crop_left --vae_batch_size --vae_slices "
    "--no_half_vae --tokenizer_cache_dir --sdpa --shuffle_prompts --network_args --network_show_meta --network_merge "
    "--network_merge_n_models --network_pre_calc --network_regional_mask_max_color_codes "
    "--textual_inversion_embeddings --emb_normalize_mode --force_scheduler_zero_steps_offset --highres_fix_strength "
    "--highres_fix_latents_upscaling --highres_fix_upscaler --highres_fix_upscaler_args "
    "--highres_fix_disable_control_net --negative_scale --control_net_models --control_net_preps "
    "--control_net_multipliers --control_net_weights --control_net_ratios --control_net_lllite_models "
    "--clip_vision_strength --ds_depth_1 "
    "--ds_timesteps_1 --ds_depth_2 --ds_timesteps_2 --ds_ratio --gradual_latent_timesteps --gradual_latent_ratio "
    "--gradual_latent_ratio_step --gradual_latent_every_n_steps --gradual_latent_s_noise "
    "--gradual_latent_unsharp_params"
)

# All options of each script in sd-scripts' versions from December 2022 to February 2026.
OPTIONS = {
    "gen_img_diffusers.py": GENERATION,
    "gen_img.py": GENERATION,
    "networks/merge_lora.py": "--v2 --save_precision --precision --sd_model --save_to --models --ratios --no_metadata "
    "--concat --shuffle",
    "finetune/make_captions.py": "train_data_dir --caption_weights --caption_extention --caption_extension "
    "--beam_search --batch_size --max_data_loader_n_workers --pin_memory --num_beams --top_p --max_length --min_length "
    "--seed --debug --recursive",
    "finetune/tag_images_by_wd14_tagger.py": "train_data_dir --repo_id --model_dir --force_download --batch_size "
    "--max_data_loader_n_workers --pin_memory --output_path --caption_extention --caption_extension --thresh "
    "--general_threshold --character_threshold --meta_threshold --model_threshold --copyright_threshold "
    "--artist_threshold --recursive --remove_underscore --debug --undesired_tags --frequency_tags --onnx --append_tags "
    "--use_rating_tags --use_rating_tags_as_last_tag --use_quality_tags --use_quality_tags_as_last_tag "
    "--character_tags_first --always_first_tags --caption_separator --tag_replacement --character_tag_expand",
    "finetune/merge_captions_to_metadata.py": "train_data_dir out_json --in_json --caption_extention "
    "--caption_extension --full_path --recursive --debug",
    "finetune/merge_dd_tags_to_metadata.py": "train_data_dir out_json --in_json --full_path --recursive "
    "--caption_extension --debug",
    "finetune/clean_captions_and_tags.py": "train_data_dir in_json out_json --debug",
    "finetune/prepare_buckets_latents.py": "train_data_dir in_json out_json model_name_or_path --v2 --batch_size "
    "--max_data_loader_n_workers --max_resolution --min_bucket_reso --max_bucket_reso --bucket_reso_steps "
    "--bucket_no_upscale --mixed_precision --full_path --flip_aug --alpha_mask --skip_existing --recursive",
}


@pytest.mark.parametrize("script", OPTIONS)
def test_every_option_is_known_and_only_some_are_our_own(script: str) -> None:
    flags = entry.SCRIPTS[script].flags
    own = {flag.name for flag in flags if flag.becomes.startswith("lorasmith's own")}
    assert {flag.name for flag in flags} == {*OPTIONS[script].split(), *own}


@pytest.mark.parametrize("script", OPTIONS)
def test_the_script_is_there_and_says_what_it_takes(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(script, "--help") == 0
    told = capsys.readouterr().out
    assert f"usage: {script} " in told
    assert all(name in told for name in OPTIONS[script].split())


def test_without_a_clone_it_is_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for word, code in (("networks\\merge_lora.py", 0), ("merge", "lorasmith: expected the name of a script, one of ")):
        monkeypatch.setattr(sys, "argv", ["lorasmith.compat", word, "--help"])
        with pytest.raises(SystemExit) as done:
            runpy.run_module("lorasmith.compat", run_name="__main__")
        assert done.value.code == code or str(done.value.code).startswith(str(code))
    assert "usage: networks/merge_lora.py" in capsys.readouterr().out


def test_of_several_processes_the_first_one_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert entry.main("networks/merge_lora.py", ["--models", "no.pt", "--ratios", "1", "--save_to", "x.pt"]) == 2
        told = capsys.readouterr()
        assert ("lorasmith merge --lora no.pt" in told.out, "no.pt" in told.err) == (rank == "0", rank == "0")
