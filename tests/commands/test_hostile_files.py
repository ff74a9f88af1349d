"""Files made to do harm, through every command that reads models or LoRAs: nothing runs, and one message says why."""

from pathlib import Path

import pytest

from lorasmith.cli import main
from lorasmith.errors import UserError
from lorasmith.formats import kohya
from lorasmith.formats.dialects import read_any
from tests import hostile
from tests.formats import writers
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
