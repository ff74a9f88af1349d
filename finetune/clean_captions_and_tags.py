"""sd-scripts' finetune/clean_captions_and_tags.py, run by lorasmith: docs/sd-scripts.md."""

import sys

from lorasmith.compat.entry import main

sys.exit(main("finetune/clean_captions_and_tags.py"))
