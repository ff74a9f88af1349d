"""The scripts of sd-scripts that are run here, by their paths there."""

from lorasmith.compat import finetune, gen_img, merge_lora, train_network
from lorasmith.compat.table import Script

SCRIPTS: dict[str, Script] = {
    script.name: script for script in (train_network.SCRIPT, *gen_img.SCRIPTS, merge_lora.SCRIPT, *finetune.SCRIPTS)
}
