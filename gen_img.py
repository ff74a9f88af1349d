"""sd-scripts' gen_img.py, run by lorasmith: docs/sd-scripts.md."""

import sys

from lorasmith.compat.entry import main

sys.exit(main("gen_img.py"))
