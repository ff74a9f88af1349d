"""sd-scripts' finetune/make_captions.py, run by lorasmith: docs/sd-scripts.md."""

import sys

from lorasmith.compat.entry import main

sys.exit(main("finetune/make_captions.py"))
