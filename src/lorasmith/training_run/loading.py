"""The parts that a run trains with: the base model, the network on it, the batches."""

import torch

from lorasmith import merging, model_families
from lorasmith.cache_folder import Store
from lorasmith.checkpoint import open_checkpoint
from lorasmith.config import TrainConfig
from lorasmith.data.dataset import Dataset
from lorasmith.devices import DTYPES
from lorasmith.foreign_network import AnyNetwork, ForeignNetwork, Request
from lorasmith.formats.dialects import read_any
from lorasmith.models.base import LatentDiffusion
from lorasmith.network import Network
from lorasmith.processes import Processes
from lorasmith.training_run.encoding import posteriors
from lorasmith.training_run.objective import noise_of, timesteps_of
from lorasmith.training_run.preparation import Preparation


def load_model(cfg: TrainConfig, ready: Preparation, device: torch.device) -> LatentDiffusion:
    """Load the base model with another VAE, LoRAs folded in and the options that are given.

    One that processes share comes to the CPU: no device need have room for all of it.
    """
    with open_checkpoint(cfg.model.base) as checkpoint:
        model = model_families.load(
            checkpoint,
            dtype=DTYPES[ready.precision],
            device=torch.device("cpu") if ready.is_base_shared else device,
            vae=cfg.model.vae,
            prediction=ready.facts.prediction,
            clip_skip=cfg.model.clip_skip,
            ema=cfg.model.ema,
            max_token_length=cfg.data.max_token_length,
            weighted_captions=cfg.data.weighted_captions,
            embeddings=ready.words.embeddings,
        )
    merging.fold(model, ready.base_loras.additions)
    return model


def build_network(cfg: TrainConfig, ready: Preparation, model: LatentDiffusion) -> AnyNetwork:
    """Return the network to train, attached: new, or from the given weights with all of them used."""
    if ready.foreign is not None:
        return _foreign_network(cfg, ready, ready.foreign, model)
    network = _own_network(cfg, ready, model)
    network.attach()
    return network


def _foreign_network(cfg: TrainConfig, ready: Preparation, request: Request, model: LatentDiffusion) -> ForeignNetwork:
    network = ForeignNetwork(
        request,
        model,
        ready.rates.parts,
        seed=cfg.training.seed,
        learning_rate=ready.rates.learning_rate,
        steps_per_epoch=ready.plan.steps_per_epoch,
        max_norm=cfg.network.max_norm,
    )
    if cfg.training.gradient_checkpointing:
        network.checkpoint_gradients()
    if cfg.loss.diff_output_preservation:
        with network.switched_off():  # so that it is told now if this cannot be
            pass
    if cfg.network.weights is not None:
        with open_checkpoint(cfg.network.weights) as checkpoint:
            tensors = {name: checkpoint.tensor(name).clone() for name in checkpoint.names()}
        network.load(cfg.network.weights, tensors)
    return network


def _own_network(cfg: TrainConfig, ready: Preparation, model: LatentDiffusion) -> Network:
    layers = model.adaptable_layers()
    targets = {name: layers[name] for name in ready.rules}
    if cfg.network.weights is None:
        return Network.create(targets, list(ready.rules.values()), seed=cfg.training.seed)
    scales = {name: rule.lr_scale for name, rule in ready.rules.items()}
    return Network.load(targets, read_any(cfg.network.weights).tensors, lr_scales=scales)


def build_dataset(
    cfg: TrainConfig, ready: Preparation, model: LatentDiffusion, processes: Processes, store: Store | None
) -> Dataset:
    """Return what makes the batches of any step, with the latents that are cached in `store`."""
    return Dataset(
        ready.plan,
        ready.records,
        ready.crops,
        ready.subsets,
        seed=cfg.training.seed,
        sample_t=timesteps_of(cfg.loss).sample,
        latent_channels=model.latent_channels,
        latent_factor=model.latent_factor,
        latents={} if store is None else posteriors(cfg, ready, model, processes, store),
        prior_loss_weight=cfg.data.prior_loss_weight,
        mask_background=cfg.data.mask_background,
        mask_by_area=cfg.data.mask_loss == "area",
        noise=noise_of(cfg.loss),
    )
