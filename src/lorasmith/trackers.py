"""Logs for other programs to show: TensorBoard's files, Weights & Biases and trackio.

The last two go through accelerate's trackers, which know their calls; TensorBoard's own writer is used as it is, for
accelerate's flushes after every number.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lorasmith.errors import UserError


def require_trackers(names: Sequence[str]) -> None:
    """Check that the trackers' packages are installed.

    Raises:
        UserError: one is not.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f'--trackers {name} needs the Python package {name}: pip install "lorasmith[{name}]", or leave it out.'
            )


class Trackers:
    """Tells numbers and pictures of a run to all that were asked for.

    Args:
        names: of accelerate's trackers, `wandb` and `trackio`.
        board: folder for TensorBoard's files; None: none are written.
        done: steps done when the run starts; what TensorBoard shows of later ones belongs to a course gone back on.
        run: its project, name and id, the same for a resumed run.
        options: plain values to show beside it.

    Raises:
        UserError: a tracker cannot be started.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        board: Path | None,
        folder: Path,
        done: int,
        project: str,
        run_name: str,
        run_id: str,
        options: Mapping[str, Any],
    ) -> None:
        self._board: Any = None
        self._trackers: list[Any] = []
        if board is not None:
            from torch.utils.tensorboard import SummaryWriter  # takes a second, and not everyone wants it

            self._board = SummaryWriter(str(board), purge_step=done + 1)
        for name in names:
            try:
                tracker = _start(name, folder, project, run_name, run_id, options)
            except Exception as error:  # theirs are of many classes
                raise UserError(
                    f"--trackers {name} cannot be started: {error}. To log without its server, set "
                    "WANDB_MODE=offline; or leave it out."
                    if name == "wandb"
                    else f"--trackers {name} cannot be started: {error}."
                ) from error
            self._trackers.append(tracker)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Tell numbers by name, such as `loss` and `lr/unet`, after `step` steps."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        for tracker in self._trackers:
            tracker.log(dict(values), step=step)

    def show(self, pictures: Sequence[Image.Image], step: int) -> None:
        """Show sample pictures, where accelerate's tracker can."""
        for tracker in self._trackers:
            if tracker.name == "wandb":
                tracker.log_images({"samples": list(pictures)}, step=step)

    def close(self) -> None:
        """Write what is left."""
        for tracker in self._trackers:
            tracker.finish()
        if self._board is not None:
            self._board.close()


def _start(name: str, folder: Path, project: str, run_name: str, run_id: str, options: Mapping[str, Any]) -> Any:
    from accelerate import PartialState, tracking  # takes a second, and not everyone wants it

    PartialState(cpu=True)  # what they write their own messages by; nothing is computed with it

    tracker: Any
    if name == "trackio":
        tracker = tracking.TrackioTracker(project, name=run_name, resume="allow", config=dict(options))
    else:
        import wandb  # pyright: ignore[reportMissingImports]  # an extra

        # What else it would send: what is printed, the command line with its paths, the git repository, the code.
        silent = wandb.Settings(console="off", disable_git=True, disable_code=True, x_disable_meta=True)
        folder.mkdir(parents=True, exist_ok=True)
        tracker = tracking.WandBTracker(
            project, name=run_name, id=run_id, resume="allow", config=dict(options), dir=str(folder), settings=silent
        )
    tracker.start()
    return tracker
