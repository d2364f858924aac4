"""A served model under fuzzed HTTP, a thousand requests: `python -m tests.fuzz http` sends 100,000 at Ray Serve."""

import asyncio
import json

import psutil
import pytest

from tests.fuzz import cluster_process
from tests.fuzz.http_campaign import MAX_MODEL_LEN, HttpReport, campaign, write_model
from tests.fuzz.http_client import Answer
from tests.fuzz.http_requests import asked

REQUESTS = 1000


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> HttpReport:
    home = tmp_path_factory.mktemp("http")
    log = home / "cluster.log"

    async def work() -> HttpReport:
        process, facts = await cluster_process.spawn(log, model_dir=str(write_model(home)), max_model_len=MAX_MODEL_LEN)
        try:
            victim = psutil.Process(process.pid)
            return await campaign(facts["url"], lambda: {"cluster": victim}, requests=REQUESTS, seed=1)
        finally:
            await cluster_process.end(process)

    found = asyncio.run(work())
    assert "Traceback" not in log.read_text(errors="replace"), log.read_text(errors="replace")[-4000:]
    return found


def test_nothing_but_what_is_promised(report: HttpReport) -> None:
    assert report.requests == REQUESTS
    assert report.undeclared_5xx == 0, report.shown
    assert report.unanswered == 0, report.shown
    assert report.unexpected_errors == 0, report.shown
    assert report.restarts == 0
    assert report.statuses[200] > 50, "some of it is right, and some of it is not"
    assert report.statuses[400] > 100


def test_golden_streams_say_what_they_always_said(report: HttpReport) -> None:
    assert report.golden_streams >= 8
    assert report.golden_wrong == 0, report.shown


def test_memory_stays_within_its_bound(report: HttpReport) -> None:
    assert report.rss_growth <= 50 << 20, report.grew
    assert report.held
    assert json.loads(json.dumps(report.line()))["requests"] == REQUESTS


def test_requests_are_a_function_of_seed_and_number() -> None:
    once = [asked(1, number) for number in range(300)]
    assert once == [asked(1, number) for number in range(300)]
    assert once != [asked(2, number) for number in range(300)]
    assert any(one.leave_after is not None for one in once)
    assert sum(one.well_formed for one in once) > 150


@pytest.mark.parametrize(
    ("answer", "undeclared"),
    [
        (Answer(500, b'{"error": {"code": "internal_error"}}'), True),
        (Answer(502, b""), True),
        (Answer(503, b"no replica"), True),
        (Answer(503, b'{"error": {"code": "service_unavailable"}}'), False),
        (Answer(504, b'{"error": {"code": "request_timeout"}}'), False),
        (Answer(504, b'{"error": {"code": "service_unavailable"}}'), True),
        (Answer(400, b""), False),
        (Answer(0, b""), False),
    ],
)
def test_what_counts_as_undeclared(answer: Answer, undeclared: bool) -> None:
    assert answer.undeclared is undeclared
