"""`python -m lorasmith` is `lorasmith`."""

import sys

from lorasmith.cli import main

sys.exit(main())
