"""The table of ControlNets' names, against diffusers' own conversion and its modules."""

import torch
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

from lorasmith.models.keys import sd_control
from tests.tiny import build_tiny_control


def test_the_table_is_what_diffusers_makes_of_original_names() -> None:
    expected = build_tiny_control().state_dict()
    tables = [sd_control.original(prefix) for prefix in sd_control.PREFIXES]
    for table in tables:
        stored = {table[module].name: tensor for module, tensor in expected.items()}
        found = convert_controlnet_checkpoint(stored, {"layers_per_block": 2})
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert expected.keys() <= sd_control.diffusers().keys()
