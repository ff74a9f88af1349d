"""Plugs are found by file name or dotted name, and a wrong name is answered helpfully."""

import subprocess
import sys
import types
from pathlib import Path

import pytest

from lorasmith import plugins
from lorasmith.errors import UserError


def test_names_are_the_files_of_the_folder() -> None:
    folder = Path(plugins.__file__).parent / "adapters"
    files = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")} - {"base"}
    assert "lora" in files and set(plugins.names("adapters")) == files
    assert "adamw" in plugins.names("optimizers")


def test_a_short_name_is_a_module_of_ours() -> None:
    assert plugins.find("adapters", "lora").__name__ == "lorasmith.adapters.lora"


@pytest.mark.parametrize("name, near", [("Lora", "lora"), ("lroa", "lora")])
def test_a_misspelt_name_is_answered_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UserError, match=f"no adapter named '{name}'; did you mean {near}?"):
        plugins.find("adapters", name)


def test_a_name_like_no_other_is_answered_with_all() -> None:
    with pytest.raises(UserError, match=r"no optimizer named 'zzz'; There are: .*adamw"):
        plugins.find("optimizers", "zzz")


def test_dotted_names_are_modules_or_what_is_in_them() -> None:
    assert isinstance(plugins.find("optimizers", "json.decoder"), types.ModuleType)
    assert plugins.find("optimizers", "fractions.Fraction").__name__ == "Fraction"


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere.at_all", "no module named 'nowhere' is installed here"),
        ("json.nothing", "module json was found, but it has no 'nothing'"),
    ],
)
def test_a_dotted_name_that_is_not_there(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plugins.find("adapters", name)


def test_a_plug_whose_own_package_is_missing_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import a_package_nobody_has\n")
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "__init__.py").touch()
    (tmp_path / "outer" / "inner.py").write_text("import a_package_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="needs the Python package 'a_package_nobody_has'"):
        plugins.find("adapters", "outer.inner")
    with pytest.raises(UserError, match="needs the Python package 'a_package_nobody_has'"):
        plugins.find("adapters", "needs_more.Thing")


def test_listing_names_imports_no_torch() -> None:
    code = "import sys; from lorasmith import plugins; plugins.names('adapters'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
