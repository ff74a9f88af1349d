"""Files made to do harm, through every command that reads models or LoRAs: nothing runs, and one message says why."""

from pathlib import Path

import pytest

from lorasmith.cli import main
from lorasmith.errors import UserError
from lorasmith.formats import kohya
from lorasmith.formats.dialects import read_any
from tests import hostile
from tests.formats import writers
from tests.test_checkpoint import ARCHIVES, BROKEN
from tests.tiny import write_tiny

WAYS = list(hostile.attacks(Path(), 2))
STRANGE = {
    "reduce, a module that is not known",
    "newobj",
    "newobj_ex",
    "build",
}  # taken for a callback's class, and inert


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sound base model, a LoRA and a picture."""
    place = tmp_path_factory.mktemp("place")
    write_tiny(place / "base.safetensors", "sd1")
    writers.kohya(place / "lora.safetensors", writers.make_layers(only="unet_mid"))
    (place / "pictures").mkdir()
    (place / "pictures" / "a.png").write_bytes(PICTURE.read_bytes())
    return place


PICTURE = Path(hostile.__file__).parents[1] / "src/lorasmith/demo/pictures/10_sks robot/robot-01.png"
TRAIN = ("train", "--dry-run", "--images", "{place}/pictures", "--output", "{out}/run")
COMMANDS = {
    "inspect": ("inspect", "{path}"),
    "convert": ("convert", "{path}", "--output", "{out}/a.safetensors"),
    "resize": ("resize", "{path}", "--rank", "1", "--output", "{out}/a.safetensors"),
    "merge --model": ("merge", "--model", "{path}", "--lora", "{place}/lora.safetensors", "--output", "{out}/a.ckpt"),
    "merge --lora": ("merge", "--model", "{place}/base.safetensors", "--lora", "{path}", "--output", "{out}/a.ckpt"),
    "extract": ("extract", "--rank", "1", "--tuned", "{path}", "--base", "{place}/base.safetensors", "--output",
                "{out}/a.safetensors"),
    "train --base": (*TRAIN, "--base", "{path}"),
    "train --weights": (*TRAIN, "--base", "{place}/base.safetensors", "--weights", "{path}"),
    "train --embeddings": (*TRAIN, "--base", "{place}/base.safetensors", "--embeddings", "{path}"),
}  # fmt: skip


@pytest.mark.parametrize("layout", hostile.LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_what_is_in_a_file(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, way: str, layout: str
) -> None:
    canary, path = tmp_path / "canary", tmp_path / "model.ckpt"
    hostile.LAYOUTS[layout](path, hostile.state_dict(4, evil=hostile.attacks(canary, 4)[way]))
    arguments = [part.format(place=place, path=path, out=tmp_path / "out") for part in COMMANDS[command]]
    code = main(arguments)
    error = capsys.readouterr().err
    assert not canary.exists() and not (tmp_path / "out").exists()
    assert code == (0 if command == "inspect" and way in STRANGE else 2), error
    if code:
        assert error.startswith("lorasmith: ") and str(path) in error and error.count("\n") == 1, error


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("layout", hostile.LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_no_reader_of_loras_runs_what_is_in_a_file(tmp_path: Path, way: str, layout: str, protocol: int) -> None:
    canary, path = tmp_path / "canary", tmp_path / "lora.pt"
    hostile.LAYOUTS[layout](path, hostile.state_dict(protocol, evil=hostile.attacks(canary, protocol)[way]))
    for read in (kohya.read, read_any):
        with pytest.raises(UserError):
            read(path)
    assert not canary.exists()


DAMAGED = {
    **{f"header: {name}": (".safetensors", data) for name, data in BROKEN.items()},
    **{f"archive: {name}": (".ckpt", data) for name, data in ARCHIVES.items()},
}


OPENS_MORE = {"merge --lora", "train --base", "train --weights", "train --embeddings"}


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=[pytest.mark.slow] * (name in OPENS_MORE)) for name in COMMANDS]
)
def test_every_command_tells_of_every_damage_in_one_sentence(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    for number, (name, (suffix, data)) in enumerate(DAMAGED.items()):
        path = tmp_path / f"model{number}{suffix}"
        path.write_bytes(data)
        arguments = [part.format(place=place, path=path, out=tmp_path / "out") for part in COMMANDS[command]]
        code = main(arguments)
        if code == 0 and command == "inspect" and name.startswith("archive: "):  # it reads no numbers of a model
            continue
        assert code == 2, name
        error = capsys.readouterr().err
        assert error.startswith("lorasmith: ") and str(path) in error and error.count("\n") == 1, (name, error)
        assert len(error) < 1500 and error[:-1].isprintable() and not (tmp_path / "out").exists(), (name, error)
        path.unlink()


@pytest.mark.parametrize(
    "length, is_read", [pytest.param(100_000_000, True, marks=pytest.mark.slow), (100_000_001, False)]
)
def test_a_header_of_100_mb(tmp_path: Path, capsys: pytest.CaptureFixture[str], length: int, is_read: bool) -> None:
    """It is valid, and almost all of it is spaces; what is longer is not even looked at."""
    path = writers.kohya(tmp_path / "a.safetensors", writers.make_layers(only="unet_mid.*proj_in"))
    data = path.read_bytes()
    own = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(length.to_bytes(8, "little") + data[8:own].ljust(length) + data[own:])
    assert main(["inspect", str(path)]) == (0 if is_read else 2)
    assert is_read or "header of 100000001" in capsys.readouterr().err
    path.unlink()


@pytest.mark.parametrize("way", ["reduce", "build", "a storage's name", "nested"])
def test_nothing_runs_in_files_that_are_read_beside_the_one_that_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    canary = tmp_path / "canary"
    layers = writers.make_layers(alpha=None, only="attn|ff_net_0")
    writers.cloneofsimo_list(tmp_path / "a.pt", layers, "unet")
    evil = hostile.state_dict(4, evil=hostile.attacks(canary, 4)[way])
    hostile.write_zip(tmp_path / "a_txt.pt", evil)
    folder = write_tiny(tmp_path / "model", layout="diffusers", width=8)
    (folder / "text_encoder" / "model.safetensors").unlink()
    hostile.write_legacy(folder / "text_encoder" / "pytorch_model.bin", evil)
    for words in (
        ["convert", str(tmp_path / "a.pt"), "--output", str(tmp_path / "b.safetensors")],
        ["inspect", str(tmp_path / "a.pt")],
        ["convert", str(folder), "--to", "checkpoint", "--output", str(tmp_path / "b.safetensors")],
    ):
        assert main(words) == 2, words
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and not canary.exists() and not (tmp_path / "b.safetensors").exists(), error


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "\xff", "[]", '{"lora_alpha": 1e999}', '{"r": NaN'])
def test_a_configuration_beside_the_tensors_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    writers.peft(tmp_path / "a", writers.make_layers(only="unet_mid.*attn1"), {})
    (tmp_path / "a" / "adapter_config.json").write_text(text, encoding="latin-1")
    assert main(["convert", str(tmp_path / "a"), "--output", str(tmp_path / "b.safetensors")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "adapter_config.json" in error and len(error) < 1500
