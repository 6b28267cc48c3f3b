"""A real model of real size: images don't see their batch."""

from __future__ import annotations

import pytest
from batches import POLICIES, check
from samples import SHARED


@pytest.mark.shared
@pytest.mark.parametrize("policy", ["as-vit", "redundancy"])
def test_dinov2_images_do_not_see_their_batch(policy: str) -> None:
    check(SHARED / "models" / "dinov2-small-fashion-mnist", SHARED / "data" / "fashion-mnist", POLICIES[policy])
