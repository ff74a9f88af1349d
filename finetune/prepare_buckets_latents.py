"""sd-scripts' finetune/prepare_buckets_latents.py, run by lorasmith: docs/sd-scripts.md."""

import sys

from lorasmith.compat.entry import main

sys.exit(main("finetune/prepare_buckets_latents.py"))
