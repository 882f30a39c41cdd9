"""What every test may rely on: no settings and no network of the developer's, and the shared data.

Set before anything else is imported, since Hugging Face libraries read their variables at import.
"""

from __future__ import annotations

import os
from pathlib import Path

for _name in [name for name in os.environ if name.startswith("KVSERVE_")]:
    del os.environ[_name]
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# The time of one example says more about the machine than about the code.
settings.register_profile("kvserve", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvserve")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models, templates and sessions; the test is skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data")
    return folder
