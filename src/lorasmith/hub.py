"""Uploads a folder to the Hugging Face hub."""

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


def upload(folder: Path, repository: str, *, is_public: bool) -> str:
    """Upload all of a folder into a repository, made if there is none; return its address.

    Raises:
        UserError: it failed, for whatever reason; names the command to try again.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        place = api.create_repo(repository, private=not is_public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload a LoRA")
    except Exception as error:  # theirs are of many classes, and those of the network
        private = "" if is_public else " --private"
        raise UserError(
            f"--upload {repository} failed: {str(error).strip().partition(chr(10))[0] or type(error).__name__}. "
            f"To try again: hf upload {repository} {quoted(folder)} .{private}"
        ) from error
    return str(place)
