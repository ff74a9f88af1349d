"""What a run makes small, as its options say it."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from lorasmith.config import LossSection, NetworkSection, TrainConfig
from lorasmith.diffusion import Prediction, Timesteps
from lorasmith.errors import UserError
from lorasmith.losses import Objective
from lorasmith.noise import NoiseOptions


def objective_of(loss: LossSection, base_alone: Callable[[], AbstractContextManager[None]]) -> Objective:
    """Return the loss with its weightings; while `base_alone()` is entered, the model is the base model alone."""
    numbers = {
        "min_snr_gamma": loss.min_snr_gamma,
        "debiased_estimation": 1.0 if loss.debiased_estimation else None,
        "scale_v_pred_loss": 1.0 if loss.scale_v_pred_loss else None,
        "v_pred_like_loss": loss.v_pred_like_loss,
    }
    weightings = {name: number for name, number in numbers.items() if number is not None}
    return Objective(loss.loss_type, loss.huber_c, loss.huber_scale, loss.huber_schedule, weightings, base_alone)


def timesteps_of(loss: LossSection) -> Timesteps:
    """Return which timesteps are trained."""
    return Timesteps(
        loss.min_timestep, loss.max_timestep, loss.timestep_density, loss.timestep_logit_mean, loss.timestep_logit_std
    )


def noise_of(loss: LossSection) -> NoiseOptions | None:
    """Return how noise differs from independent normal numbers; None: not at all."""
    options = NoiseOptions(
        offset=loss.noise_offset or 0.0,
        has_random_offset=loss.noise_offset_random,
        offset_by_mean=loss.noise_offset_adaptive or 0.0,
        pyramid_levels=loss.pyramid_noise_levels or 0,
        pyramid_discount=loss.pyramid_noise_discount,
        perturbation=loss.input_perturbation or 0.0,
        has_random_perturbation=loss.input_perturbation_random,
    )
    return options if options.offset or options.pyramid_levels or options.perturbation else None


def check_prediction(loss: LossSection, prediction: Prediction) -> None:
    """Refuse what cannot be meant for a model that predicts this.

    Raises:
        UserError: names the options.
    """
    of_v = {"scale_v_pred_loss": loss.scale_v_pred_loss, "zero_terminal_snr": loss.zero_terminal_snr}
    wrong = [name for name, is_on in of_v.items() if is_on and prediction == "epsilon"]
    if loss.v_pred_like_loss is not None and prediction == "v_prediction":
        wrong = ["v_pred_like_loss"]
    if wrong:
        other = "v_prediction" if prediction == "epsilon" else "epsilon"
        raise UserError(
            f"{' and '.join(wrong)} {'are' if len(wrong) > 1 else 'is'} for models that predict "
            f"{_PREDICTED[other]}, but this one predicts {_PREDICTED[prediction]}; leave it out, or, if the model's "
            f"file is wrong about that, give --prediction {other}."
        )


_PREDICTED = {"epsilon": "the noise (epsilon)", "v_prediction": "v (v_prediction)"}


def _regularizers(network: NetworkSection) -> dict[str, float]:
    names = {"neuron_dropout", "rank_dropout", "module_dropout", "product_decay", "max_norm"}
    return network.model_dump(include=names, exclude_defaults=True)


def objective_line(cfg: TrainConfig) -> str:
    """Return all options of loss, noise and regularizers that are not as they are when left out."""
    changed = {**cfg.loss.model_dump(exclude_defaults=True), **_regularizers(cfg.network)}
    return ", ".join(name if value is True else f"{name} {value}" for name, value in changed.items())
