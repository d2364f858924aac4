"""The life of one process, decision by decision."""

import pytest

from cluster.processes import Phase, ProcessPolicy, ProcessView, Record, Start, Stop, keep

POLICY = ProcessPolicy(backoff_base_s=1.0, backoff_cap_s=8.0, stable_s=30.0, start_timeout_s=100.0, stop_timeout_s=10.0)


class Life:
    """One process id through successive decisions."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.wanted = True
        self.blocked = False

    def see(self, now_s: float, incarnation: int = 0, phase: Phase | None = None) -> Start | Stop | None:
        views = [] if phase is None else [ProcessView("a", incarnation, phase, detail="killed by signal 9")]
        actions, self.records = keep(
            ["a"] if self.wanted else [],
            views,
            now_s,
            self.records,
            blocked=["a"] if self.blocked else [],
            policy=POLICY,
        )
        assert len(actions) <= 1
        return actions[0] if actions else None

    @property
    def record(self) -> Record:
        return self.records["a"]


def ready() -> Life:
    life = Life()
    assert life.see(0.0) == Start("a", 1)
    assert life.see(1.0, 1, Phase.STARTING) is None
    assert life.see(2.0, 1, Phase.READY) is None
    return life


def test_a_wanted_process_is_started_once() -> None:
    life = Life()
    assert life.see(0.0) == Start("a", 1)
    for now_s in (0.0, 1.0, 50.0):
        assert life.see(now_s) is None, "it may yet show"
    assert life.see(60.0, 1, Phase.STARTING) is None
    assert life.see(61.0, 1, Phase.READY) is None
    assert life.record.phase is Phase.READY


def test_the_first_failure_is_followed_by_a_start_at_once() -> None:
    life = ready()
    assert life.see(3.0, 1, Phase.DEAD) == Start("a", 2)
    assert life.record.failures == 1
    assert life.record.detail == "killed by signal 9"


def test_an_old_tombstone_says_nothing_of_the_new_process() -> None:
    life = ready()
    life.see(3.0, 1, Phase.DEAD)
    for now_s in (3.5, 4.0, 90.0):
        assert life.see(now_s, 1, Phase.DEAD) is None
    assert life.record.failures == 1


def test_who_was_seen_and_is_no_more_is_dead() -> None:
    assert ready().see(3.0) == Start("a", 2)


def test_pauses_double_up_to_the_cap_and_a_stable_time_forgives() -> None:
    life = Life()
    pauses = []
    now_s = 0.0
    for incarnation in range(1, 8):
        asked_s = now_s
        while life.see(now_s, incarnation - 1, Phase.DEAD if incarnation > 1 else None) is None:
            now_s += 0.5
        pauses.append(now_s - asked_s)
        life.see(now_s, incarnation, Phase.STARTING)
    assert pauses == [0.0, 0.0, 1.0, 2.0, 4.0, 8.0, 8.0]
    assert life.record.failures == 6
    life.see(now_s, 7, Phase.READY)
    life.see(now_s + 29.0, 7, Phase.READY)
    assert life.record.failures == 6
    life.see(now_s + 30.0, 7, Phase.READY)
    assert (life.record.failures, life.record.detail) == (0, "")


def test_a_start_that_never_shows_is_given_up_and_tried_again() -> None:
    life = Life()
    life.see(0.0)
    assert life.see(99.0) is None
    assert life.see(100.0) == Stop("a", 1, False, "not ready after 100 s")
    assert life.see(105.0) is None, "it may yet show"
    assert life.see(110.0) == Start("a", 2)
    assert life.record.failures == 1


def test_a_start_that_hangs_is_stopped_and_tried_again_when_it_is_gone() -> None:
    life = Life()
    life.see(0.0)
    assert life.see(5.0, 1, Phase.STARTING) is None
    assert life.see(100.0, 1, Phase.STARTING) == Stop("a", 1, False, "not ready after 100 s")
    assert life.see(105.0, 1, Phase.STARTING) is None
    assert life.see(106.0, 1, Phase.DEAD) == Start("a", 2)
    assert life.record.failures == 1, "one failure, not two"


def test_an_unwanted_process_is_drained_and_a_starting_one_is_not() -> None:
    life = ready()
    life.wanted = False
    assert life.see(5.0, 1, Phase.READY) == Stop("a", 1, True, "not wanted any more")
    assert life.see(6.0, 1, Phase.STOPPING) is None
    assert life.see(7.0) is None
    assert life.records == {}
    starting = Life()
    starting.see(0.0)
    starting.wanted = False
    assert starting.see(1.0, 1, Phase.STARTING) == Stop("a", 1, False, "not wanted any more")


def test_a_stop_that_does_not_happen_is_repeated_with_force() -> None:
    life = ready()
    life.wanted = False
    life.see(5.0, 1, Phase.READY)
    assert life.see(14.0, 1, Phase.READY) is None
    assert life.see(15.0, 1, Phase.STOPPING) == Stop("a", 1, False, "still there after 10 s of stopping")
    assert life.see(16.0, 1, Phase.STOPPING) is None


def test_wanted_again_while_it_stops_it_is_started_afresh_without_blame() -> None:
    life = ready()
    life.wanted = False
    life.see(5.0, 1, Phase.READY)
    life.wanted = True
    assert life.see(6.0, 1, Phase.READY) is None
    assert life.see(7.0, 1, Phase.DEAD) == Start("a", 2)
    assert life.record.failures == 0


def test_a_start_called_back_unseen_is_not_doubled() -> None:
    life = Life()
    life.see(0.0)
    life.wanted = False
    assert life.see(1.0) == Stop("a", 1, False, "not wanted any more")
    life.wanted = True
    assert life.see(2.0) is None, "the first may yet show"
    assert life.see(3.0, 1, Phase.STARTING) is None
    assert life.see(4.0) == Start("a", 2)


def test_a_blocked_process_is_kept_but_not_started() -> None:
    life = Life()
    life.blocked = True
    assert life.see(0.0) is None
    life.blocked = False
    life.see(1.0)
    life.see(2.0, 1, Phase.READY)
    life.blocked = True
    assert life.see(3.0, 1, Phase.READY) is None
    assert life.see(4.0, 1, Phase.DEAD) is None
    life.blocked = False
    assert life.see(5.0, 1, Phase.DEAD) == Start("a", 2)


def test_a_process_of_an_earlier_supervisor_is_adopted() -> None:
    life = Life()
    assert life.see(0.0, 7, Phase.READY) is None
    assert life.record.incarnation == 7
    assert life.see(1.0, 7, Phase.DEAD) == Start("a", 8)


def test_one_that_stops_of_its_own_accord_is_started_again_when_it_is_gone() -> None:
    life = ready()
    assert life.see(3.0, 1, Phase.STOPPING) is None
    assert life.see(4.0, 1, Phase.DEAD) == Start("a", 2)


def test_actions_come_in_order_of_ids() -> None:
    actions, records = keep(["b", "a"], [ProcessView("c", 1, Phase.READY)], 0.0, {}, policy=POLICY)
    assert actions == (Start("a", 1), Start("b", 1), Stop("c", 1, True, "not wanted any more"))
    assert list(records) == ["a", "b", "c"]


def test_absence_is_not_an_observation() -> None:
    with pytest.raises(AssertionError, match="observed to be absent"):
        ProcessView("a", 1, Phase.ABSENT)


@pytest.mark.parametrize(("failures", "pause_s"), [(0, 0.0), (1, 0.0), (2, 1.0), (3, 2.0), (9, 8.0), (9999, 8.0)])
def test_pauses_as_a_value(failures: int, pause_s: float) -> None:
    assert POLICY.backoff_s(failures) == pause_s
