"""LoRAs that are a part of the base model in a run (`base_loras`): checked before it is loaded, then folded into it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorasmith import merging
from lorasmith.checkpoint import file_sha256
from lorasmith.config import ModelSection
from lorasmith.errors import UserError
from lorasmith.merging import Addition, Strength
from lorasmith.model_families import AdapterPlace


@dataclass(frozen=True)
class BaseLoras:
    """The LoRAs in their order, and what stands for each in a state and in the names of what is cached."""

    additions: Sequence[Addition]
    ratios: Sequence[float]
    identities: Sequence[str]

    def names(self) -> list[tuple[str, float]]:
        """Return the files' names with their ratios."""
        return [(one.file.path.name, ratio) for one, ratio in zip(self.additions, self.ratios, strict=True)]

    def lines(self) -> list[str]:
        """Say for the plan what is folded in."""
        counts = [len(one.factors) for one in self.additions]
        return [f"with {n} x {r:g} folded in: {c} layers" for (n, r), c in zip(self.names(), counts, strict=True)]


def read(options: ModelSection, family: str, places: Mapping[str, AdapterPlace]) -> BaseLoras:
    """Read the LoRAs and check that they fit the base model.

    Raises:
        UserError: one of them does not fit, or there are more or fewer ratios than files.
    """
    ratios = options.base_lora_ratios or [1.0] * len(options.base_loras)
    if len(ratios) != len(options.base_loras):
        raise UserError(
            f"base_loras names {len(options.base_loras)} files, but base_lora_ratios has {len(ratios)} numbers; give "
            "one for each, or none."
        )
    pairs = list(zip(options.base_loras, ratios, strict=True))
    additions = [merging.plan(path, family, places, Strength(ratio, ratio)) for path, ratio in pairs]
    return BaseLoras(additions, ratios, [f"base LoRA {file_sha256(path)} x {ratio!r}" for path, ratio in pairs])
