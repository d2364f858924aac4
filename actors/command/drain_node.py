"""`octavo drain-node`: typed on a machine that is about to go, as a pod's preStop does.

Experts there are copied elsewhere, coordinators finish what they have, and streams that go through the front door here
get the rest of the time. Moving is the supervisor's work.
"""

import http.client
import os
import time

import psutil
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from actors import ray_runtime
from actors.command.added_commands import CommandError
from actors.command.status import with_supervisor
from actors.ray_runtime import RuntimeFailure
from cluster.desired_set import MoveRefused

INFLIGHT = "octavo_http_requests_inflight"
ASK_TIMEOUT_S = 5.0
POLL_S = 0.25


def drain_node(
    address: str | None, namespace: str, *, timeout_s: float, settle_s: float, http_port: int, console: Console
) -> None:
    """Returns when nothing is done here any more, after `settle_s` at the earliest: others must hear of it first.

    Times count from the start of this process. Raises CommandError for what is left after `timeout_s`; when nobody
    could be asked it takes all of the settling time first.
    """
    began_s = time.monotonic() - (time.time() - psutil.Process().create_time())
    left: list[str] = []
    failure = None
    try:
        left = with_supervisor(
            address,
            namespace,
            lambda supervisor: supervisor.drain_node(
                ray_runtime.own_node_id(), max(0.0, began_s + timeout_s - time.monotonic())
            ),
        )
    except (RuntimeFailure, MoveRefused) as error:
        failure = f"nothing was moved: {error}"
    requests = wait_for_requests(http_port, began_s + timeout_s)
    time.sleep(max(0.0, began_s + settle_s - time.monotonic()))
    if failure is not None:
        raise CommandError(failure)
    told = [*left, *([f"{requests} requests"] if requests else [])]
    if told:
        raise CommandError(f"still here after {timeout_s:g} s: {', '.join(told)}")
    console.print("nothing runs here any more")


def wait_for_requests(http_port: int, deadline_s: float) -> int:
    """Waits until the front door of this machine has no request, or for the deadline; how many it has then.

    A machine without a front door has none. One that does not say has one, as far as anybody knows.
    """
    while True:
        requests = inflight_requests(http_port)
        if not requests or time.monotonic() >= deadline_s:
            return requests
        time.sleep(POLL_S)


def inflight_requests(http_port: int) -> int:
    """Requests that are being served by the front door of this machine."""
    connection = http.client.HTTPConnection("127.0.0.1", http_port, timeout=ASK_TIMEOUT_S)
    try:
        key = os.environ.get("OPENAI_API_KEY")  # as `octavo chat` has it
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {key}"} if key else {})
        reply = connection.getresponse()
        text = reply.read().decode(errors="replace")
    except ConnectionRefusedError:
        return 0
    except (OSError, http.client.HTTPException):
        return 1
    finally:
        connection.close()
    if reply.status != http.client.OK:
        return 1
    samples = (one for family in text_string_to_metric_families(text) for one in family.samples)
    return int(sum(one.value for one in samples if one.name == INFLIGHT))
