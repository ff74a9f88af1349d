"""`python -m lorasmith.compat networks/merge_lora.py ...` is `python networks/merge_lora.py ...`, without a clone."""

import sys
from pathlib import PureWindowsPath

from lorasmith.compat.entry import main
from lorasmith.compat.scripts import SCRIPTS

name = PureWindowsPath(sys.argv[1]).as_posix() if len(sys.argv) > 1 else ""
if name not in SCRIPTS:
    sys.exit(f"lorasmith: expected the name of a script, one of {', '.join(SCRIPTS)}")
sys.exit(main(name, sys.argv[2:]))
