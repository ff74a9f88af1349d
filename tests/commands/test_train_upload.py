"""--upload through the command, to a stand-in for the hub on this machine; and the page that is written in any case."""

import base64
import contextlib
import io
import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants
from PIL import Image

from lorasmith.cli import main
from lorasmith.training_run import session

from ..tiny import write_tiny

WORDS = ["--no-tensorboard", "--no-progress", "--resolution", "64", "--rank", "2", "--workers", "0", "--train",
         "text_encoder", "--steps", "1", "--sample-steps", "1", "--prompts", "a | cat --n dog"]  # fmt: skip
TOKEN = "hf_secretsecret"


class Hub(ThreadingHTTPServer):
    """Keeps what is committed; answers 403 to everything where `is_closed`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.is_closed = False
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization"))
        place = f"http://127.0.0.1:{self.server.server_port}/me/dog"
        if self.server.is_closed:
            return self.answer({"error": "you may not"}, 403)
        if self.path.endswith("/repos/create"):
            self.server.created.append(json.loads(body))
            return self.answer({"url": place, "name": "me/dog"})
        if "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            return self.answer({"files": files})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"commitUrl": f"{place}/commit/1", "commitOid": "1", "success": True})
        return self.answer({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self.answer({"siblings": [], "sha": "0", "id": "me/dog"})

    def answer(self, values: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("base") / "sd1.safetensors", width=8)


@pytest.fixture(autouse=True)
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "write_report", lambda folder, contents: folder)  # takes long


def run(base: Path, folder: Path, *options: str) -> tuple[int, str]:
    if not (folder / "pictures").is_dir():
        (folder / "pictures").mkdir()
        for number in range(2):
            pixels = random.Random(number).randbytes(64 * 64 * 3)
            Image.frombytes("RGB", (64, 64), pixels).save(folder / "pictures" / f"{number}.png")
    words = ["train", "--base", str(base), "--images", str(folder / "pictures"), "--caption", "sks thing"]
    with contextlib.redirect_stdout(printed := io.StringIO()):
        code = main([*words, *WORDS, "--output", str(folder / "out"), *options])
    return code, printed.getvalue()


def is_private(asked: dict[str, Any]) -> bool:
    """Read what the hub's client asks for, which versions of it spell in two ways."""
    return asked["private"] if "private" in asked else asked["visibility"] == "private"


def test_what_lies_in_the_folder_is_uploaded_and_nothing_else(hub: Hub, base: Path, tmp_path: Path) -> None:
    code, printed = run(base, tmp_path, "--upload", "me/dog", "--license", "mit", "--title", "Dog <b>|")
    assert code == 0 and "uploaded to" in printed
    assert hub.created[0]["name"] == "dog" and is_private(hub.created[0])
    folder = tmp_path / "out" / "hub"
    there = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")
             if ".cache" not in path.parts}  # fmt: skip
    assert hub.files == there and set(there) == {"README.md", "last.safetensors", "images/sample-00.png"}
    assert there["last.safetensors"] == (tmp_path / "out" / "last.safetensors").read_bytes()
    page = there["README.md"].decode()
    front = yaml.safe_load(page.split("---")[1])
    assert front["license"] == "mit" and "lora" in front["tags"]
    assert front["widget"] == [{"text": "a | cat", "output": {"url": "images/sample-00.png"}}]
    assert "| network.rank | 2 |" in page and "# Dog &lt;b>\\|" in page and "A LoRA for sd1.safetensors." in page
    assert str(tmp_path) not in page and str(base.parent) not in page
    assert hub.tokens == {f"Bearer {TOKEN}"}
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert written == []


def test_a_failed_upload_is_told_and_the_run_is_whole(
    hub: Hub, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.is_closed = True
    code, printed = run(base, tmp_path, "--upload", "me/dog")
    error = capsys.readouterr().err
    assert code == 0 and "the LoRA:" in printed and (tmp_path / "out" / "last.safetensors").is_file()
    assert "--upload me/dog failed: " in error and f"hf upload me/dog {tmp_path / 'out' / 'hub'} . --private" in error


def test_a_page_that_was_changed_by_hand_stays(base: Path, tmp_path: Path) -> None:
    assert run(base, tmp_path)[0] == 0
    page = tmp_path / "out" / "hub" / "README.md"
    assert "images/sample-00.png" in page.read_text(encoding="utf-8")
    page.write_text("mine", encoding="utf-8")
    with contextlib.redirect_stdout(printed := io.StringIO()):
        assert main(["train", "--resume", str(tmp_path / "out"), "--steps", "2"]) == 0
    assert page.read_text(encoding="utf-8") == "mine" and "changed by hand" in printed.getvalue()
    assert (page.parent / "last.safetensors").read_bytes() == (tmp_path / "out" / "last.safetensors").read_bytes()


def test_a_new_repository_is_public_where_asked(hub: Hub, base: Path, tmp_path: Path) -> None:
    assert run(base, tmp_path, "--upload", "me/dog", "--upload-public")[0] == 0
    assert not is_private(hub.created[0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--upload", "me/dog"], "needs a token"),
        (["--upload", "dog"], "expected a repository such as your-name/my-lora"),
        (["--upload-public"], "upload_public is for upload"),
    ],
)
def test_mistakes_are_told_before_training(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    options: list[str], expected: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert run(base, tmp_path, "--dry-run", *options)[0] == 2
    assert expected in " ".join(capsys.readouterr().err.split())
