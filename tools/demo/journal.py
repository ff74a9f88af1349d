"""A stage's log: one JSON line for each report, on the screen and added to a file. The seconds count from the start of
the run that wrote the line, so they begin again where a stopped stage went on.
"""

import json
import time
from pathlib import Path


class Journal:
    def __init__(self, path: Path) -> None:
        self._path, self._start = path, time.monotonic()

    def write(self, **values: object) -> None:
        """Add a line with these values and `t`, the seconds so far."""
        line = json.dumps({**values, "t": round(time.monotonic() - self._start)})
        print(f"{self._path.stem}: {line}", flush=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
