"""Pictures from prompts: guidance and a denoising loop over diffusers' schedulers, set up from the model's schedule.

A picture depends on its prompt, seed and settings, not on the pictures drawn along with it: its noise comes from its
own generator on the CPU, and so does what some samplers draw while they run.
"""

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lorasmith.errors import UserError
from lorasmith.models.base import Conditioning, LatentDiffusion

# Timesteps and end points are as Stable Diffusion's own repositories and WebUI have them.
_SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),  # arXiv:2211.01095
    "ddim": (  # arXiv:2010.02502, without noise (eta = 0)
        "DDIMScheduler",
        {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"},
    ),
    "euler": ("EulerDiscreteScheduler", {}),  # arXiv:2206.00364
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),  # two evaluations of the model a step, as the next two
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "dpmsolver": (  # arXiv:2206.00927
        "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    ),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "unipc": ("UniPCMultistepScheduler", {}),  # arXiv:2302.04867
}  # fmt: skip
_OTHER_NAMES = {
    "dpmsolver++": "dpm++", "plms": "pndm", "k_lms": "lms", "k_euler": "euler", "k_euler_a": "euler_a",
    "k_heun": "heun", "k_dpm_2": "dpm_2", "k_dpm_2_a": "dpm_2_a",
}  # fmt: skip
_ALMOST_NO_SIGNAL = 2**-24  # of alpha_bar, as diffusers takes it where none would divide by 0


def sampler_named(name: str) -> str:
    """Return our name of a sampler that is given by any of its usual names.

    Raises:
        UserError: there is none of that name.
    """
    plain = name.lower()
    if plain not in _SAMPLERS and plain not in _OTHER_NAMES:
        near = difflib.get_close_matches(plain, [*_SAMPLERS, *_OTHER_NAMES], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"there is no sampler named {name!r}; {hint}There are: {', '.join(_SAMPLERS)}.")
    return _OTHER_NAMES.get(plain, plain)


@torch.no_grad()
def generate(
    model: LatentDiffusion,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    size: tuple[int, int],
    negative: str = "",
    steps: int = 20,
    guidance: float = 7.5,
    sampler: str = "dpm++",
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """Draw one picture for each prompt.

    Args:
        seeds: one for each prompt.
        size: pixels (w, h), multiples of the model's latent factor.
        guidance: classifier-free guidance scale (arXiv:2207.12598); at 1 or below `negative` has no part.
        sampler: a name that `sampler_named` knows.
        batch_size: pictures drawn at once; costs memory, changes nothing but rounding.
        progress: called with (steps done, steps in all) over all batches.

    Raises:
        UserError: no such sampler, or a size or a number of steps that cannot be.
    """
    assert len(prompts) == len(seeds), f"{len(prompts)} prompts and {len(seeds)} seeds"
    _check(model, size, steps)
    sampler = sampler_named(sampler)
    pictures: list[Image.Image] = []
    num_batches = -(-len(prompts) // batch_size)
    for number in range(num_batches):
        part = slice(number * batch_size, (number + 1) * batch_size)
        cond = _conditioning(model, prompts[part], negative if guidance > 1 else None)
        tick = (
            (lambda share, number=number: progress(int((number + share) * steps), num_batches * steps))
            if progress
            else None
        )
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        noise, scheduler = _noise(model, generators, size), make_scheduler(model, sampler)
        latents = _denoise(model, cond, noise, scheduler, steps, guidance, generators, tick)
        pictures += [to_picture(model.decode(latent[None])[0]) for latent in latents]
    return pictures


def make_scheduler(model: LatentDiffusion, sampler: str) -> Any:
    """Return the diffusers scheduler of that name for the model's betas and what it predicts."""
    import diffusers  # takes seconds, and a run's plan is printed without it

    name, options = _SAMPLERS[sampler]
    kind = getattr(diffusers, name)
    schedule = model.schedule
    if schedule.ends_in_noise:  # then drawing begins there (arXiv:2305.08891, section 3.3)
        options = {**options, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    known = inspect.signature(kind).parameters
    try:
        scheduler = kind(
            num_train_timesteps=len(schedule.betas),
            trained_betas=schedule.betas.tolist(),
            prediction_type=schedule.prediction,
            **{name: value for name, value in options.items() if name in known},
        )
    except ImportError as error:
        raise UserError(f"the sampler {sampler} needs the Python package scipy; install it with pip.") from error
    if schedule.ends_in_noise and "rescale_betas_zero_snr" not in known:
        scheduler.alphas_cumprod[-1] = _ALMOST_NO_SIGNAL
    return scheduler


def to_picture(pixels: Tensor) -> Image.Image:
    """Return (3, H, W) in [-1, 1] as an RGB picture."""
    levels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def _check(model: LatentDiffusion, size: tuple[int, int], steps: int) -> None:
    if any(side < 1 or side % model.latent_factor for side in size):
        raise UserError(
            f"pictures of {size[0]}x{size[1]} cannot be drawn; both sides must be multiples of {model.latent_factor}."
        )
    if not 1 <= steps <= len(model.schedule.betas):
        raise UserError(f"{steps} sampler steps; give 1 to {len(model.schedule.betas)}, commonly 20 to 50.")


def _conditioning(model: LatentDiffusion, prompts: Sequence[str], negative: str | None) -> Conditioning:
    """Return the prompts' conditioning, (B, ...), with that of `negative` repeated in front of it: (2B, ...)."""
    positive = model.encode_text(list(prompts))
    if negative is None:
        return positive
    unconditional = model.encode_text([negative])
    return {
        name: torch.cat([unconditional[name].expand_as(value), value])  # (2B, ...)
        for name, value in positive.items()
    }


def _noise(model: LatentDiffusion, generators: Sequence[torch.Generator], size: tuple[int, int]) -> Tensor:
    """Return (B, C, H/f, W/f) standard normal noise on the CPU, each sample from its own generator."""
    width, height = (side // model.latent_factor for side in size)
    shape = (model.latent_channels, height, width)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def _denoise(
    model: LatentDiffusion,
    cond: Conditioning,
    noise: Tensor,
    scheduler: Any,
    steps: int,
    guidance: float,
    generators: list[torch.Generator],
    tick: Callable[[float], None] | None,
) -> Tensor:
    """Return clean latents (B, C, h, w), fp32, on the model's device."""
    scheduler.set_timesteps(steps, device=model.device)
    latents = noise.to(model.device) * scheduler.init_noise_sigma
    draws = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for done, t in enumerate(scheduler.timesteps, start=1):
        x_t = scheduler.scale_model_input(latents, t)
        latents = scheduler.step(_predict(model, x_t, t, cond, guidance), t, latents, **draws).prev_sample
        if tick:
            tick(done / len(scheduler.timesteps))
    return latents


def _predict(model: LatentDiffusion, x_t: Tensor, t: Tensor, cond: Conditioning, guidance: float) -> Tensor:
    """Return the guided prediction, (B, C, h, w), fp32."""
    num_conditions = len(next(iter(cond.values())))
    inputs = torch.cat([x_t] * (num_conditions // len(x_t)))
    prediction = model(inputs, t.expand(num_conditions), cond).float()
    if num_conditions == len(x_t):
        return prediction
    unconditional, conditional = prediction.chunk(2)
    return unconditional + guidance * (conditional - unconditional)
