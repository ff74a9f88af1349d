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
         "text_encoder", "--steps", "1"]  # fmt: skip
DRAWN = ["--sample-steps", "1", "--prompts", "a | cat --n dog"]
TOKEN = "hf_secretsecret"


class Hub(ThreadingHTTPServer):
    """Keeps what is committed; answers 403 to everything where `is_closed`, and to commits in `refused`, by number."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.is_closed = False
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.commits: list[list[str]] = []
        self.refused: set[int] = set()
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
            lines = [json.loads(line) for line in body.splitlines()]
            self.server.commits.append([line["value"]["path"] for line in lines if line["key"] == "file"])
            if len(self.server.commits) - 1 in self.server.refused:
                return self.answer({"error": "not now"}, 403)
            for line in lines:
                if line["key"] == "deletedFile":
                    del self.server.files[line["value"]["path"]]
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"commitUrl": f"{place}/commit/1", "commitOid": "1", "success": True})
        return self.answer({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            files = [{"type": "file", "path": name, "oid": "0", "size": 1} for name in self.server.files]
            return self.answer(files)
        return self.answer({"siblings": [], "sha": "0", "id": "me/dog"})

    def answer(self, values: Any, status: int = 200) -> None:
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
        drawn = [] if "--no-before-after" in options else DRAWN
        code = main([*words, *WORDS, *drawn, "--output", str(folder / "out"), *options])
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


def test_the_plan_tells_what_goes_where(hub: Hub, base: Path, tmp_path: Path) -> None:
    _, printed = run(base, tmp_path, "--dry-run", "--upload", "me/dog")
    assert "uploaded to me/dog (private if new): at the end the LoRA, its page and samples" in printed
    options = ["--upload", "me/dog", "--upload-folder", "loras", "--upload-public", "--upload-saves", "--upload-states"]
    plan = " ".join(run(base, tmp_path, "--dry-run", *options)[1].split())
    assert (
        "uploaded to me/dog, loras (public if new): at the end the LoRA, its page and samples; on the way each" in plan
    )
    assert "states with run.toml, which names folders" in plan
    assert "uploaded to" not in run(base, tmp_path, "--dry-run")[1]


SAVES = ["--save-every-steps", "1", "--steps", "3", "--no-before-after"]
LORAS = ["step-00000001.safetensors", "step-00000002.safetensors"]


def test_each_save_is_uploaded_in_its_order_and_the_page_at_the_end(hub: Hub, base: Path, tmp_path: Path) -> None:
    keep = ["--keep-last-steps", "1", "--upload-folder", "loras/dog"]
    assert run(base, tmp_path, "--upload", "me/dog", "--upload-saves", *SAVES, *keep)[0] == 0
    last = ["loras/dog/README.md", "loras/dog/last.safetensors"]
    assert [sorted(commit) for commit in hub.commits] == [*([f"loras/dog/{name}"] for name in LORAS), last]
    assert not (tmp_path / "out" / ".uploads").exists()
    there = {name: hub.files[f"loras/dog/{name}"] for name in LORAS}
    assert there[LORAS[1]] == (tmp_path / "out" / LORAS[1]).read_bytes() != there[LORAS[0]]


def test_a_save_that_could_not_be_uploaded_is_tried_again_at_the_end(
    hub: Hub, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refused = {0}
    assert run(base, tmp_path, "--upload", "me/dog", "--upload-saves", *SAVES)[0] == 0
    assert [sorted(commit) for commit in hub.commits[:3]] == [[LORAS[0]], [LORAS[1]], [LORAS[0]]]
    assert {*LORAS, "last.safetensors", "README.md"} == set(hub.files)
    error = capsys.readouterr().err
    assert f"{LORAS[0]}: --upload me/dog failed: " in error and "tried again when the run is over" in error
    assert "not in me/dog" not in error


def test_what_is_not_there_in_the_end_is_told(
    hub: Hub, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.is_closed = True
    assert run(base, tmp_path, "--upload", "me/dog", "--upload-saves", *SAVES)[0] == 0
    assert f"not in me/dog: {', '.join(LORAS)}; upload them" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "out" / "last.safetensors").is_file() and not (tmp_path / "out" / ".uploads").exists()


def test_a_run_goes_on_elsewhere_from_the_states_that_were_uploaded(
    hub: Hub, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    upload = ["--upload", "me/dog", "--upload-states", "--state-every-steps", "1", "--no-before-after"]
    assert run(base, tmp_path, *upload, "--steps", "3")[0] == 0
    whole = (tmp_path / "out" / "last.safetensors").read_bytes()
    states = {name.split("/")[1] for name in hub.files if name.startswith("states/")}
    assert states == {"step-00000003"}, "older states were not removed from the repository"
    hub.files.clear()
    assert run(base, tmp_path, *upload, "--steps", "2", "--overwrite")[0] == 0
    for name, content in hub.files.items():
        (tmp_path / "elsewhere" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "elsewhere" / name).write_bytes(content)
    assert main(["train", "--resume", str(tmp_path / "elsewhere"), "--steps", "3"]) == 0
    assert (tmp_path / "elsewhere" / "last.safetensors").read_bytes() == whole


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
        (["--upload-saves", "--upload-states"], "upload_saves and upload_states are for upload"),
        (["--upload", "me/dog", "--upload-folder", "../dog"], "is no folder in a repository"),
    ],
)
def test_mistakes_are_told_before_training(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    options: list[str], expected: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert run(base, tmp_path, "--dry-run", *options)[0] == 2
    assert expected in " ".join(capsys.readouterr().err.split())
