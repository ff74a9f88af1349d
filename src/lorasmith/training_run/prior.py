"""Regularization pictures that the base model draws before training (`prior_pictures`)."""

from typing import Any

from PIL import Image

from lorasmith import prior_pictures
from lorasmith.config import TrainConfig
from lorasmith.data.images import require_folder
from lorasmith.data.places import source_of
from lorasmith.errors import UserError
from lorasmith.processes import Processes
from lorasmith.progress import counted
from lorasmith.sampling import generate
from lorasmith.training_run.loading import load_model
from lorasmith.training_run.preparation import Preparation
from lorasmith.training_run.shared_base import share


def missing_prior_pictures(cfg: TrainConfig) -> prior_pictures.Missing | None:
    """Return the regularization pictures that the base model is to draw first; None if there are enough, or none asked.

    Raises:
        UserError: which class to draw is not said by the folders' names either.
    """
    data = cfg.data
    if not data.prior_pictures:
        return None
    assert data.regularization is not None
    assert data.images is not None
    has_folders = source_of(str(data.images)) == "folder" and data.source in ("auto", "folder", "metadata_json")
    if has_folders:
        require_folder(data.images)
    if data.regularization.exists():
        require_folder(data.regularization)
    named = prior_pictures.class_words(data.images) if has_folders else []
    classes = [data.prior_prompt] if data.prior_prompt else named
    if len(classes) != 1:
        found = f"the folders in {data.images} name {', '.join(classes)}" if classes else "no folder's name says it"
        raise UserError(
            f"prior_pictures: which class is to be drawn? {found}; give it with --prior-prompt, such as "
            '--prior-prompt "a photo of a dog" for pictures of your own dog.'
        )
    missing = prior_pictures.missing(data.regularization, classes[0], data.prior_pictures)
    return missing if missing.numbers else None


def before_drawing(cfg: TrainConfig) -> TrainConfig:
    """Return the run without regularization pictures, to find all other mistakes before an hour of drawing."""
    unset = {"regularization": None, "prior_pictures": None, "prior_prompt": None}
    return cfg.model_copy(update={"data": cfg.data.model_copy(update=unset)})


def to_draw_note(to_draw: prior_pictures.Missing) -> str:
    """Say in the plan what will be drawn first."""
    return (
        f'regularization: the base model first draws {len(to_draw.numbers)} pictures of "{to_draw.prompt}" into '
        f"{to_draw.folder}; they are kept, and not drawn again"
    )


def draw_prior_pictures(
    cfg: TrainConfig, ready: Preparation, to_draw: prior_pictures.Missing, processes: Processes
) -> None:
    """Draw this process's share of the regularization pictures that are missing."""
    model, samples = load_model(cfg, ready, processes.device), cfg.samples
    if ready.is_base_shared:
        share(model, processes)
        model.vae.to(processes.device)

    def draw_one(prompt: str, seed: int) -> Image.Image:
        settings: Any = {
            "negative": samples.negative, "steps": samples.sample_steps, "guidance": samples.guidance
        }  # fmt: skip
        with processes.in_step():
            return generate(model, [prompt], seeds=[seed], size=ready.resolution, **settings)[0]

    is_shown = cfg.log.progress and processes.is_main
    numbers = to_draw.numbers[processes.index :: processes.count]
    most = processes.most(len(numbers))
    shown = counted(numbers, len(numbers), "drawing regularization pictures", is_shown=is_shown)
    prior_pictures.draw(to_draw, shown, draw_one, seed=cfg.training.seed)
    if len(numbers) < most:
        draw_one(to_draw.prompt, 0)  # its part in the others' last picture
