"""`lorasmith merge` into a model, every kind of change on every kind of layer: attached and merged are the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorasmith import model_families, plugins
from lorasmith.adapters.base import Adapter
from lorasmith.checkpoint import open_checkpoint
from lorasmith.cli import main
from lorasmith.formats import dialects
from lorasmith.models.keys import sd as keys
from lorasmith.network import adapter_class
from tests.formats import writers
from tests.tiny import write_tiny

KINDS = plugins.names("adapters")
QUARTERS = range(4)  # a miniature has three strided convolutions: a quarter of the kinds in a file
MODELS = [("sd1", "safetensors"), ("sd1", "diffusers"), ("sd2", "safetensors"), ("sd2", "diffusers")]
Adapters = dict[str, Adapter]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("models")
    suffixes = {"safetensors": ".safetensors", "diffusers": ""}
    return {
        (family, layout): write_tiny(folder / f"{family}{suffixes[layout]}", family, layout=layout)
        for family, layout in MODELS
    }


def load(path: Path) -> Any:
    with open_checkpoint(path) as checkpoint:
        return model_families.load(checkpoint, dtype=torch.float32, device=torch.device("cpu"))


@torch.no_grad()
def results(model: Any) -> Tensor:
    cond = model.encode_text(["a red cat on a chair"])
    x_t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    step = model(x_t, torch.tensor([400]), cond)
    return torch.cat([cond["text"].flatten() / cond["text"].norm(), step.flatten() / step.norm()])


def groups(model: Any) -> dict[str, dict[str, nn.Module]]:
    """The layers that a file may change by what they are."""
    found: dict[str, dict[str, nn.Module]] = {}
    for name, layer in model.adaptable_layers().items():
        kind = f"{type(layer).__name__} of {'text' if name.startswith('lora_te') else 'U-Net'}"
        if isinstance(layer, nn.Conv2d):
            kind = f"{layer.kernel_size} by {layer.stride}"
        elif isinstance(layer, nn.Linear) and layer.bias is None:
            kind += " without bias"
        elif "time_emb" in name:
            kind = "time"
        found.setdefault(kind, {})[name] = layer
    return found


def make(kind: str, layer: nn.Module, seed: int) -> Adapter | None:
    """An adapter that changes the layer a bit; None where such a one does not go on it."""
    weight = layer.get_parameter("weight")
    if isinstance(layer, nn.Embedding) and (kind != "full" or len(weight) > 77 * 1000):
        return None
    try:
        adapter = adapter_class(kind)(tuple(weight.shape), 3, 2.0)
    except ValueError:
        return None
    if kind == "full" and not isinstance(layer, nn.Embedding) and layer.bias is not None:
        adapter.diff_b = nn.Parameter(torch.zeros(len(weight)))  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(seed)
    adapter.reset(weight, generator)
    with torch.no_grad():
        for parameter in adapter.parameters():
            size = parameter.std() if parameter.numel() > 1 and parameter.std() > 0 else weight.std() / 2
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size * 0.5)
    return adapter


def adapters_for(model: Any, quarter: int) -> Adapters:
    """A quarter of the kinds, each on a layer of every group that it goes on."""
    found: Adapters = {}
    for number, layers in enumerate(groups(model).values()):
        names = iter(sorted(layers))
        for kind in KINDS[quarter::4]:
            name = next(names, None)
            adapter = make(kind, layers[name], seed=10 * number + quarter) if name else None
            if name and adapter:
                found[name] = adapter
    return found


def write(path: Path, adapters: Adapters) -> Path:
    tensors = {f"{name}.{key}": value for name, own in adapters.items() for key, value in own.state_dict().items()}
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    return path


@contextmanager
def attached(model: Any, adapters: Adapters, multiplier: float) -> Iterator[None]:
    """The adapters on the live layers, as training has them; an embedding, on which none trains, is changed."""
    layers, handles = model.adaptable_layers(), []
    for name, adapter in adapters.items():
        adapter.multiplier = multiplier
        if isinstance(layers[name], nn.Embedding):
            apply(layers[name], adapter, multiplier)
        else:
            handles.append(
                layers[name].register_forward_hook(lambda layer, args, out, own=adapter: own(layer, args[0], out))
            )
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def apply(layer: Any, adapter: Adapter, ratio: float) -> None:
    """The definition: W + ratio * delta(W), and the same of the bias."""
    layer.weight += ratio * adapter.delta(layer.weight)
    if not isinstance(layer, nn.Embedding) and (change := adapter.delta_bias(layer.bias)) is not None:
        layer.bias += ratio * change


def merge(model: Path, loras: list[Path], ratios: list[float], output: Path, *options: str) -> int:
    given = ["--lora", *map(str, loras), "--ratio", *map(str, ratios), "--output", str(output)]
    return main(["merge", "--model", str(model), *given, *options])


@pytest.mark.parametrize(
    ("family", "layout", "quarter"),
    [
        *(("sd1", "safetensors", quarter) for quarter in QUARTERS), ("sd1", "diffusers", 0),
        *(("sd2", "safetensors", quarter) for quarter in QUARTERS), ("sd2", "diffusers", 1),
    ],
)  # fmt: skip
def test_attached_and_merged_are_the_same(
    family: str, layout: str, quarter: int, models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, output = models[family, layout], tmp_path / f"out{'.safetensors' * (layout != 'diffusers')}"
    model = load(base)
    adapters = adapters_for(model, quarter)
    lora = write(tmp_path / "lora.safetensors", adapters)
    assert merge(base, [lora], [0.7], output) == 0
    assert f"{len(adapters)} layers applied, 0 ignored, 0 unknown" in capsys.readouterr().out
    plain, found = results(model), results(load(output))
    with attached(model, adapters, 0.7):
        wanted = results(model)
    assert (found - wanted).norm() < 2e-5 * wanted.norm()
    assert (plain - wanted).norm() > 2e-2 * wanted.norm()


def test_every_kind_is_on_every_kind_of_layer(models: Any) -> None:
    """So that the test above says what its name says."""
    found: dict[str, set[str]] = {}
    for family in ("sd1", "sd2"):
        model = load(models[family, "safetensors"])
        for quarter in QUARTERS:
            adapters = adapters_for(model, quarter)
            for group, layers in groups(model).items():
                found.setdefault(group, set()).update(
                    type(adapters[n]).__name__.lower() for n in layers if n in adapters
                )
    norms, every = {"full", "norm"}, set(KINDS) - {"norm"}
    assert {group: kinds for group, kinds in found.items() if "Norm" in group} == {
        "GroupNorm of U-Net": norms, "LayerNorm of U-Net": norms, "LayerNorm of text": norms
    }  # fmt: skip
    assert found["Embedding of text"] == {"full"}
    others = {group: kinds for group, kinds in found.items() if "Norm" not in group and "Embedding" not in group}
    assert others == dict.fromkeys(others, every)
    assert {"(1, 1) by (1, 1)", "(3, 3) by (1, 1)", "(3, 3) by (2, 2)", "Linear of U-Net", "Linear of text",
            "Linear of U-Net without bias", "time"} == others.keys()  # fmt: skip


def test_several_are_added_each_to_what_the_ones_before_left(
    models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All kinds on the same layers, one after the other; --verify finds the same."""
    base, output, ratios = models["sd1", "safetensors"], tmp_path / "out.safetensors", [0.7, -0.4, 1.0, 0.3]
    model = load(base)
    loras = []
    for quarter, ratio in zip(QUARTERS, ratios, strict=True):
        adapters = adapters_for(model, quarter)
        loras.append(write(tmp_path / f"{quarter}.safetensors", adapters))
        for name, adapter in adapters.items():
            apply(model.adaptable_layers()[name], adapter, ratio)
    assert merge(base, loras, ratios, output, "--verify") == 0
    assert "kinds of change: " in capsys.readouterr().out
    wanted, found = results(model), results(load(output))
    assert (found - wanted).norm() < 2e-5 * wanted.norm()
    assert merge(base, loras[::-1], ratios[::-1], output, "--overwrite") == 0
    assert (results(load(output)) - wanted).norm() > 1e-4 * wanted.norm()  # the order matters


def test_a_change_of_a_bias_that_is_not_there_is_refused(
    models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{name}.diff_b": torch.ones(96)}, tmp_path / "bias.safetensors")
    output = tmp_path / "out.safetensors"
    assert merge(models["sd1", "safetensors"], [tmp_path / "bias.safetensors"], [1], output) == 2
    assert f"{name}: a change of the bias in the file; the model's layer has none" in capsys.readouterr().err
    assert not output.exists()


def test_what_no_layer_owns_is_told(models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "lora_unet_conv_in"
    extra = {"bundle_emb.me.string_to_param.*": torch.ones(1, 24)}
    save_file({f"{name}.diff": torch.ones(32, 4, 3, 3), **extra}, tmp_path / "a.safetensors")
    assert merge(models["sd1", "safetensors"], [tmp_path / "a.safetensors"], [1], tmp_path / "out.safetensors") == 0
    printed = capsys.readouterr().out
    assert "not used: 1 tensors, a bundled embedding" in printed and "kinds of change: 1 full" in printed


@pytest.mark.parametrize("number", [17, 26])
def test_block_weights_of_layers_that_a_plain_lora_does_not_have(number: int, models: Any, tmp_path: Path) -> None:
    """As LoRA Block Weight has it: by the place in the original file, and 1 for what is in none of its blocks."""
    base, output = models["sd1", "safetensors"], tmp_path / "out.safetensors"
    names = {
        "IN00": "input_blocks.0.0", "IN03": "input_blocks.3.0.op", "IN10": "input_blocks.10.0.in_layers.2",
        "M00": "middle_block.0.emb_layers.1", "OUT02": "output_blocks.2.1.conv",
        "OUT08": "output_blocks.8.0.skip_connection", "none": "time_embed.0", "None": "out.2",
    }  # fmt: skip
    all_26 = ["BASE", *(f"IN{n:02}" for n in range(12)), "M00", *(f"OUT{n:02}" for n in range(12))]
    of_17 = [b for b in all_26 if b not in ("IN00", "IN03", "IN06", "IN09", "IN10", "IN11", "OUT00", "OUT01", "OUT02")]
    blocks = all_26 if number == 26 else of_17
    weights = {block: 0.5 + place for place, block in enumerate(blocks)}
    before = load_file(base)
    places = {f"lora_unet_{theirs.replace('.', '_')}": f"{keys.UNET}{theirs}.weight" for theirs in names.values()}
    save_file(
        {f"{name}.diff": torch.full_like(before[place], 0.25) for name, place in places.items()},
        tmp_path / "a.safetensors",
    )
    given = ",".join(map(str, weights.values()))
    assert merge(base, [tmp_path / "a.safetensors"], [1], output, "--block-weights", given) == 0
    after = load_file(output)
    for block, theirs in names.items():
        place = f"{keys.UNET}{theirs}.weight"
        factor = 1.0 if block.lower() == "none" else weights.get(block, 0.0)
        torch.testing.assert_close(after[place], before[place] + 0.25 * factor)


FORMS = {
    "diffusers": writers.diffusers,
    "diffusers-0.21": writers.diffusers_021,
    "broken names": lambda path, layers: writers.renamed(path, layers, "^lora_te_text_model_", "lora_te_"),
    "te1": lambda path, layers: writers.renamed(path, layers, "^lora_te_", "lora_te1_"),
    "peft": lambda path, layers: (
        writers.peft(
            path.with_suffix(""), {n: own for n, own in layers.items() if "unet" in n}, {"lora_alpha": 3}
        ).parent
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_files_of_every_program_do_what_sd_scripts_own_does(form: str, models: Any, tmp_path: Path) -> None:
    base = models["sd1", "safetensors"]
    with open_checkpoint(base) as checkpoint:
        shapes = model_families.target_shapes(checkpoint)
    generator = torch.Generator().manual_seed(1)
    layers = {}
    for name, (out, into, *kernel) in list(shapes.items())[::9]:
        ones = [1] * len(kernel)
        layers[name] = {
            "lora_down.weight": torch.randn(3, into, *kernel, generator=generator) / 5,
            "lora_up.weight": torch.randn(out, 3, *ones, generator=generator) / 5,
        }
    if form == "peft":
        layers = {name: own for name, own in layers.items() if "unet" in name}
    theirs = FORMS[form](tmp_path / "theirs.safetensors", layers)
    ours = writers.kohya(tmp_path / "ours.safetensors", layers)
    assert merge(base, [theirs], [0.5], tmp_path / "a.safetensors") == 0
    assert merge(base, [ours], [0.5], tmp_path / "b.safetensors") == 0
    found, wanted = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert dialects.read_any(ours).dialect == "kohya"
