"""Adan (Xie et al. 2022, https://arxiv.org/abs/2208.06677) with D-Adaptation (Defazio & Mishchenko 2023,
https://arxiv.org/abs/2301.07733), as the authors of the latter joined them.

It estimates its learning rate. Arguments are called as in the authors' package, dadaptation. It is not taken from
pytorch_optimizer, which squares the squares of gradients once more (4.1), so that small ones make far too large steps.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch


def build(
    param_groups: Iterable[dict[str, Any]],
    *,
    weight_decay: float = 0.01,
    betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
    eps: float = 1e-8,
    growth_rate: float = math.inf,
    d0: float = 1e-6,
) -> torch.optim.Optimizer:
    """Return it over groups of parameters with one `lr`, which multiplies the estimate."""
    return DAdaptAdan(param_groups, weight_decay=weight_decay, betas=betas, eps=eps, growth_rate=growth_rate, d0=d0)


class DAdaptAdan(torch.optim.Optimizer):
    """Adan, algorithm 1, with steps of the rate times d, which is the same for all groups and only grows.

    Names are the papers': m, v and n are the means of gradients, of their differences and of squares; s is the weighted
    sum of the steps' gradients, by which d is estimated.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        weight_decay: float,
        betas: tuple[float, float, float],
        eps: float,
        growth_rate: float,
        d0: float,
    ) -> None:
        defaults = {"lr": 1.0, "weight_decay": weight_decay, "betas": betas, "eps": eps, "growth_rate": growth_rate}
        super().__init__(params, {**defaults, "d": d0, "gradients_weighted": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take a step."""
        first = self.param_groups[0]
        beta1, beta2, beta3 = first["betas"]
        rate, eps = first["d"] * first["lr"], first["eps"]
        trained = [(p, p.grad, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        sums = torch.zeros(3, device=first["params"][0].device)
        for p, g, _ in trained:
            state = self.state[p]
            if not state:
                state.update({name: torch.zeros_like(p) for name in ("m", "v", "n", "s")}, last=g.clone())
            difference = g - state["last"]
            state["last"].copy_(g)
            state["m"].lerp_(rate * g, 1 - beta1)
            state["v"].lerp_(rate * difference, 1 - beta2)
            state["n"].lerp_((g + beta2 * difference).square(), 1 - beta3)
            state["s"].lerp_(rate * g, 1 - beta3)
            scale, s = state["n"].sqrt() + eps, state["s"]
            sums += torch.stack([(g * g / scale).sum(), (s * s / scale).sum(), s.abs().sum()])
        gradients, sum_weighted, length = sums.tolist()
        if length == 0:  # no gradient yet, or a rate of 0
            return
        weighted = beta3 * first["gradients_weighted"] + (1 - beta3) * rate**2 * gradients
        estimate = (sum_weighted / (1 - beta3) - weighted) / length
        d = max(first["d"], min(estimate, first["d"] * first["growth_rate"])) if first["lr"] else first["d"]
        for group in self.param_groups:
            group.update(d=d, gradients_weighted=weighted)
        for p, _, group in trained:
            state = self.state[p]
            p.sub_((state["m"] + beta2 * state["v"]) / (state["n"].sqrt() + eps))
            p.div_(1 + rate * group["weight_decay"])
