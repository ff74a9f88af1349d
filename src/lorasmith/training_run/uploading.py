"""What of a run is uploaded to the hub while it goes on, as its options say."""

from pathlib import Path

from lorasmith.config import SaveSection
from lorasmith.hub import Target
from lorasmith.output_folder import RUN_FILE, OutputFolder
from lorasmith.uploads import Uploads


def target_of(save: SaveSection) -> Target:
    """Return where the run's files go on the hub."""
    assert save.upload is not None
    return Target(save.upload, save.upload_public, save.upload_folder or "")


def upload_lines(save: SaveSection) -> list[str]:
    """Say for the plan what is uploaded, and where to."""
    if save.upload is None:
        return []
    parts = [
        "at the end the LoRA, its page and samples",
        *(["on the way each LoRA that is saved"] if save.upload_saves else []),
        *(["states with run.toml, which names folders of this computer"] if save.upload_states else []),
    ]
    place = f"{save.upload}, {save.upload_folder}" if save.upload_folder else save.upload
    return [f"uploaded to {place} ({'public' if save.upload_public else 'private'} if new): {'; '.join(parts)}"]


class RunUploads:
    """Uploads LoRAs and states as they are saved, those that are wanted. Close it, or files that wait stay."""

    def __init__(self, save: SaveSection, folder: OutputFolder) -> None:
        self._save, self._folder = save, folder
        wants_any = save.upload is not None and (save.upload_saves or save.upload_states)
        self._uploads = Uploads(target_of(save), folder.path / ".uploads") if wants_any else None

    def take_lora(self, path: Path) -> None:
        """Upload a LoRA that was saved."""
        if self._uploads is not None and self._save.upload_saves:
            self._uploads.add(path.name, {path.name: path})

    def take_states(self, newest: Path) -> None:
        """Upload the states that are kept, with the run's options; older ones are removed from the repository."""
        if self._uploads is not None and self._save.upload_states:
            files = {"states": self._folder.states, RUN_FILE: self._folder.run_file}
            self._uploads.add(f"states/{newest.name}", files, mirrored="states/*")

    def finish(self) -> None:
        """Wait until all is uploaded, and tell what could not be."""
        if self._uploads is not None:
            self._uploads.finish()

    def close(self) -> None:
        """Drop what waits."""
        if self._uploads is not None:
            self._uploads.close()
