"""Clients of a throttled cluster: one sequence after another, every log-probability compared, every step timed.

Tokens are drawn at temperature 1 with a seed of the prompt's own: many different ones, and the same ones each time.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from statistics import median

from actors.channels import WireCredentials
from actors.front.coordinator_client import CoordinatorClient
from protos.coordinator_pb2 import FINISH_REASON_LENGTH, Sampling
from tests.support.hot_model import prompt_of
from tests.support.served import submit

FEWEST_TOKENS, LENGTHS = 33, 32
"""Answers have so many tokens and more, of so many lengths: of equal ones all would begin in the same steps, which are
long for their prompts' sake.
"""


class HotLoad:
    """`width` requests at a time, of a family of prompts that may be changed, or of none.

    `wrong` and `failed` are what must stay empty; `golden` is what each prompt was answered the first time: every
    token and its log-probability, bit for bit.
    """

    def __init__(self, address: str, token: str, *, width: int, num_prompts: int = 32) -> None:
        self.family: int | None = 0
        self.golden: dict[tuple[int, int], list[tuple[int, float]]] = {}
        self.wrong: list[str] = []
        self.failed: list[str] = []
        self.answers = 0
        self.tokens: deque[float] = deque(maxlen=1 << 20)
        """When each token came."""
        self.gaps: deque[tuple[float, float]] = deque(maxlen=1 << 20)
        """When each token came that was not the first of its request, and how long after the one before it."""
        self._client = CoordinatorClient(address, WireCredentials(token))
        self._client.open()
        self._num_prompts = num_prompts
        self._next = 0
        self._tasks = [asyncio.create_task(self._ask()) for _ in range(width)]

    async def until(self, holds: Callable[[], bool], timeout_s: float) -> None:
        """Returns when it holds; raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not holds():  # noqa: ASYNC110 - what is waited for may be anything
                await asyncio.sleep(0.05)

    async def more(self, num: int, timeout_s: float = 300.0) -> None:
        """Returns when so many more answers have come."""
        target = self.answers + num
        await self.until(lambda: self.answers >= target, timeout_s)

    def rate(self, since_s: float, until_s: float) -> float:
        """Tokens a second between two times of the monotonic clock."""
        return sum(since_s <= at < until_s for at in self.tokens) / max(until_s - since_s, 1e-9)

    def steps(self, since_s: float, until_s: float) -> list[float]:
        """Gaps between tokens in that time."""
        return [gap for at, gap in self.gaps if since_s <= at < until_s]

    def worst_step(self, since_s: float, until_s: float) -> tuple[float, float]:
        """The longest and the median gap in that time."""
        steps = self.steps(since_s, until_s)
        return max(steps), median(steps)

    async def close(self) -> None:
        """Ends all requests."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.close()

    async def _ask(self) -> None:
        await self._client.connect()
        while True:
            if self.family is None:
                await asyncio.sleep(0.05)
                continue
            self._next += 1
            await self._one(self._next, self.family, self._next % self._num_prompts)

    async def _one(self, request_id: int, family: int, which: int) -> None:
        tokens: list[tuple[int, float]] = []
        before_s: float | None = None
        sampling = Sampling(temperature=1.0, top_p=1.0, repetition_penalty=1.0, seed=which)
        prompt, max_tokens = prompt_of(family, which), FEWEST_TOKENS + which % LENGTHS
        try:
            async for output in self._client.generate(
                submit(request_id, prompt, max_tokens=max_tokens, sampling=sampling, logprobs=1)
            ):
                now_s = time.monotonic()
                self.tokens.extend([now_s] * len(output.token_ids))
                if before_s is not None and output.token_ids:
                    self.gaps.append((now_s, now_s - before_s))
                before_s = now_s
                tokens += [(one.chosen.token_id, one.chosen.logprob) for one in output.logprobs]
            if output.finish_reason != FINISH_REASON_LENGTH:
                self.failed.append(f"{output.error or output.finish_reason}")
                return
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a failed request
            self.failed.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(0.1)
            return
        expected = self.golden.setdefault((family, which), tokens)
        if tokens != expected:
            self.wrong.append(f"prompt {which} of family {family}: {tokens} instead of {expected}")
        self.answers += 1
