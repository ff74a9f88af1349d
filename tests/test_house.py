"""The house rules that no other tool checks: generated documents are current, the lowest layer is plain Python."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def load_docs_tool() -> Any:
    spec = importlib.util.spec_from_file_location("docs_tool", ROOT / "tools" / "docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def modules_of_the_lowest_layer() -> list[str]:
    layers = PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    return [name.strip() for name in layers[-1].split(":")]


def names(requirements: list[str]) -> list[str]:
    return [re.split(r"[\[<>=;! ]", line.strip())[0].lower() for line in requirements]


def constraints() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("path", load_docs_tool().pages(), ids=lambda path: path.name)
def test_generated_documents_are_current(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == load_docs_tool().pages()[path], "run `make docs`"


def test_schemas_of_commands_that_are_gone_do_not_stay() -> None:
    assert set((ROOT / "docs" / "schema").iterdir()) < set(load_docs_tool().pages())


@pytest.mark.parametrize("module", modules_of_the_lowest_layer())
def test_the_lowest_layer_imports_no_torch(module: str) -> None:
    program = f"import sys, lorasmith.{module}; print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_dependency_is_pinned_and_explained() -> None:
    project = PROJECT["project"]
    required = names(
        [line for group in [project["dependencies"], *project["optional-dependencies"].values()] for line in group]
    )
    assert not set(required) - set(names(constraints()))
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    assert [name for name in required if f"| `{name}` |" not in text] == []


def test_constraints_are_exact_public_versions() -> None:
    for line in constraints():
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*( ; python_version (<|>=|==) '3\.11')?", line), line


def test_the_package_brings_its_data_files() -> None:
    import lorasmith

    package = Path(lorasmith.__file__).parent
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["lorasmith"]
    carried = {path for pattern in patterns for path in package.glob(f"{pattern}/*") if path.is_file()}
    data = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert data <= carried


def test_what_ci_runs_is_executable() -> None:
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
