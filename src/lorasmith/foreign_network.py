"""Networks of other programs: any module with `create_network` as kohya-ss/sd-scripts calls it, such as lycoris.kohya.

Such a module puts its own layers in place of the model's forward functions. Here it is given the model under the names
that saved files have, seeds for all that it draws, and autocast where the model is in half precision; what it saves is
read back from the file that it writes. The protocol is that of sd-scripts' train_network.py.
"""

import inspect
import logging
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorasmith import plugins
from lorasmith.errors import UserError
from lorasmith.models.base import LatentDiffusion
from lorasmith.network import PARTS, Network, PartRate, group_by_module, recognise
from lorasmith.seeds import derive

_NUM_SHOWN = 3


@dataclass(frozen=True)
class Request:
    """A module that was found, and the arguments with which its `create_network` will be called.

    Args:
        module: its dotted name.
        arguments: its own, all text, as sd-scripts gives them.
        dropout: share of neurons left out, which the module is told of; 0: it is not.
    """

    module: str
    create_network: Callable[..., Any]
    rank: int
    alpha: float
    arguments: Mapping[str, str]
    dropout: float

    def keywords(self) -> dict[str, Any]:
        """Return what is given by name; sd-scripts tells of dropout by two, of which a module may take one."""
        if not self.dropout:
            return dict(self.arguments)
        taken = inspect.signature(self.create_network).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        told = {name: self.dropout for name in ("neuron_dropout", "dropout") if takes_all or name in taken}
        if not told:
            raise UserError(f"--neuron-dropout: create_network of {self.module} takes no neuron_dropout; leave it out.")
        return {**told, **self.arguments}


def find(module: str, words: Sequence[str], *, rank: int, alpha: float, dropout: float) -> Request:
    """Find a module and check, without a model, that it can be called so.

    Args:
        words: its own arguments, `key=value`.

    Raises:
        UserError: there is no such module, it has no `create_network`, or that does not take these arguments.
    """
    try:
        found = plugins.find_module("network", module)
    except UserError as error:
        if module.startswith("lycoris."):
            raise UserError(f"{error} LyCORIS is the package lycoris-lora: pip install 'lorasmith[lycoris]'") from error
        raise
    create = vars(found).get("create_network")
    if not callable(create):
        raise UserError(
            f"--network-module {module} was found, but has no create_network, by which sd-scripts knows such modules; "
            "give the module that has it, or --adapter for a type of adapter."
        )
    arguments: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key in arguments:
            wrong = "is given twice" if equals else "expected is key=value"
            raise UserError(f"--network-args {word!r}: {wrong}, and each key once.")
        arguments[key] = value
    request = Request(module, create, rank, alpha, arguments, dropout)
    try:
        inspect.signature(create).bind(1.0, rank, alpha, None, None, None, **request.keywords())
    except TypeError as error:
        raise UserError(
            f"create_network of {module} cannot be called as sd-scripts does, with multiplier, network_dim, "
            f"network_alpha, vae, text_encoder, unet and {', '.join(arguments) or 'no arguments'} of --network-args: "
            f"{error}."
        ) from error
    return request


class ForeignNetwork:
    """What a module of another program put on a model; offers training what `Network` does.

    Args:
        learning_rate: of what the module puts into neither part.
        max_norm: what it is asked to limit its norms to after each step; None: nothing.
    """

    def __init__(
        self,
        request: Request,
        model: LatentDiffusion,
        parts: Iterable[str],
        *,
        seed: int,
        learning_rate: float,
        steps_per_epoch: int,
        max_norm: float | None,
    ) -> None:
        """Make the network, drawn from `seed`, for these parts of the model; it is on the model from then on.

        Raises:
            UserError: the module fails, gives no network, or cannot do what is asked for.
        """
        self._module, self._device, self._seed = request.module, model.device, seed
        self._parts, self._learning_rate = set(parts), learning_rate
        self._steps_per_epoch, self._epoch = steps_per_epoch, -1
        self._max_norm, self._dtype = max_norm, next(model.denoiser.parameters()).dtype
        self._weights = {name: layer.get_parameter("weight") for name, layer in model.adaptable_layers().items()}
        self._places = _AsSaved(model.text_encoder), model.denoiser
        with self._drawing("create"), _mended(request.module):
            with self._telling("create_network"):
                self._network = request.create_network(
                    1.0, request.rank, request.alpha, model.vae, *self._places, **request.keywords()
                )
            if not isinstance(self._network, nn.Module):
                kind = type(self._network).__name__
                raise UserError(f"create_network of {self._module} gave {kind}, no torch module: it refused.")
            with self._telling("apply_to"):
                self._method("apply_to")(*self._places, *(part in self._parts for part in ("text_encoder", "unet")))
        if max_norm is not None:
            self._method("apply_max_norm_regularization", "max_norm")
        self._network.to(self._device)
        self._method("prepare_grad_etc")(*self._places)
        self._network.eval()
        if self._dtype != torch.float32:
            for part in (model.text_encoder, model.denoiser):
                part.forward = torch.autocast(self._device.type, self._dtype)(part.forward)

    def checkpoint_gradients(self) -> None:
        """Tell the network that activations are computed twice; few do anything for it."""
        self._method("enable_gradient_checkpointing")()

    def load(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Start from a file's tensors, which must be those that it would save.

        Raises:
            UserError: they are not.
        """
        expected = self.file_tensors()
        wrong = [name for name in expected if name not in tensors or tensors[name].shape != expected[name].shape]
        wrong += [name for name in tensors if name not in expected]
        if wrong:
            raise UserError(
                f"--weights {path} does not fit what {self._module} makes with these arguments: {len(wrong)} tensors "
                f"are missing, unexpected or of another shape ({', '.join(wrong[:_NUM_SHOWN])}, ...). Give the rank "
                "and the arguments that they were trained with."
            )
        with tempfile.TemporaryDirectory() as folder, self._telling("load_weights"):
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, f"{folder}/weights.safetensors")
            self._method("load_weights")(f"{folder}/weights.safetensors")
        self._network.to(self._device)

    def param_groups(self, rates: Mapping[str, PartRate], undecayed: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Return the optimizer's groups as the module makes them of the parts' rates; without those with a rate of 0.

        Args:
            undecayed: patterns (fnmatch) of the names of parameters whose group has `weight_decay` 0.

        Raises:
            UserError: the module trains nothing.
        """
        prepare = self._method("prepare_optimizer_params")
        given = [rates[part].rate if part in rates else 0.0 for part in ("text_encoder", "unet")]
        if _takes(prepare, 3):
            given.append(self._learning_rate)
        with self._telling("prepare_optimizer_params"):
            made = prepare(*given)
        made = list(made[0] if isinstance(made, tuple) else made)  # newer ones describe them too
        if made and not isinstance(made[0], dict):  # parameters alone
            made = [{"params": made}]
        names = {parameter: name for name, parameter in self._network.named_parameters()}
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for number, group in enumerate(made):
            rate = group.get("lr", self._learning_rate)
            for parameter in group["params"] if rate else ():
                name = names[parameter]
                is_undecayed = any(fnmatchcase(name, pattern) for pattern in undecayed)
                decay = {"weight_decay": 0.0} if is_undecayed else {}
                part = next((part for start, part in PARTS.items() if name.startswith(start)), self._module)
                new = {"params": [], "lr": rate, "name": f"{part}/{number + 1}", **decay}
                groups.setdefault((number, is_undecayed), new)["params"].append(parameter)
        if not groups:
            raise UserError(f"{self._module} trains nothing with these arguments and rates; give others.")
        return [groups[key] for key in sorted(groups)]

    def requires_grad_(self, is_trained: bool) -> None:
        """Train all parameters, or none."""
        self._network.requires_grad_(is_trained)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield all parameters with their names."""
        return self._network.named_parameters()

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """While entered, the model is the base model alone.

        Raises:
            UserError: the network has no strength that can be set.
        """
        set_multiplier = self._method("set_multiplier", "diff_output_preservation")
        set_multiplier(0.0)
        try:
            yield
        finally:
            set_multiplier(1.0)

    @contextmanager
    def dropping(self, step: int, samples: Sequence[int]) -> Iterator[None]:
        """While entered, the network is in training; what it draws is a function of the step and its samples."""
        with self._drawing("step", step, *samples):
            if step // self._steps_per_epoch != self._epoch:
                self._epoch = step // self._steps_per_epoch
                self._method("on_epoch_start")(*self._places)
            self._network.train()
            if callable(on_step_start := getattr(self._network, "on_step_start", None)):
                on_step_start(*self._places)
            try:
                yield
            finally:
                self._network.eval()

    def after_step_(self, groups: Sequence[Mapping[str, Any]]) -> int | None:
        """Let the network limit its norms; return how many were too large, if there is a limit."""
        if self._max_norm is None:
            return None
        count, *_ = self._method("apply_max_norm_regularization")(self._max_norm, self._device)
        return int(count)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of all parameters and buffers, from which training can go on to the same bytes."""
        return {name: tensor.detach().clone() for name, tensor in self._held().items()}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            UserError: the module makes other tensors now.
        """
        held = self._held()
        if wrong := sorted(held.keys() ^ tensors.keys()):
            raise UserError(
                f"{self._module} makes other tensors than when the run was started ({', '.join(wrong[:_NUM_SHOWN])}, "
                "...); go on with the version of it that the run was started with."
            )
        for name, tensor in held.items():
            tensor.copy_(tensors[name])

    def file_tensors(self) -> dict[str, Tensor]:
        """Return what a file of the network holds, as the module itself writes it."""
        save = self._method("save_weights")
        with tempfile.TemporaryDirectory() as folder, self._telling("save_weights"):
            path = f"{folder}/network.safetensors"
            save(path, None, *([{}] if _takes(save, 3) else []))  # in its own precision, with no metadata
            return load_file(path)

    @torch.no_grad()
    def delta_norms(self) -> dict[str, float]:
        """Return the Frobenius norm of every layer's delta, of the layers whose tensors are of a known type."""
        norms = {}
        for name, tensors in group_by_module(self.file_tensors()).items():
            if name not in self._weights:
                continue
            weight = self._weights[name].detach()
            try:
                adapter = recognise(tensors).from_tensors(tuple(weight.shape), tensors)
            except ValueError:
                continue
            norms[name] = adapter.to(weight.device).delta_norm(weight).item()
        return norms

    def _held(self) -> dict[str, Tensor]:
        return {**dict(self._network.named_parameters()), **dict(self._network.named_buffers())}

    def _method(self, name: str, option: str = "") -> Callable[..., Any]:
        method = getattr(self._network, name, None)
        if not callable(method):
            need = f"{option} needs it; leave that out" if option else "sd-scripts' protocol asks for it"
            raise UserError(f"the network of {self._module} has no {name}, and {need}.")
        return method

    @contextmanager
    def _drawing(self, purpose: str, *numbers: int) -> Iterator[None]:
        """Seed what has no generator of its own, and leave it as it was."""
        devices = [self._device] if self._device.type == "cuda" else []
        seed, state = derive(self._seed, f"{self._module}/{purpose}", *numbers), random.getstate()
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            random.seed(seed)
            try:
                yield
            finally:
                random.setstate(state)

    @contextmanager
    def _telling(self, name: str) -> Iterator[None]:
        """Tell of what goes wrong in the module in one line."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # theirs are of any class
            raise UserError(
                f"{name} of {self._module} failed with these arguments: {type(error).__name__}: "
                f"{str(error).strip().partition(chr(10))[0]}"
            ) from error


AnyNetwork = Network | ForeignNetwork


class _AsSaved(nn.Module):
    """A text encoder under the names that its layers have in files, which transformers 5.6 gave up."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_model = text_encoder

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.text_model(*args, **kwargs)


def _takes(method: Callable[..., Any], count: int) -> bool:
    """Return whether a method can be called with so many values; the protocol's have grown over the years."""
    try:
        inspect.signature(method).bind(*range(count))
    except TypeError:
        return False
    return True


def _mended(module: str) -> Any:
    return _mended_lycoris() if module == "lycoris.kohya" else nullcontext()


@contextmanager
def _mended_lycoris() -> Iterator[None]:
    """Let LyCORIS' presets work on a U-Net of diffusers, and leave nothing of a preset in its class.

    4.1.3 names the layers of TimestepEmbedding, which are there for another model, both by class and by name, and
    refuses what it then finds twice. It also tells of each step, and of all classes of other models.
    """
    from lycoris.config import PRESET
    from lycoris.kohya import LycorisNetworkKohya
    from lycoris.logging import logger

    level = logger.level
    logger.setLevel(logging.ERROR)
    before = {name: value for name, value in vars(LycorisNetworkKohya).items() if name.isupper()}
    kept = {name: preset.get("unet_target_module") for name, preset in PRESET.items()}
    for name, classes in kept.items():
        if classes:
            PRESET[name]["unet_target_module"] = [one for one in classes if one != "TimestepEmbedding"]
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            setattr(LycorisNetworkKohya, name, value)
        for name, classes in kept.items():
            if classes:
                PRESET[name]["unet_target_module"] = classes
