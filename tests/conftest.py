"""For all tests: no test has a time limit, hypothesis' own included, since a busy machine is no mistake; and each has a
cache folder of its own, never the user's. Several workers share the cores, and so do the programs that they start.
"""

import os
from itertools import count

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # before torch is imported, which reads it once
    threads = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
_NUMBERS = count()


@pytest.fixture(autouse=True, scope="session")
def cache_of_all_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The cache of what is run for several tests at once."""
    os.environ["LORASMITH_CACHE"] = str(tmp_path_factory.mktemp("caches") / "shared")


@pytest.fixture(autouse=True)
def own_cache(
    cache_of_all_tests: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty cache for each test."""
    monkeypatch.setenv("LORASMITH_CACHE", str(tmp_path_factory.getbasetemp() / f"cache{next(_NUMBERS)}"))
