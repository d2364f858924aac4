"""O1's account of its refusals: who made them, and how long each kind took."""

from tests.chaos.rows.o1_overload import EARLY_S, Asked, by_refuser


def _refused(refuser: str, at_s: float, took_s: float) -> Asked:
    """Sent 1 s after it was meant to be, which is not the server's fault."""
    return Asked(at_s, sent_s=at_s + 1.0, status=429, first_s=1.0 + took_s, refuser=refuser)


def test_each_place_has_its_own_times_and_those_who_came_early_are_counted() -> None:
    spike_s = 100.0
    late_s = spike_s + EARLY_S
    refused = [_refused("proxy 0", late_s, 0.002) for _ in range(99)]
    refused += [_refused("proxy 0", late_s, 0.3), _refused("coordinator 180", spike_s, 0.2), _refused("", late_s, 0.01)]
    assert by_refuser(refused, spike_s) == [
        "by nobody knows whom: 1, p50 10 ms, p90 10 ms, p99 10 ms, p100 10 ms (in the proxy p50 0 ms, p99 0 ms)",
        "by coordinator: 1 (1 before the spike was 2 s old), p50 200 ms, p90 200 ms, p99 200 ms, p100 200 ms "
        "(in the proxy p50 180 ms, p99 180 ms)",
        "by proxy: 100, p50 2 ms, p90 2 ms, p99 2 ms, p100 300 ms (in the proxy p50 0 ms, p99 0 ms)",
    ]


def test_no_refusals_have_no_account() -> None:
    assert by_refuser([], 0.0) == []
