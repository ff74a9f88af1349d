"""AdamW as built by us takes the groups' own learning rates and does the textbook's step."""

import torch

from lorasmith.optimizers import adamw


def test_first_step_is_the_formulas() -> None:
    start, gradient = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, -0.1, 2.0])
    groups = [{"params": [torch.nn.Parameter(start.clone())], "lr": lr, "name": "unet"} for lr in (0.1, 0.01)]
    optimizer = adamw.build(groups, weight_decay=0.2)
    for group in optimizer.param_groups:
        group["params"][0].grad = gradient.clone()
    optimizer.step()
    for group, lr in zip(optimizer.param_groups, (0.1, 0.01), strict=True):
        expected = start * (1 - lr * 0.2) - lr * gradient / (gradient.abs() + 1e-8)  # m_hat / (sqrt(v_hat) + eps)
        torch.testing.assert_close(group["params"][0].detach(), expected)
