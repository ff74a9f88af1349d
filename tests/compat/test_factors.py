"""The sum of the factors, against sd-scripts' formula written out here with numpy, and what it means for products."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.compat.factors import add_factors, shuffle_ranks
from tests.random_lora import SHAPES, TE, deltas_of, make_lora

RATIOS = st.floats(-2, 2).filter(lambda ratio: abs(ratio) > 1e-3)
ALPHAS = st.none() | st.floats(0.1, 8)


def reference(loras: list[dict[str, torch.Tensor]], ratios: list[float], *, concat: bool) -> dict[str, np.ndarray]:
    """networks/merge_lora.py, merge_lora_models: key by key, with the alpha and the rank of each layer."""
    alphas: dict[str, float] = {}
    merged: dict[str, np.ndarray] = {}
    for lora, ratio in zip(loras, ratios, strict=True):
        for key in [key for key in lora if not key.endswith(".alpha")]:
            layer, factor = key.split(".")[:2]
            rank = lora[f"{layer}.lora_down.weight"].shape[0]
            alpha = float(lora.get(f"{layer}.alpha", torch.tensor(rank)))
            scale = ratio * (alpha / alphas.setdefault(layer, alpha)) ** 0.5
            term = lora[key].numpy() * (abs(scale) if factor == "lora_up" else scale)
            if key not in merged:
                merged[key] = term
            elif concat:
                merged[key] = np.concatenate([merged[key], term], axis=int(factor == "lora_up"))
            else:
                merged[key] = merged[key] + term
    return merged | {f"{layer}.alpha": np.array(alpha, np.float32) for layer, alpha in alphas.items()}


@settings(max_examples=25)
@given(st.lists(st.tuples(RATIOS, ALPHAS), min_size=1, max_size=3), st.booleans(), st.booleans())
def test_it_is_what_sd_scripts_makes(
    terms: list[tuple[float, float | None]], concat: bool, is_first_without_text: bool
) -> None:
    loras = [make_lora(rank=3, alpha=alpha, seed=number) for number, (_, alpha) in enumerate(terms)]
    if is_first_without_text:
        loras[0] = {key: tensor for key, tensor in loras[0].items() if not key.startswith(TE)}
    ratios = [ratio for ratio, _ in terms]
    found, expected = add_factors(loras, ratios, concat=concat), reference(loras, ratios, concat=concat)
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        np.testing.assert_allclose(tensor.numpy(), expected[key], rtol=1e-5, atol=1e-7)


def test_a_ratio_acts_as_its_square_and_keeps_its_sign() -> None:
    lora = make_lora(rank=4, alpha=2.0)
    for ratio in (0.6, -0.6):
        found, whole = deltas_of(add_factors([lora], [ratio])), deltas_of(lora)
        for name in SHAPES:
            torch.testing.assert_close(found[name], whole[name] * ratio * abs(ratio))


def test_shuffled_ranks_give_the_same_products() -> None:
    lora = make_lora(rank=8)
    shuffled = shuffle_ranks(lora, torch.Generator().manual_seed(1))
    assert not torch.equal(shuffled[f"{TE}.lora_down.weight"], lora[f"{TE}.lora_down.weight"])
    for name, delta in deltas_of(lora).items():
        torch.testing.assert_close(deltas_of(shuffled)[name], delta)


def test_what_does_not_fit_is_told_with_its_reason() -> None:
    with pytest.raises(ValueError, match="has rank 4 and rank 2: matrices of different size"):
        add_factors([make_lora(rank=4), make_lora(rank=2)], [1, 1])
    other = make_lora({name: (shape[0], shape[1] + 8, *shape[2:]) for name, shape in SHAPES.items()})
    for concat in (False, True):
        with pytest.raises(ValueError, match="different structure, such as v1 and v2"):
            add_factors([make_lora(), other], [1, 1], concat=concat)
    with pytest.raises(ValueError, match=r"has alpha 2 and -1, and sqrt\(-1 / 2\) is needed"):
        add_factors([make_lora(alpha=2.0), make_lora(alpha=-1.0)], [1, 1])
