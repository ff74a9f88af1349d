"""Pictures from prompts: guidance and a denoising loop over diffusers' schedulers, set up from the model's schedule.

A picture depends on its prompt, seed and settings, not on the pictures drawn along with it: its noise comes from its
own generator on the CPU, and so does what some samplers draw while they run.
"""

import difflib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from lorasmith.errors import UserError
from lorasmith.models.base import Conditioning, ControlNet, LatentDiffusion, ModelFacts, Residuals
from lorasmith.perturbed_attention import perturbed
from lorasmith.prompts import Prompt, check_plain

Value = TypeVar("Value")

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
SIGMAS = {  # how noise is spread over the steps: diffusers' option for it
    "normal": "", "karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas"
}  # fmt: skip
_WITH_SIGMAS = ("dpm++", "euler", "heun", "dpm_2", "dpmsolver", "dpmsingle", "unipc", "lms")
NUM_TIMESTEPS = 1000
_LMS_ORDER = 4  # of k-diffusion and diffusers
_ALMOST_NO_SIGNAL = 2**-24  # of alpha_bar, as diffusers takes it where none would divide by 0


def sampler_named(name: str) -> str:
    """Return our name of a sampler that is given by any of its usual names.

    Raises:
        UserError: there is none of that name, or the package that it needs is missing.
    """
    plain = name.lower()
    if plain not in _SAMPLERS and plain not in _OTHER_NAMES:
        near = difflib.get_close_matches(plain, [*_SAMPLERS, *_OTHER_NAMES], n=1)
        hint = f"did you mean {near[0]}? There" if near else "there"
        raise UserError(f"there is no sampler named {name!r}; {hint} are: {', '.join(_SAMPLERS)}.")
    found = _OTHER_NAMES.get(plain, plain)
    if found == "lms":
        _check_scipy("the sampler lms")
    return found


def _check_scipy(what: str) -> None:
    if importlib.util.find_spec("scipy") is None:
        raise UserError(f"{what} needs the package scipy: pip install 'lorasmith[samplers]', or take another.")


@dataclass(frozen=True)
class Drawing:
    """One picture to draw: what it shows, its `size` in pixels (w, h), and how it is drawn, as for `generate`."""

    prompt: str
    negative: str
    size: tuple[int, int]
    seed: int
    steps: int
    guidance: float
    sampler: str

    def asked(self, prompt: Prompt) -> "Drawing":
        """Return what a prompt asks for, which is as here where it does not say.

        Raises:
            UserError: it asks for a sampler that there is not, or for what only `lorasmith generate` can do.
        """
        check_plain(prompt)
        return self.shared_settings(prompt)

    def shared_settings(self, prompt: Prompt) -> "Drawing":
        """Return the same of what all commands can draw with, whatever else the prompt asks for."""
        width, height = self.size
        return Drawing(
            prompt=prompt.text,
            negative=_or(prompt.negative, self.negative),
            size=(_or(prompt.width, width), _or(prompt.height, height)),
            seed=prompt.seeds[0] if prompt.seeds else self.seed,
            steps=_or(prompt.steps, self.steps),
            guidance=_or(prompt.guidance, self.guidance),
            sampler=sampler_named(_or(prompt.sampler, self.sampler)),
        )


def _or(value: Value | None, otherwise: Value) -> Value:
    return otherwise if value is None else value


@dataclass(frozen=True)
class Wish:
    """What one picture is to show.

    Args:
        parts: conditionings of one prompt each, (1, ...), with their weights; several are composed (arXiv:2206.01714).
        negative: what guidance leads away from, (1, ...); None: there is one part, which is drawn without guidance.
        avoided: what is led away from besides, as seen from `negative`, (1, ...), with the scale of that.
    """

    parts: Sequence[tuple[Conditioning, float]]
    negative: Conditioning | None
    avoided: tuple[Conditioning, float] | None = None


@dataclass(frozen=True)
class Beginning:
    """The picture that is drawn on from, instead of noise alone (SDEdit, arXiv:2108.01073).

    Args:
        posterior: mean and std of its latents, each (1, C, h, w), or (B, C, h, w) with one for each picture; without
            a std they are the mean.
        denoise: share of the steps that are drawn, in (0, 1]; the more, the less is left of the picture.
        mask: (1, 1, h, w), 1 where is drawn, 0 where the picture stays, shares between; None: 1 everywhere.
    """

    posterior: tuple[Tensor, Tensor | None]
    denoise: float
    mask: Tensor | None = None


@dataclass(frozen=True)
class Control:
    """A ControlNet that takes part in drawing; what several add is summed.

    Args:
        picture: what it is shown, (1, 3, H, W) in [0, 1], of the size of the pictures.
        weight: what all that it adds is multiplied by.
        share: of the steps, from where to where it takes part.
    """

    net: ControlNet
    picture: Tensor
    weight: float
    share: tuple[float, float]


@dataclass(frozen=True)
class Inpainting:
    """What an inpainting model is shown beside the latents.

    Args:
        mask: (1, 1, h, w), 1 where is drawn, 0 where the picture stays.
        posterior: mean and std of the latents of the picture, which is grey where is drawn, each (1, C, h, w).
    """

    mask: Tensor
    posterior: tuple[Tensor, Tensor]


def is_in_share(share: tuple[float, float], done: int, steps: int) -> bool:
    """Return whether the step after those done lies in a share of all steps, from where to where."""
    return share[0] <= done / steps and (done + 1) / steps <= share[1]


@dataclass(frozen=True)
class Perturbation:
    """Guidance away from what the model predicts without some of its self-attentions (arXiv:2403.17377).

    Args:
        layers: these self-attentions, by the names of the denoiser's modules.
        scale: of the difference that is added to what is predicted.
    """

    layers: Sequence[str]
    scale: float


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
    check_settings(model, size, steps, sampler)
    pictures: list[Image.Image] = []
    num_batches = -(-len(prompts) // batch_size)
    for number in range(num_batches):
        part = slice(number * batch_size, (number + 1) * batch_size)
        tick = (
            (lambda share, number=number: progress(int((number + share) * steps), num_batches * steps))
            if progress
            else None
        )
        wishes = _wishes(model, prompts[part], negative if guidance > 1 else None)
        pictures += draw(
            model, wishes, seeds=seeds[part], size=size, steps=steps, guidance=guidance, sampler=sampler, tick=tick
        )
    return pictures


@torch.no_grad()
def draw(model: LatentDiffusion, wishes: Sequence[Wish], **settings: Any) -> list[Image.Image]:
    """Draw pictures at once, one for each wish, with the settings that `draw_latents` takes."""
    return decoded(model, draw_latents(model, wishes, **settings))


@torch.no_grad()
def decoded(model: LatentDiffusion, latents: Tensor) -> list[Image.Image]:
    """Return the pictures that latents, (B, C, h, w), stand for; each is decoded alone."""
    return [to_picture(model.decode(latent[None])[0]) for latent in latents]


@torch.no_grad()
def draw_latents(
    model: LatentDiffusion,
    wishes: Sequence[Wish],
    *,
    seeds: Sequence[int],
    size: tuple[int, int],
    steps: int,
    guidance: float,
    sampler: str,
    sigmas: str = "normal",
    rescale: float = 0.0,
    beginning: Beginning | None = None,
    controls: Sequence[Control] = (),
    inpainting: Inpainting | None = None,
    perturbation: Perturbation | None = None,
    tick: Callable[[float], None] | None = None,
) -> Tensor:
    """Draw the latents of pictures, (B, C, h, w); settings as for `generate`, and as `check_settings` has checked.

    Args:
        seeds: one for each wish.
        sigmas: one of `SIGMAS`.
        rescale: share of the guided prediction that gets the conditional one's deviation back (arXiv:2305.08891).
        beginning: None: noise alone.
        controls: ControlNets; their shares are of the steps that are drawn.
        inpainting: None: the model is none for inpainting.
        perturbation: None: no such guidance.
        tick: called with the share of the steps that are done.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    scheduler = make_scheduler(model, sampler_named(sampler), sigmas)
    scheduler.set_timesteps(steps, device=model.device)
    latents, timesteps, blend = _start(model, scheduler, generators, size, steps, beginning)
    shown = latents[:, :0] if inpainting is None else _shown(model, inpainting, generators, size)
    known = inspect.signature(scheduler.step).parameters
    draws = {"generator": generators} if "generator" in known else {}
    rows = _rows(wishes, is_perturbed=perturbation is not None)
    for done, t in enumerate(timesteps, start=1):
        x_t = torch.cat([scheduler.scale_model_input(latents, t), shown], dim=1)
        acting = [control for control in controls if is_in_share(control.share, done - 1, len(timesteps))]
        prediction = _predict(model, x_t, t, wishes, rows, guidance, rescale, acting, perturbation)
        # lms counts the steps before those that are drawn among what it remembers
        order = {"order": min(done, _LMS_ORDER)} if "order" in known else {}
        latents = blend(scheduler.step(prediction, t, latents, **draws, **order).prev_sample, done)
        if tick:
            tick(done / len(timesteps))
    return latents


def make_scheduler(model: LatentDiffusion, sampler: str, sigmas: str = "normal") -> Any:
    """Return the diffusers scheduler of that name for the model's betas and what it predicts.

    Raises:
        UserError: the sampler cannot have these sigmas, or the package that they need is missing.
    """
    import diffusers  # takes seconds, and a run's plan is printed without it

    check_sigmas(sampler, sigmas)
    name, options = _SAMPLERS[sampler]
    kind = getattr(diffusers, name)
    schedule = model.schedule
    if SIGMAS[sigmas]:
        options = {**options, SIGMAS[sigmas]: True}
    if schedule.ends_in_noise:  # then drawing begins there (arXiv:2305.08891, section 3.3)
        options = {**options, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    known = inspect.signature(kind).parameters
    scheduler = kind(
        num_train_timesteps=len(schedule.betas),
        trained_betas=schedule.betas.tolist(),
        prediction_type=schedule.prediction,
        **{name: value for name, value in options.items() if name in known},
    )
    if schedule.ends_in_noise and "rescale_betas_zero_snr" not in known:
        scheduler.alphas_cumprod[-1] = _ALMOST_NO_SIGNAL
    return scheduler


def to_picture(pixels: Tensor) -> Image.Image:
    """Return (3, H, W) in [-1, 1] as an RGB picture."""
    levels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def check_settings(
    model: LatentDiffusion | ModelFacts, size: tuple[int, int], steps: int, sampler: str, sigmas: str = "normal"
) -> None:
    """Check what pictures are to be drawn with, before or after the model is loaded.

    Raises:
        UserError: no such sampler, not with these sigmas, or a size or a number of steps that cannot be.
    """
    check_sigmas(sampler_named(sampler), sigmas)
    if any(side < 1 or side % model.latent_factor for side in size):
        raise UserError(
            f"pictures of {size[0]}x{size[1]} cannot be drawn; both sides must be multiples of {model.latent_factor}."
        )
    if not 1 <= steps <= NUM_TIMESTEPS:
        raise UserError(f"{steps} sampler steps; give 1 to {NUM_TIMESTEPS}, commonly 20 to 50.")


def check_sigmas(sampler: str, sigmas: str) -> None:
    """Check that a sampler, by our name, can have a schedule of sigmas.

    Raises:
        UserError: it cannot, and those that can are told; or the package that they need is missing.
    """
    if sigmas != "normal" and sampler not in _WITH_SIGMAS:
        raise UserError(f"the sampler {sampler} has no {sigmas} sigmas; these have: {', '.join(_WITH_SIGMAS)}.")
    if sigmas == "beta":
        _check_scipy("--sigmas beta")


def _wishes(model: LatentDiffusion, prompts: Sequence[str], negative: str | None) -> list[Wish]:
    """Return what to draw for plain prompts, encoded together."""
    positive = model.encode_text(list(prompts))
    unconditional = None if negative is None else model.encode_text([negative])
    return [
        Wish([({name: value[number : number + 1] for name, value in positive.items()}, 1.0)], unconditional)
        for number in range(len(prompts))
    ]


def _noise(model: LatentDiffusion, generators: Sequence[torch.Generator], size: tuple[int, int]) -> Tensor:
    """Return (B, C, H/f, W/f) standard normal noise on the CPU, each sample from its own generator."""
    width, height = (side // model.latent_factor for side in size)
    shape = (model.latent_channels, height, width)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def _shown(
    model: LatentDiffusion, inpainting: Inpainting, generators: Sequence[torch.Generator], size: tuple[int, int]
) -> Tensor:
    """Return what an inpainting model takes behind the latents, (B, 1 + C, h, w)."""
    mean, std = (part.to(model.device) for part in inpainting.posterior)
    masked = mean + std * _noise(model, generators, size).to(model.device)
    return torch.cat([inpainting.mask.to(model.device).expand(len(masked), -1, -1, -1), masked], dim=1)


def _start(
    model: LatentDiffusion,
    scheduler: Any,
    generators: Sequence[torch.Generator],
    size: tuple[int, int],
    steps: int,
    beginning: Beginning | None,
) -> tuple[Tensor, Tensor, Callable[[Tensor, int], Tensor]]:
    """Return the latents to begin with, (B, C, h, w), the timesteps to go through, and what a mask makes of each step.

    That is given the latents and how many steps are done, and puts the picture, as noisy as these, where it stays.
    """
    first = 0 if beginning is None else (steps - drawn_steps(steps, beginning.denoise)) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):  # otherwise it looks where its first timestep is, which may come twice
        scheduler.set_begin_index(first)
    if beginning is None:
        noise = _noise(model, generators, size).to(model.device)
        return noise * scheduler.init_noise_sigma, scheduler.timesteps, lambda latents, done: latents
    mean, std = beginning.posterior
    kept = mean.to(model.device).expand(len(generators), -1, -1, -1)
    if std is not None:  # the first draw is the posterior's, as in diffusers' pipeline
        kept = kept + std.to(model.device) * _noise(model, generators, size).to(model.device)
    timesteps = scheduler.timesteps[first:]
    noise = _noise(model, generators, size).to(model.device)

    def blend(latents: Tensor, done: int) -> Tensor:
        if beginning.mask is None:
            return latents
        is_last, mask = done == len(timesteps), beginning.mask.to(model.device)
        own = kept if is_last else scheduler.add_noise(kept, noise, timesteps[done : done + 1].expand(len(noise)))
        return (1 - mask) * own + mask * latents

    return scheduler.add_noise(kept, noise, timesteps[:1].expand(len(noise))), timesteps, blend


def drawn_steps(steps: int, denoise: float) -> int:
    """Return how many of the steps are drawn where a picture is drawn on from."""
    return int(steps * denoise)


_NEGATIVE, _AVOIDED, _PERTURBED = -1, -2, -3
_Row = tuple[int, int]  # picture; part of its wish, one of these, or without self-attentions _PERTURBED - part


def _rows(wishes: Sequence[Wish], *, is_perturbed: bool) -> list[tuple[list[_Row], Conditioning]]:
    """Return what the model is asked in each step, in batches of conditionings of the same shapes, (n, ...).

    None is padded to another one's length, so what else is in the batch has no part in a picture.
    """
    rows: list[tuple[_Row, Conditioning]] = [
        ((number, _NEGATIVE), wish.negative) for number, wish in enumerate(wishes) if wish.negative is not None
    ]
    rows += [((number, part), cond) for number, wish in enumerate(wishes) for part, (cond, _) in enumerate(wish.parts)]
    rows += [((number, _AVOIDED), wish.avoided[0]) for number, wish in enumerate(wishes) if wish.avoided is not None]
    if is_perturbed:
        rows += [((number, _PERTURBED - part), cond) for (number, part), cond in rows if part >= 0]
    batches: dict[Any, list[tuple[_Row, Conditioning]]] = {}
    for row, cond in rows:
        kind = row[1] <= _PERTURBED, *((name, value.shape) for name, value in cond.items())
        batches.setdefault(kind, []).append((row, cond))
    return [
        ([row for row, _ in own], {name: torch.cat([cond[name] for _, cond in own]) for name in own[0][1]})
        for own in batches.values()
    ]


def _predict(
    model: LatentDiffusion,
    x_t: Tensor,
    t: Tensor,
    wishes: Sequence[Wish],
    rows: Sequence[tuple[list[_Row], Conditioning]],
    guidance: float,
    rescale: float,
    controls: Sequence[Control],
    perturbation: Perturbation | None,
) -> Tensor:
    """Return the guided prediction, (B, C, h, w), fp32."""
    layers, scale = (perturbation.layers, perturbation.scale) if perturbation else ([], 0.0)
    found: dict[_Row, Tensor] = {}
    for own, cond in rows:
        x_own, t_own = x_t[[picture for picture, _ in own]], t.expand(len(own))
        is_negative = [part in (_NEGATIVE, _AVOIDED) for _, part in own]
        added = _added(controls, x_own[:, : model.latent_channels], t_own, cond, is_negative)
        with perturbed(model.denoiser, layers if own[0][1] <= _PERTURBED else []):
            prediction = model(x_own, t_own, cond, added)
        # a copy, since CUDA graphs write what they predict next into the same place
        prediction = prediction.to(torch.float32, copy=True)
        found.update(zip(own, prediction, strict=True))
    return torch.stack([_guided(number, wish, found, guidance, rescale, scale) for number, wish in enumerate(wishes)])


def _added(
    controls: Sequence[Control], x_t: Tensor, t: Tensor, cond: Conditioning, is_negative: Sequence[bool]
) -> Residuals | None:
    """Return what the ControlNets add for each row, with their weights and summed; None: there are none."""
    total: Residuals | None = None
    for control in controls:
        weights = [0.0 if negative and control.net.is_conditional_only else control.weight for negative in is_negative]
        factors = torch.tensor(weights, device=x_t.device)[:, None, None, None]
        own = [part * factors.to(part.dtype) for part in control.net(x_t, t, cond, control.picture)]
        total = own if total is None else [one + other for one, other in zip(total, own, strict=True)]
    return total


def _guided(
    number: int, wish: Wish, found: dict[_Row, Tensor], guidance: float, rescale: float, perturbed_scale: float
) -> Tensor:
    """Return unconditional + guidance * sum of weight * (conditional - unconditional), (C, h, w).

    From which scale * (avoided - unconditional) is taken, and to which perturbed scale * sum of weight * (conditional -
    perturbed) is added, arXiv:2403.17377, equation 16.
    """
    if wish.negative is None:
        return found[number, 0] + _away_from_perturbed(number, wish, found, perturbed_scale)
    negative = found[number, _NEGATIVE]
    changes = [weight * (found[number, part] - negative) for part, (_, weight) in enumerate(wish.parts)]
    guided = negative + guidance * sum(changes[1:], changes[0])
    if wish.avoided is not None:
        guided = guided - wish.avoided[1] * (found[number, _AVOIDED] - negative)
    guided = guided + _away_from_perturbed(number, wish, found, perturbed_scale)
    if not rescale:
        return guided
    conditional = negative + sum(changes[1:], changes[0])
    return (
        rescale * guided * (conditional.std() / guided.std()) + (1 - rescale) * guided
    )  # arXiv:2305.08891, (15), (16)


def _away_from_perturbed(number: int, wish: Wish, found: dict[_Row, Tensor], scale: float) -> Tensor | float:
    if not scale:
        return 0.0
    gains = [
        weight * (found[number, part] - found[number, _PERTURBED - part]) for part, (_, weight) in enumerate(wish.parts)
    ]
    return scale * sum(gains[1:], gains[0])
