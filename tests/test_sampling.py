"""Sampling against diffusers' own pipeline, and that a picture depends on nothing but its prompt and seed."""

import hashlib
import sys
from types import SimpleNamespace
from typing import Any, cast

import diffusers as diffusers_
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from torch import Tensor, nn

from lorasmith import sampling
from lorasmith.diffusion import Discrete, Prediction, stable_diffusion_schedule
from lorasmith.errors import UserError
from lorasmith.sampling import generate, make_scheduler

diffusers: Any = diffusers_  # it says nothing of what it exports
SETTINGS: dict[str, Any] = {"size": (72, 40), "steps": 4, "guidance": 4.0, "negative": "bad"}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
THEIRS = {  # the schedulers as Stable Diffusion's repositories configure them
    "dpm++": lambda **options: DPMSolverMultistepScheduler(**BETAS, steps_offset=1, **options),
    "ddim": lambda **options: DDIMScheduler(
        **BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, **options
    ),
    "euler": lambda **options: EulerDiscreteScheduler(**BETAS, steps_offset=1, **options),
}
MORE: dict[str, Any] = {
    "k_euler_a": lambda **options: diffusers.EulerAncestralDiscreteScheduler(**BETAS, **options),
    "heun": lambda **options: diffusers.HeunDiscreteScheduler(**BETAS, **options),
    "dpm_2": lambda **options: diffusers.KDPM2DiscreteScheduler(**BETAS, **options),
    "k_dpm_2_a": lambda **options: diffusers.KDPM2AncestralDiscreteScheduler(**BETAS, **options),
    "plms": lambda **options: diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1, **options),
    "ddpm": lambda **options: diffusers.DDPMScheduler(**BETAS, clip_sample=False, **options),
    "dpmsolver": lambda **options: DPMSolverMultistepScheduler(
        **BETAS, algorithm_type="dpmsolver", final_sigmas_type="sigma_min", **options
    ),
    "DPMsingle": lambda **options: diffusers.DPMSolverSinglestepScheduler(**BETAS, lower_order_final=True, **options),
    "unipc": lambda **options: diffusers.UniPCMultistepScheduler(**BETAS, **options),
}
ANY_MODEL: Any = SimpleNamespace(latent_factor=8)
THAT_DRAW = ["euler_a", "dpm_2_a", "ddpm"]  # noise while they run


class Miniature(nn.Module):
    """A latent diffusion model as `lorasmith.models.base` has it, small and random; text is a hash of the prompt."""

    latent_factor, latent_channels = 8, 4

    def __init__(self, prediction: str) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.denoiser: Any = UNet2DConditionModel(
                block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=8, cross_attention_dim=12,
                attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            )  # fmt: skip
            make_vae: Any = AutoencoderKL
            self.vae: Any = make_vae(
                block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1,
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            )  # fmt: skip
        betas = THEIRS["ddim"]().betas
        self.schedule = Discrete(betas, prediction=cast(Prediction, prediction))
        self.device = torch.device("cpu")

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        seeds = [
            int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=4).digest(), "big") for caption in captions
        ]
        return {"text": torch.stack([torch.randn(7, 12, generator=torch.Generator().manual_seed(s)) for s in seeds])}

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self.vae.config["scaling_factor"]).sample

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor], added: None = None) -> Tensor:
        assert x_t.shape[0] == t.shape[0] == cond["text"].shape[0]
        return self.denoiser(x_t, t, cond["text"]).sample


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def model(request: pytest.FixtureRequest) -> Any:
    return Miniature(request.param).eval().requires_grad_(False)


def difference(a: Any, b: Any) -> int:
    """Largest difference in grey levels."""
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


@pytest.mark.parametrize("sampler", THEIRS)
@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_the_same_picture_as_diffusers_pipeline(model: Any, sampler: str, guidance: float) -> None:
    make_pipeline: Any = StableDiffusionPipeline
    pipeline = make_pipeline(
        vae=model.vae, unet=model.denoiser, text_encoder=None, tokenizer=None, safety_checker=None,
        feature_extractor=None, scheduler=THEIRS[sampler](prediction_type=model.schedule.prediction),
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    prompts, seeds = ["a cat", "a dog"], [3, 4]
    theirs = pipeline(
        prompt_embeds=model.encode_text(prompts)["text"],
        negative_prompt_embeds=model.encode_text(["bad", "bad"])["text"],
        width=72, height=40, num_inference_steps=4, guidance_scale=guidance,
        latents=torch.cat([torch.randn(1, 4, 5, 9, generator=torch.Generator().manual_seed(s)) for s in seeds]),
    ).images  # fmt: skip
    ours = generate(model, prompts, seeds=seeds, sampler=sampler, **{**SETTINGS, "guidance": guidance})
    assert [picture.size for picture in ours] == [(72, 40)] * 2
    assert max(map(difference, ours, theirs)) <= 1
    assert difference(ours[0], ours[1]) > 5


@pytest.mark.parametrize("sampler", MORE)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_every_sampler_is_the_scheduler_of_that_name(sampler: str, prediction: str) -> None:
    """With the loop written out plainly, as each scheduler's page has it; what they draw is from the seed on."""
    model: Any = Miniature(prediction).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    scheduler = MORE[sampler](prediction_type=prediction)
    scheduler.set_timesteps(4)
    latents = torch.randn(1, 4, 5, 9, generator=generator) * scheduler.init_noise_sigma
    draws = {"generator": generator} if sampling.sampler_named(sampler) in THAT_DRAW else {}
    text = model.encode_text(["bad", "a cat"])
    for t in scheduler.timesteps:
        x = torch.cat([scheduler.scale_model_input(latents, t)] * 2)
        with torch.no_grad():
            bad, good = model(x, t.expand(2), text).chunk(2)
        latents = scheduler.step(bad + 4.0 * (good - bad), t, latents, **draws).prev_sample
    with torch.no_grad():
        theirs = sampling.to_picture(model.decode(latents)[0])
    ours = generate(model, ["a cat"], seeds=[3], sampler=sampler, **SETTINGS)[0]
    assert difference(ours, theirs) <= 1 and np.asarray(ours).std() > 0


@pytest.mark.parametrize("sampler", THAT_DRAW)
def test_what_a_sampler_draws_is_its_pictures_own(model: Any, sampler: str) -> None:
    before = torch.get_rng_state()
    together = generate(model, ["a cat", "a dog"], seeds=[3, 4], sampler=sampler, batch_size=2, **SETTINGS)
    alone = generate(model, ["a dog"], seeds=[4], sampler=sampler, **SETTINGS)
    assert difference(together[1], alone[0]) <= 1
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sampler", MORE)
def test_every_sampler_begins_in_noise_where_the_model_does(sampler: str) -> None:
    model: Any = Miniature("v_prediction").eval().requires_grad_(False)
    model.schedule = model.schedule.with_zero_terminal_snr()
    scheduler = make_scheduler(model, sampling.sampler_named(sampler))
    scheduler.set_timesteps(4)
    assert scheduler.timesteps[0] >= 998
    picture = np.asarray(generate(model, ["a cat"], seeds=[3], sampler=sampler, **SETTINGS)[0])
    assert picture.std() > 0


@pytest.mark.parametrize(
    "sampler, sigmas, said", [("k_lms", "normal", "the sampler lms needs"), ("euler", "beta", "--sigmas beta needs")]
)
def test_a_package_that_is_missing_is_told(
    sampler: str, sigmas: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UserError, match=said + r" the package scipy: pip install 'lorasmith\[samplers\]'"):
        sampling.check_settings(ANY_MODEL, (64, 64), 4, sampler, sigmas)
    sampling.check_settings(ANY_MODEL, (64, 64), 4, "dpm++", "karras")


@pytest.mark.parametrize(
    "sampler, sigmas, theirs",
    [
        ("lms", "normal", diffusers.LMSDiscreteScheduler),
        ("lms", "beta", diffusers.LMSDiscreteScheduler),
        ("euler", "beta", EulerDiscreteScheduler),
        ("dpm++", "beta", DPMSolverMultistepScheduler),
    ],
)
def test_what_needs_scipy_is_as_in_diffusers(sampler: str, sigmas: str, theirs: Any) -> None:
    pytest.importorskip("scipy")
    model: Any = Miniature("epsilon").eval().requires_grad_(False)
    scheduler = theirs(**BETAS, use_beta_sigmas=sigmas == "beta")
    scheduler.set_timesteps(4)
    latents = torch.randn(1, 4, 5, 9, generator=torch.Generator().manual_seed(3)) * scheduler.init_noise_sigma
    cond = model.encode_text(["a cat"])
    for t in scheduler.timesteps:
        with torch.no_grad():
            prediction = model(scheduler.scale_model_input(latents, t), t.expand(1), cond)
        latents = scheduler.step(prediction, t, latents).prev_sample
    with torch.no_grad():
        expected = sampling.to_picture(model.decode(latents)[0])
    settings: dict[str, Any] = {"seeds": [3], "size": (72, 40), "steps": 4, "guidance": 1.0, "sampler": sampler}
    [ours] = sampling.draw(model, [sampling.Wish([(cond, 1.0)], None)], sigmas=sigmas, **settings)
    [plain] = sampling.draw(model, [sampling.Wish([(cond, 1.0)], None)], **{**settings, "sampler": "heun"})
    assert difference(ours, expected) <= 1 and difference(ours, plain) > 1


@pytest.mark.parametrize("sampler", ["heun", "euler"])
def test_progress_counts_steps_whatever_a_sampler_does_in_one(model: Any, sampler: str) -> None:
    told: list[tuple[int, int]] = []
    progress = lambda done, total: told.append((done, total))  # noqa: E731
    generate(model, ["a", "b"], seeds=[3, 4], sampler=sampler, progress=progress, **SETTINGS)
    assert told[-1] == (8, 8) and told == sorted(told)


@pytest.mark.parametrize("sampler", THEIRS)
def test_with_zero_terminal_snr_drawing_begins_at_the_last_timestep(sampler: str) -> None:
    """The scheduler is the one that diffusers makes for such a model: corrected betas, timesteps from the end."""
    model: Any = Miniature("v_prediction").eval().requires_grad_(False)
    plain = generate(model, ["a cat"], seeds=[3], sampler=sampler, **SETTINGS)
    model.schedule = model.schedule.with_zero_terminal_snr()
    ours = make_scheduler(model, sampler)
    theirs = THEIRS[sampler](prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    assert ours.timesteps[0] == 999 and ours.timesteps.tolist() == theirs.timesteps.tolist()
    torch.testing.assert_close(ours.alphas_cumprod[:-1], theirs.alphas_cumprod[:-1], atol=1e-6, rtol=1e-3)
    assert ours.alphas_cumprod[-1] < 1e-6
    drawn = generate(model, ["a cat"], seeds=[3], sampler=sampler, **SETTINGS)
    assert difference(drawn[0], plain[0]) > 0 and np.asarray(drawn[0]).std() > 0


@pytest.mark.parametrize("sampler", THEIRS)
def test_batch_size_and_company_change_no_picture(model: Any, sampler: str) -> None:
    prompts, seeds = ["a cat", "a dog", "a bird"], [3, 4, 5]
    one_by_one = generate(model, prompts, seeds=seeds, sampler=sampler, **SETTINGS)
    together = generate(model, prompts, seeds=seeds, sampler=sampler, batch_size=2, **SETTINGS)
    alone = generate(model, prompts[2:], seeds=seeds[2:], sampler=sampler, **SETTINGS)
    assert max(map(difference, one_by_one, together)) <= 1
    assert difference(alone[0], one_by_one[2]) == 0


def test_prompt_seed_guidance_and_negative_all_matter(model: Any) -> None:
    def draw(prompt: str = "a cat", seed: int = 3, **changed: Any) -> Any:
        return generate(model, [prompt], seeds=[seed], **{**SETTINGS, **changed})[0]

    base = draw()
    assert difference(base, draw()) == 0
    assert all(difference(base, other) > 0 for other in (draw("a dog"), draw(seed=4), draw(guidance=9.0)))
    assert difference(base, draw(negative="blurred")) > 0
    assert difference(draw(guidance=1.0), draw(guidance=1.0, negative="blurred")) == 0


def test_the_global_generator_is_neither_used_nor_changed(model: Any) -> None:
    first = generate(model, ["a cat"], seeds=[3], **SETTINGS)[0]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second = generate(model, ["a cat"], seeds=[3], **SETTINGS)[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert difference(first, second) == 0


def test_progress_counts_steps_over_all_batches(model: Any) -> None:
    calls: list[tuple[int, int]] = []
    generate(
        model, ["a", "b", "c"], seeds=[1, 2, 3], batch_size=2, progress=lambda *call: calls.append(call), **SETTINGS
    )
    assert calls == [(done, 8) for done in range(1, 9)]


def test_no_graph_is_kept(model: Any) -> None:
    model.requires_grad_(True)
    seen: list[bool] = []
    handle = model.denoiser.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    generate(model, ["a"], seeds=[1], **SETTINGS)
    handle.remove()
    model.requires_grad_(False)
    assert seen == [False] * 4 and torch.is_grad_enabled()


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"size": (60, 40)}, "60x40 cannot be drawn; both sides must be multiples of 8"),
        ({"size": (64, 0)}, "64x0 cannot be drawn"),
        ({"steps": 0}, "0 sampler steps; give 1 to 1000"),
        ({"steps": 1001}, "1001 sampler steps"),
        ({"sampler": "eular"}, r"no sampler named 'eular'; did you mean euler\? There are: dpm\+\+, ddim, euler"),
    ],
)
def test_settings_that_cannot_be(model: Any, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(model, ["a"], seeds=[1], **{**SETTINGS, **changed})


def test_pixels_become_grey_levels() -> None:
    pixels = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).expand(3, 2, 5)
    picture = sampling.to_picture(pixels)
    assert picture.mode == "RGB" and picture.size == (5, 2)
    assert np.asarray(picture)[1, :, 2].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("sampler", ["euler", "euler_a"])
def test_noise_is_webuis_with_noise_from_the_cpu(sampler: str) -> None:
    """Its CPU mode written down: a generator for each picture draws the noise, and then what ancestral steps add.

    The steps are k-diffusion's (Euler's; ancestral: its `get_ancestral_step`). With 4 of them sigmas are the model's
    own, between which k-diffusion and diffusers interpolate differently.
    """
    model: Any = Miniature("epsilon").eval().requires_grad_(False)
    cond = model.encode_text(["a cat"])
    wishes = [sampling.Wish([(cond, 1.0)], None)] * 2
    ours = sampling.draw_latents(model, wishes, seeds=[3, 4], size=(72, 40), steps=4, guidance=1, sampler=sampler)
    alphas = (1 - model.schedule.betas.double()).cumprod(0)
    times = [999, 666, 333, 0]
    sigmas = [*(((1 - alphas) / alphas).sqrt()[times].tolist()), 0.0]
    for number, seed in enumerate((3, 4)):
        torch.manual_seed(seed)
        x = torch.randn(4, 5, 9)[None] * sigmas[0]
        for time, sigma, after in zip(times, sigmas, sigmas[1:], strict=False):
            noise = model(x / (sigma**2 + 1) ** 0.5, torch.tensor([time]), cond)
            up = min(after, (after**2 * (sigma**2 - after**2) / sigma**2) ** 0.5) if sampler == "euler_a" else 0.0
            x = x + noise * ((after**2 - up**2) ** 0.5 - sigma)
            if up:
                x = x + torch.randn(4, 5, 9) * up
        torch.testing.assert_close(ours[number : number + 1], x, rtol=1e-3, atol=1e-3)


class Gaussian:
    """A model of numbers that are normally distributed about `mean` with `std`, of which the best prediction is known.

    A sampler that draws nothing on the way leads noise z to mean + std * z, the more exactly, the more steps it takes.
    """

    latent_factor, latent_channels, device, denoiser = 8, 4, torch.device("cpu"), None
    mean, std = 0.7, 0.4

    def __init__(self, schedule: Discrete) -> None:
        self.schedule = schedule
        alpha_bar = torch.cumprod(1 - schedule.betas.double(), 0)
        self._log_sigmas = ((1 - alpha_bar) / alpha_bar.clamp(min=2**-24)).log() / 2

    def __call__(self, x_t: Tensor, t: Tensor, *_: Any) -> Tensor:
        below = t.double().floor().long()
        share = t.double() - below
        log_sigma = self._log_sigmas[below] * (1 - share) + self._log_sigmas[(below + 1).clamp(max=999)] * share
        alpha_bar = 1 / (1 + (2 * log_sigma).exp())
        a, s = (root.sqrt().view(-1, 1, 1, 1) for root in (alpha_bar, 1 - alpha_bar))
        x_0 = self.mean + a * self.std**2 / (a**2 * self.std**2 + s**2) * (x_t - a * self.mean)
        noise = (x_t - a * x_0) / s
        return (noise if self.schedule.prediction == "epsilon" else a * noise - s * x_0).float()


WITH_SIGMAS = ("dpm++", "euler", "heun", "dpm_2", "dpmsolver", "dpmsingle", "unipc", "lms")
SPREADS = [(name, sigmas) for name in WITH_SIGMAS for sigmas in ("normal", "karras", "exponential", "beta")]
SPREADS += [(name, "normal") for name in ("ddim", "pndm", *THAT_DRAW)]
OFTEN = [("dpm++", "beta"), ("dpm++", "karras"), ("dpm_2", "karras")]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "zero terminal SNR"])
@pytest.mark.parametrize(
    "sampler, sigmas", [pytest.param(*spread, marks=[] if spread in OFTEN else pytest.mark.slow) for spread in SPREADS]
)
def test_noise_is_led_to_what_the_model_knows(sampler: str, sigmas: str, kind: str) -> None:
    """With every spread of the sigmas, also where several steps fall on the same timestep."""
    if sampler == "lms" or sigmas == "beta":
        pytest.importorskip("scipy")
    if kind == "zero terminal SNR" and sigmas == "beta":
        pytest.skip("refused by the command")
    is_zero = kind == "zero terminal SNR"
    schedule = stable_diffusion_schedule("v_prediction" if is_zero else cast(Prediction, kind))
    model: Any = Gaussian(schedule.with_zero_terminal_snr() if is_zero else schedule)
    settings: dict[str, Any] = {"seeds": [3], "size": (256, 256), "steps": 40, "guidance": 1.0}
    cond = {"text": torch.zeros(1, 1, 1)}
    wish = sampling.Wish([(cond, 1.0)], None)
    drawn = sampling.draw_latents(model, [wish], sampler=sampler, sigmas=sigmas, **settings)[0]
    z = torch.randn(4, 32, 32, generator=torch.Generator().manual_seed(3))
    assert abs(drawn.mean() - model.mean) < 0.05 and abs(drawn.std() - model.std) < 0.08
    if sampler not in THAT_DRAW:
        torch.testing.assert_close(drawn, model.mean + model.std * z, atol=0.26, rtol=0)


@pytest.mark.parametrize("sampler", ["lms", "heun"])
def test_the_last_steps_alone_keep_what_is_there(sampler: str) -> None:
    """Drawing on from a picture of what the model knows gives another one; the first step has none before it."""
    if sampler == "lms":
        pytest.importorskip("scipy")
    model: Any = Gaussian(stable_diffusion_schedule("epsilon"))
    there = model.mean + model.std * torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(9))
    wish = sampling.Wish([({"text": torch.zeros(1, 1, 1)}, 1.0)], None)
    settings: dict[str, Any] = {"seeds": [3], "size": (256, 256), "steps": 30, "guidance": 1.0, "sampler": sampler}
    beginning = sampling.Beginning((there, torch.zeros_like(there)), 0.1)
    drawn = sampling.draw_latents(model, [wish], **settings, beginning=beginning)[0]
    assert abs(drawn.mean() - model.mean) < 0.05 and abs(drawn.std() - model.std) < 0.05
