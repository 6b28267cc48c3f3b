"""What one process computes for all, and that it asks nothing of the others meanwhile."""

from __future__ import annotations

import pytest

from vitprune.runtime import distributed


def test_all_have_what_the_main_process_computes() -> None:
    assert distributed.on_main(lambda: {"levels": [1.0]}) == {"levels": [1.0]}
    assert distributed.all_gather(3) == [3]


def test_what_the_others_would_miss_is_no_part_of_it() -> None:
    """They wait for one answer; a second would be taken for that of the next question."""
    with pytest.raises(AssertionError):
        distributed.on_main(lambda: distributed.on_main(lambda: 1))
    with pytest.raises(AssertionError):
        distributed.on_main(lambda: distributed.all_gather(1))
    assert distributed.on_main(lambda: 1) == 1
