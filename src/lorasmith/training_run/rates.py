"""How fast a run learns: its optimizer, the learning rate of each part, and what both make of the schedule."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch

from lorasmith.config import NetworkSection, OptimizerSection, TrainConfig
from lorasmith.errors import UserError
from lorasmith.lr import Schedule, chart
from lorasmith.network import PartRate
from lorasmith.optimizers.base import Choice, choose

PART_TITLES = {"text_encoder": "text encoder", "unet": "U-Net"}


@dataclass(frozen=True)
class Rates:
    """The optimizer of a run, the rate that is given or usual for it, and what follows for each part."""

    optimizer: Choice
    learning_rate: float
    parts: dict[str, PartRate]


def decide_rates(cfg: TrainConfig, parts: Collection[str], schedule: Schedule, device: torch.device) -> Rates:
    """Try out the optimizer and decide the rates of the parts that get adapters.

    Raises:
        UserError: there is no such optimizer, or it does not go with the arguments, rates or schedule.
    """
    options = cfg.optimizer
    optimizer = choose(options.optimizer, options.optimizer_args, device=device)
    learning_rate = optimizer.learning_rate if options.learning_rate is None else options.learning_rate
    all_parts = {
        "text_encoder": PartRate(
            _first(options.text_encoder_lr, learning_rate),
            _first(options.text_encoder_lora_plus_ratio, options.lora_plus_ratio, 1.0),
        ),
        "unet": PartRate(
            _first(options.unet_lr, learning_rate), _first(options.unet_lora_plus_ratio, options.lora_plus_ratio, 1.0)
        ),
    }
    rates = Rates(optimizer, learning_rate, {part: rate for part, rate in all_parts.items() if part in parts})
    _check(rates, options, schedule, has_average=cfg.training.ema_decay is not None)
    if optimizer.averages:
        _check_limits(cfg.network, optimizer.name)
    return rates


def _check_limits(network: NetworkSection, name: str) -> None:
    """Refuse what is done to the weights after a step where an optimizer makes these anew from others of its own.

    A limit would be held by the weights that are trained, while the others run away, and with them what is saved.
    """
    limits = [option for option in ("max_norm", "product_decay") if getattr(network, option)]
    if limits:
        raise UserError(
            f"--optimizer {name} trains on other weights than it saves, so {' and '.join(limits)} would hold back "
            f"others than are saved; leave {'it' if len(limits) == 1 else 'them'} out, or take another optimizer."
        )


def _check(rates: Rates, options: OptimizerSection, schedule: Schedule, *, has_average: bool) -> None:
    name = rates.optimizer.name
    learned = [rate for rate in rates.parts.values() if rate.rate]
    if not learned:
        raise UserError("every part that is to be trained has a learning rate of 0; give one of them another.")
    given = {rate.rate for part, rate in rates.parts.items() if part != "unet"}
    if "unet" in rates.parts:
        given |= {rates.parts["unet"].rate * factor for factor in options.block_lr or [1]}
    has_several = len(given - {0}) > 1 or any(rate.up_ratio != 1 for rate in learned)
    if has_several and (rates.optimizer.finds_rate or rates.optimizer.owns_rate):
        raise UserError(
            f"--optimizer {name} makes one learning rate for all that is trained, so unet_lr, text_encoder_lr, "
            "lora_plus_ratio and block_lr cannot differ; leave them out (0 for what is to stay as it is works)."
        )
    is_even = schedule.name == "constant" and not (schedule.warmup_steps and rates.optimizer.owns_rate)
    if rates.optimizer.owns_schedule and not is_even:
        raise UserError(
            f"--optimizer {name} {rates.optimizer.owns_schedule}, but lr_schedule = {schedule.name} with "
            f"{schedule.warmup_steps} steps of warm-up is given; leave that out, or take another optimizer."
        )
    if rates.optimizer.averages and has_average:
        raise UserError(
            f"--optimizer {name} saves an average of the weights by itself, and ema_decay would average once more; "
            "leave out one of them."
        )


def rate_lines(rates: Rates, options: OptimizerSection, schedule: Schedule) -> list[str]:
    """Say for the plan how fast what is learned, and draw the schedule where it changes."""
    optimizer = rates.optimizer
    arguments = f" ({', '.join(options.optimizer_args)})" if options.optimizer_args else ""
    parts = ", ".join(_part_line(PART_TITLES[part], rate) for part, rate in rates.parts.items())
    lines = [
        f"{parts}, {optimizer.name}{arguments}, {schedule.name} after {schedule.warmup_steps} steps of warm-up",
        *optimizer.notes,
    ]
    if slowed := [factor for factor in options.block_lr if factor not in (0, 1)]:
        factors = " to ".join(f"{factor:g}" for factor in sorted({min(slowed), max(slowed)}))
        lines.append(f"{len(slowed)} of the U-Net's 25 blocks at {factors} times its rate")
    if optimizer.finds_rate:
        lines.append(f"{optimizer.name} finds its own learning rate, and multiplies it by this one, usually 1")
    if optimizer.owns_rate:
        lines.append(f"{optimizer.name} makes its own learning rate (relative_step); this one has no part in it")
    return lines + (chart(schedule) if schedule.name != "constant" or schedule.warmup_steps else [])


def rate_curves(
    groups: Iterable[tuple[str, float]], schedule: Schedule, steps: int
) -> dict[str, list[tuple[int, float]]]:
    """Return the learning rate after each of a run's steps, by what learns at it; (step, rate), steps from 1.

    Args:
        groups: the optimizer's, each by its name and its rate before the schedule; those of one rate are one curve.
    """
    names: dict[float, dict[str, None]] = {}
    for name, rate in groups:
        part, _, half = name.partition("/")
        title = PART_TITLES.get(part, part) + (" (half that begins at zero)" if half == "up" else "")
        names.setdefault(rate, {})[title] = None
    shape = [schedule.multiplier(step) for step in range(steps)]
    return {
        f"{', '.join(own)}: {rate:g}": [(step, rate * share) for step, share in enumerate(shape, 1)]
        for rate, own in names.items()
    }


def average_lines(decay: float | None) -> list[str]:
    """Say for the plan that what is saved is an average, if it is."""
    if decay is None:
        return []
    return [
        f"saved, drawn and validated is the moving average of the LoRA over some {1 / (1 - decay):.4g} steps "
        f"(ema_decay {decay:g}), which takes as much memory again as the LoRA; training goes on without it"
    ]


def _part_line(title: str, rate: PartRate) -> str:
    if not rate.rate:
        return f"{title} 0 (it stays as it is)"
    faster = "" if rate.up_ratio == 1 else f" ({rate.up_ratio:g} times that for the half that begins at zero)"
    return f"{title} {rate.rate:g}{faster}"


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
