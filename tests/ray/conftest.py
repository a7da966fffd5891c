"""One cluster for all tests here; without Ray they are skipped."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from clusters import Cluster

collect_ignore_glob = [] if find_spec("ray") else ["test_*.py"]


@pytest.fixture(scope="session")
def cluster():
    made = Cluster()
    yield made
    made.close()
