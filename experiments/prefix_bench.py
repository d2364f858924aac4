"""What a repeated prefix costs: the same beginning asked for again and again, beside its first prefill, in one run.

Each round has a beginning of its own, and asks four times, one after the other, each timed from the request to its
first token:
- `first`: the beginning with an ending, which nobody has computed;
- `repeated`: the beginning with another ending;
- `whole`: that same prompt again, of which only what follows the last whole block, at least one token, is computed;
- `stranger`: that same prompt under another salt, which finds nothing: once more what a first prefill costs, and the
  answer that `repeated` and `whole` must give, bit for bit.

What can be typed is `experiments.bench_prefix_cli`'s; starting a cluster is `experiments.engine_bench.cluster`'s.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

from rich.console import Console

from actors import ray_runtime
from actors.front.coordinator_client import CoordinatorClient
from cluster.config import ClusterConfig
from cluster.ids import SequenceId
from cluster.scheduler import Scheduler, SchedulerConfig
from cluster.sequence import Sequence as Request
from experiments.engine_bench.cluster import ClusterContestant
from experiments.engine_bench.failures import BenchError
from experiments.engine_bench.report import JsonLines
from experiments.engine_bench.session import prompt_maker, stop_on_signals, stopping_in_order
from model.storage.checkpoint import Checkpoint
from protos.coordinator_pb2 import FINISH_REASON_LENGTH, Sampling, Submit
from protos.outputs import is_last

BAR = 0.10
"""Of the first prefill, what a repeated prefix may cost."""

ENDING_LEN = 8
"""Tokens of a prompt behind its beginning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`rounds` beginnings of `prefix_len` tokens, each asked for four times with answers of `output_len`."""

    config: ClusterConfig
    prefix_len: int
    output_len: int
    rounds: int
    seed: int

    @property
    def prompt_len(self) -> int:
        """Tokens of every prompt."""
        return self.prefix_len + ENDING_LEN


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds to the first token, prompt tokens that were not computed, and what was said, with its logprobs."""

    first_s: float
    num_cached: int
    tokens: tuple[int, ...]
    logprobs: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Seconds to the first token of each kind of asking, tokens found, and whether all answers were the same bits."""

    first_s: float
    repeated_s: float
    whole_s: float
    stranger_s: float
    repeated_cached: int
    whole_cached: int
    same: bool

    @property
    def repeated_ratio(self) -> float:
        """Of the first prefill: the mean of both that were computed whole, on either side of it."""
        return 2 * self.repeated_s / (self.first_s + self.stranger_s)

    @property
    def whole_ratio(self) -> float:
        """The same for the whole prompt."""
        return 2 * self.whole_s / (self.first_s + self.stranger_s)

    def to_json(self, number: int) -> dict[str, object]:
        """The line of stdout."""
        ratios = {"repeated_ratio": self.repeated_ratio, "whole_ratio": self.whole_ratio}
        return {"type": "round", "round": number, **asdict(self), **ratios}


def run(plan: Plan, out: JsonLines, console: Console) -> None:
    """Measures on a cluster of its own. Raises BenchError or what starting a cluster raises."""
    checkpoint = Checkpoint.open(Path(plan.config.model))
    longest = plan.prompt_len + plan.output_len
    if longest > checkpoint.config.max_context:
        raise BenchError(f"{longest} tokens a sequence, but the model's context is {checkpoint.config.max_context}")
    # One more beginning, for a round that is not counted: what is made once is made now.
    prompts = prompt_maker(checkpoint)(plan.rounds + 1, plan.prompt_len + ENDING_LEN, plan.seed)
    with stopping_in_order() as undo:
        console.print("starting Ray ...")
        ray_runtime.start_local(plan.config.namespace)
        undo.callback(ray_runtime.disconnect)
        stop_on_signals()
        cluster = ClusterContestant("octavo", plan.config, len(os.sched_getaffinity(0)), console)
        undo.callback(cluster.close)
        out.write(_setup(plan, checkpoint, cluster))
        done: list[Round] = []
        for number, ids in enumerate(prompts):
            beginning, rest = ids[: plan.prefix_len], ids[plan.prefix_len :]
            endings = (rest[:ENDING_LEN], rest[ENDING_LEN:])
            one = cluster.measure(
                partial(
                    run_round,
                    beginning=beginning,
                    endings=endings,
                    output_len=plan.output_len,
                    name=f"round {number}",
                )
            )
            if number:
                done.append(one)
                out.write(one.to_json(number))
    told = summary(done, plan.prompt_len)
    out.write(told)
    console.print(
        f"a repeated prefix of {plan.prefix_len} tokens costs {100 * done_ratio(done):.1f} % of its first prefill "
        f"(the bar is {100 * BAR:.0f} %), answers {'equal bit for bit' if told['same_bits'] else 'NOT EQUAL'}"
    )
    if not told["same_bits"]:
        raise BenchError("what was found in the cache changed an answer")


def done_ratio(rounds: Sequence[Round]) -> float:
    """The median ratio of a repeated prefix."""
    return median(one.repeated_ratio for one in rounds)


def _setup(plan: Plan, checkpoint: Checkpoint, cluster: ClusterContestant) -> dict[str, object]:
    limits = SchedulerConfig(
        max_num_seqs=plan.config.max_num_seqs,
        max_num_batched_tokens=plan.config.max_num_batched_tokens,
        block_size=plan.config.block_size,
        max_waiting_requests=plan.config.max_waiting_requests,
        max_waiting_tokens=plan.config.max_waiting_tokens,
        max_model_len=checkpoint.config.max_context,
    )
    return {
        "type": "setup",
        "model": checkpoint.path.name,
        "weights_id": checkpoint.weights_id,
        "prefix_len": plan.prefix_len,
        "block_size": plan.config.block_size,
        "planning_us": planning_us(limits, plan.prefix_len),
        **cluster.facts,
    }


async def ask(client: CoordinatorClient, prompt: Sequence[int], output_len: int, salt: str) -> Answer:
    """One request, alone. Raises BenchError where it ends early, or CoordinatorLost."""
    submit = Submit(
        request_id=1,
        prompt_token_ids=prompt,
        max_tokens=output_len,
        ignore_eos=True,
        logprobs=3,
        cache_salt=salt.encode(),
        sampling=Sampling(temperature=0.0, top_p=1.0, repetition_penalty=1.0, seed=1),
    )
    began_s, first_s, cached = time.perf_counter(), 0.0, 0
    tokens: list[int] = []
    logprobs: list[bytes] = []
    async for output in client.generate(submit):
        if output.token_ids and not tokens:
            first_s, cached = time.perf_counter() - began_s, output.num_cached_tokens
        tokens += output.token_ids
        logprobs += [one.SerializeToString(deterministic=True) for one in output.logprobs]
        if is_last(output) and output.finish_reason != FINISH_REASON_LENGTH:
            raise BenchError(f"the cluster ended a sequence early: {output.error or output.finish_reason}")
    return Answer(first_s, cached, tuple(tokens), tuple(logprobs))


async def run_round(
    client: CoordinatorClient, beginning: Sequence[int], endings: Sequence[Sequence[int]], output_len: int, name: str
) -> Round:
    """All four, `name` being a salt that nobody has used. Raises BenchError or CoordinatorLost."""
    prompt = [*beginning, *endings[1]]
    first = await ask(client, [*beginning, *endings[0]], output_len, name)
    repeated = await ask(client, prompt, output_len, name)
    whole = await ask(client, prompt, output_len, name)
    stranger = await ask(client, prompt, output_len, name + " another")
    if first.num_cached or stranger.num_cached:
        raise BenchError("what nobody had asked for was found: is the cluster used by others?")
    said = {(one.tokens, one.logprobs) for one in (repeated, whole, stranger)}
    return Round(
        first_s=first.first_s,
        repeated_s=repeated.first_s,
        whole_s=whole.first_s,
        stranger_s=stranger.first_s,
        repeated_cached=repeated.num_cached,
        whole_cached=whole.num_cached,
        same=len(said) == 1,
    )


def summary(rounds: Sequence[Round], prompt_len: int) -> dict[str, object]:
    """The last line: medians over rounds."""

    def middle(read: Callable[[Round], float]) -> float:
        return median(map(read, rounds))

    return {
        "type": "summary",
        "rounds": len(rounds),
        "prompt_len": prompt_len,
        "first_ms": 1e3 * middle(lambda one: one.first_s),
        "repeated_ms": 1e3 * middle(lambda one: one.repeated_s),
        "whole_ms": 1e3 * middle(lambda one: one.whole_s),
        "stranger_ms": 1e3 * middle(lambda one: one.stranger_s),
        "repeated_ratio": done_ratio(rounds),
        "whole_ratio": middle(lambda one: one.whole_ratio),
        "same_bits": all(one.same for one in rounds),
        "bar": BAR,
    }


def planning_us(config: SchedulerConfig, prompt_len: int, repeats: int = 200) -> dict[str, float]:
    """Microseconds of scheduling for a prompt that nobody has asked for, from its arrival to its first token.

    With and without the cache, in turns; `hashing` is the difference, which nobody else's work is in.
    """
    costs: dict[bool, list[float]] = {True: [], False: []}
    blocks = 4 * -(-prompt_len // config.block_size)
    schedulers = {caching: Scheduler(replace(config, prefix_caching=caching), blocks) for caching in costs}
    for number in range(2 * repeats):
        caching = number % 2 == 0
        costs[caching].append(_plan_one(schedulers[caching], number, prompt_len))
    on, off = (1e6 * median(costs[caching]) for caching in (True, False))
    return {"cache_on": on, "cache_off": off, "hashing": on - off}


def _plan_one(scheduler: Scheduler, number: int, prompt_len: int) -> float:
    prompt = tuple((number * 7919 + place) % 30_000 for place in range(prompt_len))
    request = Request(seq_id=SequenceId(number), prompt_ids=prompt, max_tokens=1)
    began_s = time.perf_counter()
    scheduler.add(request)
    while not request.is_finished:
        batch = scheduler.schedule(0.0)
        scheduler.postprocess(batch, {request.seq_id: [1]})
    return time.perf_counter() - began_s
