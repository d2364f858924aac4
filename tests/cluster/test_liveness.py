"""Silence is borne for long alone, for a while when others have lost the process too, and not from a dead node."""

import pytest

from cluster.liveness import LivenessPolicy, is_lost

POLICY = LivenessPolicy(silence_s=30.0, silence_when_away_s=5.0)


@pytest.mark.parametrize(
    ("silent_s", "spoken", "away", "node_away", "lost"),
    [
        (0, True, False, False, False),
        (29.9, True, False, False, False),
        (30, True, False, False, True),
        (4.9, True, True, False, False),
        (5, True, True, False, True),
        (0, True, False, True, False),  # it answers: its node may have lost only its raylet for a moment
        (0.1, True, False, True, True),
        (0, False, False, True, True),  # nothing starts there
        (5, False, False, False, False),
    ],
)
def test_when_a_process_is_given_up(silent_s: float, spoken: bool, away: bool, node_away: bool, lost: bool) -> None:
    assert is_lost(silent_s, spoken=spoken, away=away, node_away=node_away, policy=POLICY) is lost


def test_who_answers_is_never_lost() -> None:
    assert not is_lost(0, spoken=True, away=True)
