"""When a process that does not answer is given up.

Silence alone proves little: a busy process answers late, one that was frozen for a while goes on, a connection may be
broken and the process well. So it is borne for long, unless somebody else has lost the process too. Asking, and ending
processes, is the supervisor's work.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LivenessPolicy:
    """Seconds that a process may leave questions unanswered, alone or while its peers have lost it as well."""

    silence_s: float = 30.0
    silence_when_away_s: float = 5.0


def is_lost(
    silent_s: float, *, spoken: bool, away: bool = False, node_away: bool = False, policy: LivenessPolicy | None = None
) -> bool:
    """True when a process is not waited for any longer.

    `silent_s` is how long ago the first of the questions was put that it has left unanswered, 0 when there is none;
    `spoken` whether it ever answered one, `away` that a coordinator has lost its connection to it, `node_away` that its
    node answers nobody. On such a node nothing will start, and a first silence is the last.
    """
    rules = LivenessPolicy() if policy is None else policy
    if node_away:
        return not spoken or silent_s > 0
    return silent_s >= (rules.silence_when_away_s if away else rules.silence_s)
