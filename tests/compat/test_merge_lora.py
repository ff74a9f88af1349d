"""networks/merge_lora.py: the three lines of sd-scripts' first document as they stand there, and each option alone."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorasmith.checkpoint import open_checkpoint
from lorasmith.cli import main as lorasmith
from lorasmith.compat import entry
from lorasmith.model_families import target_shapes
from tests.compat.running import ROOT, run
from tests.compat.test_factors import reference
from tests.random_lora import TE, TO_K, deltas_of, make_lora, read_lora, write_lora
from tests.tiny import write_tiny

SCRIPT = "networks/merge_lora.py"
GOLDEN = Path(__file__).parent / "golden"
DOCUMENT = ROOT.parent / "shared" / "spec" / "train_network_README-en.txt"  # where this is developed
LINES = {
    "one": r"python networks\merge_lora.py --sd_model ..\model\model.ckpt "
    r"--save_to ..\lora_train1\model-char1-merged.safetensors --models ..\lora_train1\last.safetensors --ratios 0.8",
    "two": r"python networks\merge_lora.py --sd_model ..\model\model.ckpt "
    r"--save_to ..\lora_train1\model-char1-merged.safetensors "
    r"--models ..\lora_train1\last.safetensors ..\lora_train2\last.safetensors --ratios 0.8 0.5",
    "loras": r"python networks\merge_lora.py --save_to ..\lora_train1\model-char1-style1-merged.safetensors "
    r"--models ..\lora_train1\last.safetensors ..\lora_train2\last.safetensors --ratios 0.6 0.4",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that the document's lines name, beside the one where they are typed."""
    folder = tmp_path_factory.mktemp("document")
    model = write_tiny(folder / "model" / "model.ckpt", layout="ckpt", width=8)
    with open_checkpoint(model) as checkpoint:
        shapes = target_shapes(checkpoint)
    for number, alpha in ((1, 2.0), (2, 1.0)):
        (folder / f"lora_train{number}").mkdir()
        tensors = make_lora(shapes, rank=4, alpha=alpha, seed=number)
        write_lora(folder / f"lora_train{number}" / "last.safetensors", tensors)
    return folder


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of these, and the folder where the lines are typed."""
    for path in models.iterdir():
        (tmp_path / path.name).mkdir()
        for file in path.iterdir():
            (tmp_path / path.name / file.name).symlink_to(file)
    (tmp_path / "sd-scripts").mkdir()
    monkeypatch.chdir(tmp_path / "sd-scripts")
    return tmp_path


@pytest.fixture
def small(folder: Path) -> Path:
    """The same with LoRAs of a few layers."""
    names = (TE, TO_K, "lora_unet_mid_block_attentions_0_proj_in")
    for number in (1, 2):
        path = folder / f"lora_train{number}" / "last.safetensors"
        tensors, _ = read_lora(path)
        path.unlink()
        write_lora(path, {key: tensor for key, tensor in tensors.items() if key.startswith(names)})
    return folder


def words_of(line: str) -> list[str]:
    """Return the words as Windows' own shell passes them on, where a backslash is a character like any other."""
    program, script, *words = shlex.split(line, posix=False)
    assert (program, script) == ("python", r"networks\merge_lora.py")
    return words


def tensors_of(path: Path) -> dict[str, Tensor]:
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.tensor(name).clone() for name in checkpoint.names()}


def toml_of(printed: str) -> str:
    found = re.search(r"(?s)with this in merge.toml:\n(.*)# the end of merge.toml", printed)
    assert found
    return found[1]


@pytest.mark.skipif(not DOCUMENT.exists(), reason="the document is no part of the repository")
def test_the_lines_are_those_of_the_document() -> None:
    written = re.findall(r"python networks\\merge_lora\.py [^`]*?(?= ```)", DOCUMENT.read_text(encoding="utf-8"))
    assert written == list(LINES.values())


@pytest.mark.parametrize(("name", "number"), [("one", 1), ("two", 2)])
def test_into_a_model_it_is_lorasmith_merge(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, number: int
) -> None:
    assert run(SCRIPT, *words_of(LINES[name])) == 0
    toml = toml_of(capsys.readouterr().out)
    assert toml == (GOLDEN / f"merge_lora_{name}.toml").read_text(encoding="utf-8")
    loras = [f"../lora_train{one}/last.safetensors" for one in (1, 2)][:number]
    own = ["--model", "../model/model.ckpt", "--lora", *loras, "--ratio", *["0.8", "0.5"][:number]]
    assert lorasmith(["merge", *own, "--save-precision", "float", "--output", "own.safetensors"]) == 0
    found = (folder / "lora_train1" / "model-char1-merged.safetensors").read_bytes()
    assert found == Path("own.safetensors").read_bytes()
    base = tensors_of(folder / "model" / "model.ckpt")
    merged = tensors_of(folder / "lora_train1" / "model-char1-merged.safetensors")
    assert sum(not torch.equal(merged[key], tensor) for key, tensor in base.items()) == 264


def test_loras_with_each_other_are_summed_as_the_document_says(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(SCRIPT, *words_of(LINES["loras"])) == 0
    out = capsys.readouterr().out
    assert "a ratio acts as its square (0.6 as 0.36)" in out and "`lorasmith merge --lora` adds the products" in out
    toml = toml_of(out)
    assert toml == (GOLDEN / "merge_lora_loras.toml").read_text(encoding="utf-8")
    Path("merge.toml").write_text(toml, encoding="utf-8")  # which is the exact sum, of products
    assert lorasmith(["merge", "--config", "merge.toml", "--output", "exact.safetensors"]) == 0
    found, metadata = read_lora(folder / "lora_train1" / "model-char1-style1-merged.safetensors")
    exact = deltas_of(read_lora(Path("exact.safetensors"))[0])
    assert not any(torch.allclose(exact[name], delta) for name, delta in deltas_of(found).items())
    loras = [read_lora(folder / f"lora_train{number}" / "last.safetensors")[0] for number in (1, 2)]
    expected = reference(loras, [0.6, 0.4], concat=False)
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, torch.from_numpy(expected[key]), rtol=1e-5, atol=1e-7)
    assert metadata["ss_network_dim"] == "4" and metadata["modelspec.merged_from"] == "last, last"


def merge(folder: Path, *options: str, code: int = 0, output: str = "out.safetensors") -> Path:
    models = [str(folder / f"lora_train{number}" / "last.safetensors") for number in (1, 2)]
    words = ["--models", *models, "--ratios", "0.6", "0.4", "--save_to", output, *options]
    assert entry.main("networks/merge_lora.py", words) == code
    return Path(output)


def test_precisions_are_those_that_are_asked_for(small: Path) -> None:
    types = {
        (): torch.float32,
        ("--precision=bf16",): torch.bfloat16,
        ("--save_precision=fp16",): torch.float16,
        ("--precision=fp16", "--save_precision=float"): torch.float32,
    }
    found = {}
    for options, dtype in types.items():
        found[options], _ = read_lora(merge(small, *options, "--overwrite"))
        assert {tensor.dtype for tensor in found[options].values() if tensor.dim()} == {dtype}
    rounded, exact = found["--precision=fp16", "--save_precision=float"], found[()]
    assert any(not torch.equal(rounded[key], exact[key]) for key in exact)
    assert all(
        torch.equal(found["--save_precision=fp16",][key], exact[key].half()) for key in exact if exact[key].dim()
    )


def test_concat_and_shuffle(small: Path) -> None:
    loras = [read_lora(small / f"lora_train{number}" / "last.safetensors")[0] for number in (1, 2)]
    plain, _ = read_lora(merge(small, "--concat"))
    expected = reference(loras, [0.6, 0.4], concat=True)
    for key, tensor in plain.items():
        torch.testing.assert_close(tensor, torch.from_numpy(expected[key]), rtol=1e-5, atol=1e-7)
    shuffled, _ = read_lora(merge(small, "--concat", "--shuffle", "--overwrite"))
    assert any(not torch.equal(shuffled[key], plain[key]) for key in plain)
    deltas = deltas_of(shuffled)
    for name, delta in deltas_of(plain).items():
        torch.testing.assert_close(deltas[name], delta, rtol=1e-5, atol=1e-7)


def test_no_metadata_leaves_the_least_that_programs_need(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, metadata = read_lora(merge(small, "--no_metadata"))
    assert {key for key in metadata if not key.startswith("sshs_")} == {
        "ss_network_module", "ss_network_dim", "ss_network_alpha",
    }  # fmt: skip
    merge(small, "--no_metadata", "--sd_model", "../model/model.ckpt", "--overwrite")
    assert "note: --no_metadata: nothing needs doing" in capsys.readouterr().out


def test_both_kinds_of_files_are_written(small: Path) -> None:
    assert tensors_of(merge(small, output="loras.ckpt")).keys() == read_lora(merge(small))[0].keys()
    model = merge(small, "--sd_model", "../model/model.ckpt", output="model.ckpt")
    assert tensors_of(model).keys() == tensors_of(small / "model" / "model.ckpt").keys()


def test_ranks_that_differ_are_refused_but_may_lie_side_by_side(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = small / "lora_train2" / "last.safetensors"
    tensors, _ = read_lora(path)
    path.unlink()
    shapes = {"lora_down.weight": (slice(2),), "lora_up.weight": (slice(None), slice(2)), "alpha": ()}
    write_lora(path, {key: tensor[shapes[key.partition(".")[2]]] for key, tensor in tensors.items()})
    merge(small, code=2)
    told = capsys.readouterr().err
    assert "has rank 4 and rank 2: matrices of different size cannot be added" in told and "--concat" in told
    found, metadata = read_lora(merge(small, "--concat"))
    assert metadata["ss_network_dim"] == "6" and len(found) == 9


def test_a_lora_of_the_unet_alone_will_do(small: Path) -> None:
    path = small / "lora_train1" / "last.safetensors"
    tensors, _ = read_lora(path)
    path.unlink()
    write_lora(path, {key: tensor for key, tensor in tensors.items() if key.startswith("lora_unet")})
    found, _ = read_lora(merge(small))
    other, _ = read_lora(small / "lora_train2" / "last.safetensors")
    for key, tensor in found.items():
        if key.startswith("lora_te"):
            factor = 1 if key.endswith("alpha") else 0.4
            torch.testing.assert_close(tensor, other[key] * factor)


def test_v2_is_checked_against_the_file(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge(small, "--v2", "--sd_model", "../model/model.ckpt", code=2)
    assert "--v2 says that ../model/model.ckpt is SD 2.x, but it is SD 1.x" in capsys.readouterr().err
    write_tiny(Path("v2.safetensors"), "sd2")
    merge(small, "--v2", "--sd_model", "v2.safetensors", code=2)
    assert "--v2" not in capsys.readouterr().err  # the LoRAs do not fit, but the model is what it was said to be


@pytest.mark.parametrize("options", [[], ["--sd_model", "../model/model.ckpt"]])
def test_nothing_is_written_over_unless_asked(
    small: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    Path("out.safetensors").write_text("mine")
    merge(small, *options, code=2)
    told = capsys.readouterr().err
    assert "--save_to" in told and "exists already; give another name, or --overwrite" in told
    assert Path("out.safetensors").read_text() == "mine"
    assert merge(small, *options, "--overwrite").stat().st_size > 4


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--models", "a", "--ratios", "1", "2", "--save_to", "x"], "--models names 1 LoRA files and --ratios 2"),
        (["--save_to", "x.safetensors"], "--models names 0 LoRA files"),
        (["--models", "a", "--ratios", "1"], "missing: --save_to"),
        (["--models", "a", "--ratios", "1", "--save_to", "x"], "--save_to: x should end in .safetensors"),
        (["--models", "a", "--ratios", "1", "--save_to", "x.pt", "--sd_model=m", "--concat"], "leave out --concat"),
        (["--models", "none.pt", "--ratios", "1", "--save_to", "x.pt"], "none.pt"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], words: list[str], told: str) -> None:
    assert entry.main("networks/merge_lora.py", words) == 2
    assert told in capsys.readouterr().err
