"""The moving average against its formula written out, and that lending it out leaves no trace."""

import pytest
import torch
from torch import nn

from lorasmith.weight_average import WeightAverage


def moving(decay: float, values: list[float]) -> float:
    """Return the average by the formula, in Python's double precision; the first value is the beginning."""
    average = values[0]
    for n, value in enumerate(values[1:], start=1):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * value
    return average


@pytest.mark.parametrize("decay", [0.0, 0.2, 0.5, 0.9999])
def test_the_average_follows_its_formula(decay: float) -> None:
    values = [1.0, -2.0, 3.5, 0.25, 8.0, 8.0, -1.0]
    parameter = nn.Parameter(torch.tensor([values[0]]))
    average = WeightAverage([("p", parameter)], decay)
    for step, value in enumerate(values[1:], start=1):
        with torch.no_grad():
            parameter.fill_(value)
        average.update(step)
    assert average.state_dict()["p"].item() == pytest.approx(moving(decay, values), rel=1e-5)


def test_lending_it_out_leaves_the_parameters_as_they_were() -> None:
    parameter = nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(0)))
    average = WeightAverage([("p", parameter)], 0.9)
    with torch.no_grad():
        parameter.mul_(1.7)
    average.update(1)
    trained, averaged = parameter.detach().clone(), average.state_dict()["p"].clone()
    with pytest.raises(RuntimeError), average.in_place():
        assert torch.equal(parameter, averaged) and not torch.equal(trained, averaged)
        raise RuntimeError
    assert torch.equal(parameter, trained) and torch.equal(average.state_dict()["p"], averaged)


def test_it_goes_on_from_a_state() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    first, second = (WeightAverage([("p", parameter)], 0.9) for _ in range(2))
    with torch.no_grad():
        parameter.add_(1)
    first.update(1)
    second.load_state_dict(first.state_dict())
    for average in (first, second):
        average.update(2)
    assert torch.equal(first.state_dict()["p"], second.state_dict()["p"]) and first.state_dict()["p"][0] > 0
