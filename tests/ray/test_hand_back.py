"""Whether an actor on a machine that is taken back can end its task; on real nodes in `test_pool_notice_slow`."""

from __future__ import annotations

from ray_jobs.hand_back import Pace


def test_the_rest_of_a_task_fits_or_not():
    """Of 16 batches of 5 s, 10 are done: 6 x 5 = 30 s are needed; with one more done 25 s."""
    pace = Pace(16)
    for _ in range(10):
        pace.begin("a")
        pace.end(5.0)
    pace.begin("a")
    assert pace.fits(30.0)
    assert not pace.fits(29.9)
    pace.end(5.0)
    assert pace.fits(25.0)


def test_the_next_task_is_counted_from_its_first_batch():
    """A task of one batch is over, the next needs all of its 4 x 2 s, and the latest batch says what one takes."""
    pace = Pace(4)
    pace.begin("a")
    pace.end(9.0)
    pace.begin("b")
    assert not pace.fits(35.9)
    pace.end(2.0)
    pace.begin("b")
    assert pace.fits(6.0)
    pace.begin("c")
    assert not pace.fits(7.9)
    assert pace.fits(8.0)


def test_the_very_first_batch_is_tried_and_a_task_that_is_longer_than_thought_counts_one_more():
    pace = Pace(1)
    pace.begin("a")
    assert pace.fits(0.1)
    pace.end(3.0)
    pace.begin("a")
    assert not pace.fits(2.9)
    assert pace.fits(3.0)
