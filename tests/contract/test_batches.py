"""The same real images in batches of 1, 7 and 64, shuffled: the same tokens and the same answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from batches import POLICIES, check

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart"


@pytest.mark.parametrize("policy", POLICIES)
def test_quickstart_images_do_not_see_their_batch(policy: str) -> None:
    check(QUICKSTART / "checkpoint", QUICKSTART / "data", POLICIES[policy])
