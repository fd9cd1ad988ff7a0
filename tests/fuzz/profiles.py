"""How much is tried: a few hundred examples, always the same, or with `FUZZ=nightly` thousands of new ones."""

import os

from hypothesis import HealthCheck, settings


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("fuzz-ci", derandomize=True, database=None, **QUIET)
settings.register_profile("fuzz-nightly", print_blob=True, **QUIET)


def tries(ci: int, nightly: int) -> settings:
    """Settings of a test that tries so many examples."""
    is_nightly = os.environ.get("FUZZ") == "nightly"
    profile = settings.get_profile("fuzz-nightly" if is_nightly else "fuzz-ci")
    return settings(profile, max_examples=nightly if is_nightly else ci)
