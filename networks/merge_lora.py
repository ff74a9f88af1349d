"""sd-scripts' networks/merge_lora.py, run by lorasmith: docs/sd-scripts.md."""

import sys

from lorasmith.compat.entry import main

sys.exit(main("networks/merge_lora.py"))
