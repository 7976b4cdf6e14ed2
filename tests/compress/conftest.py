"""The parent that most of these tests compress."""

from pathlib import Path

import pytest
from parents import Parent, make_parent


@pytest.fixture
def parent(tmp_path: Path) -> Parent:
    return make_parent(tmp_path)
