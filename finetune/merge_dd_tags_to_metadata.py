"""sd-scripts' finetune/merge_dd_tags_to_metadata.py, run by lorasmith: docs/sd-scripts.md."""

import sys

from lorasmith.compat.entry import main

sys.exit(main("finetune/merge_dd_tags_to_metadata.py"))
