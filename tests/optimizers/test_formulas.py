"""The optimizers that others' packages bring, with the arguments that we give them, against their papers' formulas.

Two groups each, of different rates (unless the rate is found) and with weight decay in the first alone, since some
formulas join groups and some keep them apart.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorasmith.optimizers.base import builder, weights_to_use

STEPS, DECAY = 12, 0.1


def start() -> list[Tensor]:
    return [
        torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for shape in [(6, 4), (5, 3)]
    ]


def gradient(value: Tensor, step: int) -> Tensor:
    """The gradient of a bowl that is steeper in some directions, and shakes."""
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return (value - 1) * torch.linspace(0.2, 2, value.numel(), dtype=torch.float64).view_as(value) + 0.1 * noise


Groups = list[tuple[Tensor, float, float]]  # value, rate, weight decay


def adamw(groups: Groups, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> list[Tensor]:
    """arXiv:1711.05101, algorithm 2."""
    found = []
    for p, lr, decay in groups:
        m, v = torch.zeros_like(p), torch.zeros_like(p)
        for t in range(1, STEPS + 1):
            g = gradient(p, t)
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
            p = p - lr * m_hat / (v_hat.sqrt() + eps) - lr * decay * p
        found.append(p)
    return found


def lion(groups: Groups, beta1: float = 0.9, beta2: float = 0.99) -> list[Tensor]:
    """arXiv:2302.06675, algorithm 2."""
    found = []
    for p, lr, decay in groups:
        m = torch.zeros_like(p)
        for t in range(1, STEPS + 1):
            g = gradient(p, t)
            p = p - lr * ((beta1 * m + (1 - beta1) * g).sign() + decay * p)
            m = beta2 * m + (1 - beta2) * g
        found.append(p)
    return found


def sgd(groups: Groups, momentum: float = 0.9) -> list[Tensor]:
    """Sutskever et al. 2013, equations 3 and 4, in the variable that the gradient is taken at; L2 in the gradient."""
    found = []
    for p, lr, decay in groups:
        velocity = torch.zeros_like(p)
        for t in range(1, STEPS + 1):
            g = gradient(p, t) + decay * p
            velocity = momentum * velocity - lr * g
            p = p + momentum * velocity - lr * g
        found.append(p)
    return found


def schedule_free(groups: Groups, *, is_adam: bool, beta1: float = 0.9, beta2: float = 0.999) -> list[Tensor]:
    """arXiv:2405.15682, equations 1 to 3 and algorithm 1: what is used is the average x."""
    found = []
    for z, lr, decay in groups:
        x, v = z, torch.zeros_like(z)
        for t in range(1, STEPS + 1):
            y = (1 - beta1) * z + beta1 * x
            g = gradient(y, t)
            if is_adam:
                v = beta2 * v + (1 - beta2) * g * g
                g = g / ((v / (1 - beta2**t)).sqrt() + 1e-8)
            z = z - lr * (g + decay * y)
            x = x + (z - x) / t
        found.append(x)
    return found


def prodigy(groups: Groups, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> list[Tensor]:
    """arXiv:2306.06101, algorithm 4 (Adam), with beta3 = sqrt(beta2): one d for all groups."""
    values, starts = [p for p, _, _ in groups], [p for p, _, _ in groups]
    m, v, s = ([torch.zeros_like(p) for p in values] for _ in range(3))
    d = d_max = d_0 = 1e-6
    r, beta3 = 0.0, math.sqrt(beta2)
    for t in range(1, STEPS + 1):
        gradients, lr = [gradient(p, t) for p in values], groups[0][1]
        r = beta3 * r + sum(
            d * d * lr / d_0 * (g * (p_0 - p)).sum().item() for g, p_0, p in zip(gradients, starts, values, strict=True)
        )
        for i, g in enumerate(gradients):
            m[i] = beta1 * m[i] + (1 - beta1) * d * g
            v[i] = beta2 * v[i] + (1 - beta2) * d * d * g * g
            s[i] = beta3 * s[i] + d * d * lr / d_0 * g
        d_hat = r / sum(one.abs().sum().item() for one in s)
        step = d * lr  # of this step's d, as the authors' package
        d = max(d, d_hat) if d == d_0 else d
        d_max = max(d_max, d_hat)
        d = d_max
        values = [
            p - step * decay * p - step * m[i] / (v[i].sqrt() + d * eps)
            for i, (p, (_, _, decay)) in enumerate(zip(values, groups, strict=True))
        ]
    return values


def factored(row: Tensor, column: Tensor) -> Tensor:
    """One over the root of what is known by the means over its columns and rows, arXiv:1804.04235, algorithm 1."""
    return 1 / (row[:, None] * column[None, :] / row.mean()).sqrt()


def limited(update: Tensor) -> Tensor:
    return update / max(1.0, update.square().mean().sqrt().item())


def adafactor(groups: Groups, eps: float = 1e-30) -> list[Tensor]:
    """arXiv:1804.04235, algorithm 4 with beta2 = 1 - t^-0.8 (section 7.2), and a rate that is given."""
    found = []
    for p, lr, decay in groups:
        row, column = torch.zeros(p.shape[0], dtype=p.dtype), torch.zeros(p.shape[1], dtype=p.dtype)
        for t in range(1, STEPS + 1):
            g, beta2 = gradient(p, t), 1 - t**-0.8
            row = beta2 * row + (1 - beta2) * (g * g + eps).mean(dim=1)
            column = beta2 * column + (1 - beta2) * (g * g + eps).mean(dim=0)
            p = p - lr * decay * p - lr * limited(g * factored(row, column))
        found.append(p)
    return found


def came(groups: Groups, beta1: float = 0.9) -> list[Tensor]:
    """arXiv:2307.02047, algorithm 2."""
    betas = (beta1, 0.999, 0.9999)
    found = []
    for p, lr, decay in groups:
        m = torch.zeros_like(p)
        sizes = [torch.zeros(side, dtype=p.dtype) for side in p.shape]
        residues = [torch.zeros(side, dtype=p.dtype) for side in p.shape]
        for t in range(1, STEPS + 1):
            g = gradient(p, t)
            sizes = [betas[1] * one + (1 - betas[1]) * (g * g + 1e-30).mean(dim=1 - i) for i, one in enumerate(sizes)]
            u = limited(g * factored(*sizes))
            m = betas[0] * m + (1 - betas[0]) * u
            unsteady = (u - m).square() + 1e-16
            residues = [betas[2] * one + (1 - betas[2]) * unsteady.mean(dim=1 - i) for i, one in enumerate(residues)]
            p = p - lr * decay * p - lr * m * factored(*residues)
        found.append(p)
    return found


def dadapt_adam(groups: Groups, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> list[Tensor]:
    """arXiv:2301.07733, algorithm 5 (Adam), one d for all groups."""
    values = [p for p, _, _ in groups]
    m, v, s = ([torch.zeros_like(p) for p in values] for _ in range(3))
    d, weighted, root = 1e-6, 0.0, math.sqrt(beta2)
    for t in range(1, STEPS + 1):
        step, gained = d * groups[0][1], 0.0
        for i, (p, (_, _, decay)) in enumerate(zip(values, groups, strict=True)):
            g = gradient(p, t)
            gained += step * (g * s[i] / (v[i].sqrt() + eps)).sum().item()
            m[i] = beta1 * m[i] + (1 - beta1) * step * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            s[i] = root * s[i] + (1 - root) * step * g
            values[i] = p - step * decay * p
        weighted = root * weighted + (1 - root) * gained
        length = sum(one.abs().sum().item() for one in s)
        d = max(d, weighted / ((1 - root) * length))
        values = [p - m[i] / (v[i].sqrt() + eps) for i, p in enumerate(values)]
    return values


def schedule_free_radam(
    groups: Groups, *, is_silent: bool = True, beta1: float = 0.9, beta2: float = 0.999
) -> list[Tensor]:
    """arXiv:2405.15682, section 3, whose average weighs by squared rates, with those of arXiv:1908.03265, algorithm 2.

    is_silent: whether it rests while that takes the steps of SGD.
    """
    found, longest = [], 2 / (1 - beta2) - 1
    for z, lr, decay in groups:
        x, v, total, largest = z, torch.zeros_like(z), 0.0, 0.0
        for t in range(1, STEPS + 1):
            y = (1 - beta1) * z + beta1 * x
            g = gradient(y, t)
            v = beta2 * v + (1 - beta2) * g * g
            length, rate = longest - 2 * t * beta2**t / (1 - beta2**t), 0.0 if is_silent else lr
            if length > 4:
                part = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
                rate, g = lr * math.sqrt(part), g / ((v / (1 - beta2**t)).sqrt() + 1e-8)
            largest = max(largest, rate)
            total += largest**2
            z = z - rate * (g + decay * y)
            x = x + (z - x) * (largest**2 / total if total else 0.0)
        found.append(x)
    return found


def dadapt_sgd(groups: Groups, momentum: float = 0.9) -> list[Tensor]:
    """arXiv:2301.07733, algorithm 4 (SGD), d by the products of gradients and their sum (section 3); L2."""
    starts = values = [p for p, _, _ in groups]
    s = [torch.zeros_like(p) for p in values]
    d, products = 1e-6, 0.0
    first = math.sqrt(sum(gradient(p, 1).square().sum().item() for p in values))
    for t in range(1, STEPS + 1):
        step = d * groups[0][1] / first
        for i, (p, (_, _, decay)) in enumerate(zip(values, groups, strict=True)):
            g = gradient(p, t) + decay * p
            products += step * (g * s[i]).sum().item()
            s[i] = s[i] + step * g
        d = max(d, 2 * products / math.sqrt(sum(one.square().sum().item() for one in s)))
        values = [momentum * p + (1 - momentum) * (p_0 - one) for p, p_0, one in zip(values, starts, s, strict=True)]
    return values


def dadapt_adagrad(groups: Groups, eps: float = 1e-6) -> list[Tensor]:
    """arXiv:2301.07733, algorithm 2 (AdaGrad), with G_0 as in the authors' package; L2."""
    starts = values = [p for p, _, _ in groups]
    s, squares = [torch.zeros_like(p) for p in values], [torch.full_like(p, 1e-6) for p in values]
    d, taken = 1e-6, 0.0
    for t in range(1, STEPS + 1):
        step = d * groups[0][1]
        for i, (p, (_, _, decay)) in enumerate(zip(values, groups, strict=True)):
            g = gradient(p, t) + decay * p
            squares[i] = squares[i] + g * g
            taken += step**2 * (g * g / (squares[i].sqrt() + eps)).sum().item()
            s[i] = s[i] + step * g
        weighted = sum((one * one / (g.sqrt() + eps)).sum().item() for one, g in zip(s, squares, strict=True))
        d = max(d, (weighted - taken) / sum(one.abs().sum().item() for one in s))
        values = [p_0 - one / (g.sqrt() + eps) for p_0, one, g in zip(starts, s, squares, strict=True)]
    return values


def dadapt_lion(groups: Groups, beta1: float = 0.9, beta2: float = 0.99) -> list[Tensor]:
    """arXiv:2302.06675, algorithm 2, with d by arXiv:2301.07733's algorithm 5, whose direction is the sign."""
    values = [p for p, _, _ in groups]
    m, s = ([torch.zeros_like(p) for p in values] for _ in range(2))
    d, weighted, root = 1e-6, 0.0, math.sqrt(beta2)
    for t in range(1, STEPS + 1):
        step, gained = d * groups[0][1], 0.0
        for i, (p, (_, _, decay)) in enumerate(zip(values, groups, strict=True)):
            g = gradient(p, t)
            direction = (beta1 * m[i] + (1 - beta1) * g).sign()
            values[i] = p - step * (direction + decay * p)
            m[i] = beta2 * m[i] + (1 - beta2) * step * g  # of steps, as the authors' package
            gained += step * (direction * s[i]).sum().item()
            s[i] = root * s[i] + (1 - root) * step * direction
        weighted = root * weighted + (1 - root) * gained
        d = max(d, weighted / ((1 - root) * sum(one.abs().sum().item() for one in s)))
    return values


def dadapt_adan(
    groups: Groups, betas: tuple[float, float, float] = (0.98, 0.92, 0.99), eps: float = 1e-8
) -> list[Tensor]:
    """arXiv:2208.06677, algorithm 1, whose betas are 1 less these, with d by weighted sums as in arXiv:2301.07733."""
    values = [p for p, _, _ in groups]
    last = [gradient(p, 1) for p in values]
    m, v, n, s = ([torch.zeros_like(p) for p in values] for _ in range(4))
    d, taken = 1e-6, 0.0
    for t in range(1, STEPS + 1):
        step, squares = d * groups[0][1], 0.0
        for i, p in enumerate(values):
            g = gradient(p, t)
            m[i] = betas[0] * m[i] + (1 - betas[0]) * step * g
            v[i] = betas[1] * v[i] + (1 - betas[1]) * step * (g - last[i])
            n[i] = betas[2] * n[i] + (1 - betas[2]) * (g + betas[1] * (g - last[i])) ** 2
            s[i] = betas[2] * s[i] + (1 - betas[2]) * step * g
            squares += (g * g / (n[i].sqrt() + eps)).sum().item()
            last[i] = g
        taken = betas[2] * taken + (1 - betas[2]) * step**2 * squares
        weighted = sum((one * one / (size.sqrt() + eps)).sum().item() for one, size in zip(s, n, strict=True))
        d = max(d, (weighted / (1 - betas[2]) - taken) / sum(one.abs().sum().item() for one in s))
        values = [
            (p - (m[i] + betas[1] * v[i]) / (n[i].sqrt() + eps)) / (1 + step * decay)
            for i, (p, (_, _, decay)) in enumerate(zip(values, groups, strict=True))
        ]
    return values


FORMULAS: dict[str, tuple[Callable[[Groups], list[Tensor]], tuple[float, float]]] = {
    "adamw": (adamw, (0.01, 0.05)),
    "lion": (lion, (0.01, 0.05)),
    "sgd": (sgd, (0.01, 0.05)),
    "schedule_free_sgd": (lambda groups: schedule_free(groups, is_adam=False), (0.05, 0.2)),
    "schedule_free_adamw": (lambda groups: schedule_free(groups, is_adam=True), (0.01, 0.05)),
    "prodigy": (prodigy, (1.0, 1.0)),
    "dadapt_adam": (dadapt_adam, (1.0, 1.0)),
    "adafactor": (adafactor, (0.01, 0.05)),
    "came": (came, (0.01, 0.05)),
    "came betas=0.0,0.999,0.9999": (lambda groups: came(groups, beta1=0.0), (0.01, 0.05)),  # eps2 alone divides
    "schedule_free_radam": (schedule_free_radam, (0.1, 0.5)),
    "schedule_free_radam silent_sgd_phase=False": (
        lambda groups: schedule_free_radam(groups, is_silent=False), (0.1, 0.5)
    ),
    "dadapt_sgd": (dadapt_sgd, (1.0, 1.0)),
    "dadapt_adagrad": (dadapt_adagrad, (1.0, 1.0)),
    "dadapt_lion": (dadapt_lion, (1.0, 1.0)),
    "dadapt_adan": (dadapt_adan, (1.0, 1.0)),
}  # fmt: skip


@pytest.mark.parametrize("called", FORMULAS)
def test_its_steps_are_the_papers(called: str) -> None:
    (formula, rates), (name, *arguments) = FORMULAS[called], called.split()
    values = [torch.nn.Parameter(value) for value in start()]
    groups = [
        {"params": [values[0]], "lr": rates[0], "name": "text_encoder"},
        {"params": [values[1]], "lr": rates[1], "name": "unet", "weight_decay": 0.0},
    ]
    optimizer = builder(name, arguments)(groups, weight_decay=DECAY)
    for step in range(1, STEPS + 1):
        for value in values:
            value.grad = gradient(value.detach(), step)
        optimizer.step()
    expected = formula(list(zip(start(), rates, (DECAY, 0.0), strict=True)))
    with weights_to_use(optimizer):
        for value, wanted, begun in zip(values, expected, start(), strict=True):
            moved = (wanted - begun).norm()
            assert (value.detach() - wanted).norm() < 1e-4 * moved and moved > 0
