"""The scripts of sd-scripts that are run here, by their paths there."""

from lorasmith.compat import finetune, merge_lora
from lorasmith.compat.table import Script

SCRIPTS: dict[str, Script] = {script.name: script for script in (merge_lora.SCRIPT, *finetune.SCRIPTS)}
