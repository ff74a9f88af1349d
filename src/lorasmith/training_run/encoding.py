"""What of a run is encoded once and kept: which pictures and captions, made by which model with which options."""

from pathlib import Path

import torch

from lorasmith.cache_folder import Store
from lorasmith.caching import Encoded, LatentKey, Maker, Wanted, cached_posteriors, lasting_captions, latents_maker
from lorasmith.checkpoint import open_checkpoint
from lorasmith.config import TrainConfig
from lorasmith.data import npz_latents
from lorasmith.data.dataset import Posteriors
from lorasmith.models.base import LatentDiffusion
from lorasmith.network import part_of
from lorasmith.processes import Processes
from lorasmith.training_run.preparation import Preparation


def makers_of(cfg: TrainConfig, ready: Preparation, device: torch.device) -> dict[Encoded, Maker]:
    """Return what encodes pictures and captions: files, and options that decide the result."""
    base = _place(cfg.model.base)
    vae = base if cfg.model.vae is None else _place(cfg.model.vae)
    options = cfg.model.clip_skip, cfg.data.max_token_length, cfg.data.weighted_captions, cfg.training.attention
    embeddings = sorted(one.identity for one in ready.words.embeddings)
    loras = ready.base_loras.identities
    return {
        "latents": latents_maker(vae, device),
        "text": Maker(base, (device.type, ready.precision, *options, *embeddings, *loras)),
    }


def _place(name: str) -> Path:
    """Return where a model lies that may be given by its hub id."""
    with open_checkpoint(name) as checkpoint:
        return checkpoint.path


def wanted_latents(ready: Preparation) -> dict[LatentKey, Wanted]:
    """Return what is cached of the pictures: those that are used, and their mirror images where these are drawn."""
    wanted = {}
    for index in _used(ready):
        record = ready.records[index]
        if ready.cached[record.dataset] and index not in ready.npz.found:
            subset = ready.subsets[record.subset]
            for is_mirrored in (False, True) if subset.augmentation.flip else (False,):
                wanted[index, is_mirrored] = Wanted(record, ready.crops[index], subset, is_mirrored)
    return wanted


def _used(ready: Preparation) -> list[int]:
    plans = [ready.plan, *([ready.validation] if ready.validation else [])]
    return [index for index in range(len(ready.records)) if any(plan.repeats[index] for plan in plans)]


def kept_captions(ready: Preparation) -> set[str]:
    """Return the captions that come again, so that their embeddings are worth keeping."""
    return lasting_captions((ready.records[index] for index in _used(ready)), ready.subsets)


def posteriors(
    cfg: TrainConfig, ready: Preparation, model: LatentDiffusion, processes: Processes, store: Store
) -> Posteriors:
    """Return the latents of all pictures of cached data sets that this process may need."""
    wanted = {key: one for key, one in wanted_latents(ready).items() if ready.plan.reads(key[0], processes.index)}
    is_shown = cfg.log.progress and processes.is_main
    encoded = cached_posteriors(model, wanted, store, processes, workers=cfg.data.workers, is_shown=is_shown)
    return npz_latents.WithFiles(ready.npz.found, model.latent_scale, encoded) if ready.npz.found else encoded


def trains_text_encoder(ready: Preparation) -> bool:
    """Return whether the text encoder gets an adapter, so that its output changes from step to step."""
    return any(part_of(name) == "text_encoder" for name in ready.shapes)
