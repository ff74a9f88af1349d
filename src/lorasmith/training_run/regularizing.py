"""What holds a run's adapters back, as its options say it, and whether these adapters can be held back so."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from lorasmith import plugins
from lorasmith.adapters.base import Adapter
from lorasmith.config import NetworkSection, TrainConfig
from lorasmith.dropout import DropoutRates
from lorasmith.errors import UserError
from lorasmith.foreign_network import AnyNetwork, ForeignNetwork
from lorasmith.network import Rule, adapter_class, match
from lorasmith.regularizers import Regularizers


def regularizers_of(cfg: TrainConfig, network: AnyNetwork) -> Regularizers | ForeignNetwork:
    """Return what holds the network's adapters back; a network of another program does so itself.

    Raises:
        UserError: the starting weights' adapters cannot be held back so.
    """
    if isinstance(network, ForeignNetwork):
        return network
    options = cfg.network
    _check(options, network.adapters.values())
    return Regularizers(
        network,
        _rates(options),
        seed=cfg.training.seed,
        product_decay=options.product_decay,
        max_norm=options.max_norm,
    )


def check_adapters(network: NetworkSection, shapes: Mapping[str, Sequence[int]], rules: Sequence[Rule]) -> None:
    """Refuse, before anything is loaded, what adapters of these types cannot be held back by.

    Raises:
        UserError: names the type, and those that can.
    """
    _check(network, _examples(shapes, rules))


def _examples(shapes: Mapping[str, Sequence[int]], rules: Sequence[Rule]) -> Iterator[Adapter]:
    """Yield a new adapter of each rule, for the smallest of its layers."""
    matched = match(shapes, rules)
    for rule in rules:
        if own := [shapes[name] for name, first in matched.items() if first is rule]:
            yield adapter_class(rule.adapter)(min(own, key=math.prod), rule.rank, rule.alpha, **rule.options)


def _rates(network: NetworkSection) -> DropoutRates:
    return DropoutRates(network.neuron_dropout, network.rank_dropout, network.module_dropout)


def _check(network: NetworkSection, adapters: Iterable[Adapter]) -> None:
    if not _rates(network).has_inner and network.max_norm is None:
        return
    for adapter in adapters:
        kind = type(adapter)
        if _rates(network).has_inner and not kind.has_inner_dropout:
            able = [name for name in plugins.names("adapters") if adapter_class(name).has_inner_dropout]
            raise UserError(
                "neuron_dropout and rank_dropout leave something out between two factors, and there is no such place "
                f"in a {kind.__name__}; give --module-dropout, which all types have, or --adapter {' or '.join(able)}."
            )
        if network.max_norm is not None:
            try:
                adapter.scale_(1.0)
            except ValueError as error:
                raise UserError(f"max_norm scales adapters down: {error}.") from error
