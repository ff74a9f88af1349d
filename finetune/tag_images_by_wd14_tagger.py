"""sd-scripts' finetune/tag_images_by_wd14_tagger.py, run by lorasmith: docs/sd-scripts.md."""

import sys

from lorasmith.compat.entry import main

sys.exit(main("finetune/tag_images_by_wd14_tagger.py"))
