"""For all tests: no test has a time limit, hypothesis' own included, since a busy machine is no mistake."""

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
