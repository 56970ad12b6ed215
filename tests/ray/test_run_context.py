from __future__ import annotations

import logging
import re
import threading

import pytest

from ray_jobs.run_context import PlaceFilter, RunContext, current, enter, set_up_logging, within


@pytest.fixture(autouse=True)
def elsewhere():
    """No test leaves its context to the next one."""
    with within(run="", stage="", expert=""):
        yield


def test_a_block_is_somewhere_and_then_back():
    with within(run="smoke-1", stage="train"):
        with within(expert="hate"):
            assert current() == RunContext("smoke-1", "train", "hate")
        assert current() == RunContext("smoke-1", "train")
    assert current() == RunContext()


def test_a_line_says_run_stage_and_expert_whatever_thread_writes_it(capsys: pytest.CaptureFixture[str]):
    set_up_logging()
    set_up_logging()
    logger = logging.getLogger("safetydpo.dpo.descent")
    with within(run="smoke-1", stage="train", expert="hate"):
        thread = threading.Thread(target=lambda: logger.warning("a spike"))
        thread.start()
        thread.join()
    logging.getLogger("ray_jobs.pools").warning("outside")
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d [\d:,]+ WARNING \[run=smoke-1 stage=train expert=hate\] safetydpo\.dpo\.descent: a spike",
        first,
    )
    assert second.endswith("WARNING [-] ray_jobs.pools: outside")


def test_a_record_has_the_three_as_fields():
    enter({"run": "smoke-1", "stage": "pairs", "expert": ""})
    record = logging.LogRecord("ray_jobs", logging.INFO, "", 1, "x", None, None)
    assert PlaceFilter().filter(record)
    assert (record.__dict__["run"], record.__dict__["stage"], record.__dict__["expert"]) == ("smoke-1", "pairs", "")
    assert record.__dict__["place"] == "run=smoke-1 stage=pairs"
