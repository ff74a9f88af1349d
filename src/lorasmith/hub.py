"""The Hugging Face hub: models come from there by their id, and a run's folder is uploaded to it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasmith.command_line import quoted
from lorasmith.errors import UserError


def check_upload(repository: str) -> None:
    """Check, without a connection, what an upload will need.

    Raises:
        UserError: no such name can be, or there is no token.
    """
    from huggingface_hub import get_token  # only uploads need it
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        if repository.count("/") != 1:
            raise HFValidationError("it has two parts")
    except HFValidationError as error:
        raise UserError(f"--upload {repository}: expected a repository such as your-name/my-lora ({error}).") from error
    if get_token() is None:
        raise UserError(
            f"--upload {repository} needs a token of the Hugging Face hub that may write: `hf auth login`, or the "
            "environment's HF_TOKEN."
        )


@dataclass(frozen=True)
class Target:
    """Where to upload to: a repository, made if there is none, and a folder in it ("": its root)."""

    repository: str
    is_public: bool
    folder: str = ""


def upload(folder: Path, target: Target) -> str:
    """Upload all of a folder; return the repository's address.

    Raises:
        UserError: it failed, for whatever reason; names the command to try again.
    """
    try:
        return send(folder, target, "Upload a LoRA")
    except UserError as error:
        private = "" if target.is_public else " --private"
        command = f"hf upload {target.repository} {quoted(folder)} {quoted(target.folder or '.')}{private}"
        raise UserError(f"{error} To try again: {command}") from error


def send(folder: Path, target: Target, message: str, *, mirrored: str | None = None) -> str:
    """Upload all of a folder as one commit; return the repository's address.

    Args:
        mirrored: a pattern (fnmatch) of names within the target; what is there under such and not in `folder` is
            removed.

    Raises:
        UserError: it failed, for whatever reason.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        place = api.create_repo(target.repository, private=not target.is_public, exist_ok=True)
        api.upload_folder(
            repo_id=target.repository,
            folder_path=folder,
            path_in_repo=target.folder or None,
            commit_message=message,
            delete_patterns=mirrored,
        )
    except Exception as error:  # theirs are of many classes, and those of the network
        reason = str(error).strip().partition(chr(10))[0] or type(error).__name__
        raise UserError(f"--upload {target.repository} failed: {reason}.") from error
    return str(place)


def model_folder(flag: str, name: str, patterns: Sequence[str], required: Sequence[Sequence[str]]) -> Path:
    """Return the folder of a model: given as such, or fetched from the hub by its id.

    Args:
        flag: the option that names it, for messages.
        patterns: the files that are fetched.
        required: what must be there: one file of each group.

    Raises:
        UserError: it is nowhere, or lacks what is required.
    """
    path = Path(os.path.expanduser(name))
    folder = path if path.is_dir() else _fetched(flag, name, path, patterns)
    missing = [" or ".join(group) for group in required if not any(any(folder.glob(one)) for one in group)]
    if missing:
        raise UserError(
            f"{flag} {name}: the folder {folder} lacks {', and '.join(missing)}; give a complete model of this kind, "
            "or get it again."
        )
    return folder


def _fetched(flag: str, name: str, path: Path, patterns: Sequence[str]) -> Path:
    is_hub_id = name.count("/") == 1 and all(name.split("/")) and name[0] not in ".~" and not path.parent.is_dir()
    if path.exists() or not is_hub_id:
        reason = "this is a file" if path.exists() else "there is no such folder"
        raise UserError(f"{flag} {name}: {reason}; give the folder of a model, or a hub id (org/name).")
    from huggingface_hub import snapshot_download  # only this way of naming a model needs it

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the hub client raises many kinds: offline, not found, gated
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{flag} {name}: no folder here, and the hub did not give it ({reason}); give the folder of a downloaded "
            "model, or check the name and the connection."
        ) from error
