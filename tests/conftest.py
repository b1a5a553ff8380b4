"""Settings of all tests."""

from hypothesis import settings

# Time is measured in benchmarks/: on a busy machine any example may take long.
settings.register_profile("braid", deadline=None)
settings.load_profile("braid")
