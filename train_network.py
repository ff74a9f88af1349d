"""sd-scripts' train_network.py, run by lorasmith: docs/sd-scripts.md."""

import sys

from lorasmith.compat.entry import main

sys.exit(main("train_network.py"))
