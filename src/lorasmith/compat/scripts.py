"""The scripts of sd-scripts that are run here, by their paths there."""

from lorasmith.compat import finetune, merge_lora, train_network
from lorasmith.compat.table import Script

SCRIPTS: dict[str, Script] = {
    script.name: script for script in (train_network.SCRIPT, merge_lora.SCRIPT, *finetune.SCRIPTS)
}
