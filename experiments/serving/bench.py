"""One serving benchmark from settings to JSON lines: look at the server, warm up, repeat, sum up."""

import time
from collections.abc import Callable

import numpy as np

from experiments.serving.arrivals import arrival_times_s
from experiments.serving.client import Client, find_model, open_session
from experiments.serving.load import Load, run_load
from experiments.serving.metrics import Json, details, failure_reasons, summarize
from experiments.serving.prompts import make_prompts
from experiments.serving.report import heading, json_line, medians, table
from experiments.serving.settings import BenchError, ServeSettings

Say = Callable[[str], None]


async def bench_serve(settings: ServeSettings, *, tell: Say, say: Say, api_key: str | None = None) -> Json:
    """Runs it; `tell` gets a JSON line for each repeat and the medians last, `say` what a person reads.

    Returns the last line. Raises BenchError when the server is not there or refuses the first prompt, before any
    measurement, and when not one request was answered, after the last line.
    """
    model = await _prepare(settings, say, api_key)
    asked = heading(settings, model, time.strftime("%Y%m%d-%H%M%S"))
    summaries = []
    for repeat in range(1, settings.repeats + 1):
        load = await _measure(settings, model, repeat, api_key)
        summary = _summary(settings, load)
        say(_progress(repeat, settings.repeats, summary))
        summaries.append(summary)
        more = details(load.results) if settings.detailed else {}
        tell(json_line({**asked, "repeat": repeat, **summary, **more}))
    line = medians(asked, summaries)
    tell(json_line(line))
    say(table(line, settings.percentile_metrics))
    if not any(summary["completed"] for summary in summaries):
        raise BenchError(f"no request was answered: {_first_error(load)}")
    return line


async def _prepare(settings: ServeSettings, say: Say, api_key: str | None) -> str:
    """Finds the model, sends one prompt that must be answered, then the warm-ups. Gives the model's name."""
    first, *others = make_prompts(settings, 1 + settings.num_warmups, 0)
    async with open_session(settings, api_key) as session:
        model = await find_model(session, settings)
        client = Client(session, settings, model)
        result = await client.send(first)
        if result.error:
            raise BenchError(f"the first request failed, so nothing was measured: {result.error}")
        say(f"{settings.base_url} serves {model}; {settings.repeats} x {settings.num_prompts} prompts")
        warm = await run_load(client.send, others, [0.0] * len(others), settings.concurrency)
    if reasons := failure_reasons(warm.results):
        say(f"warm-ups failed: {reasons}")
    return model


async def _measure(settings: ServeSettings, model: str, repeat: int, api_key: str | None) -> Load:
    """One repeat, with prompts, arrivals and connections of its own."""
    prompts = make_prompts(settings, settings.num_prompts, repeat)
    chance = np.random.default_rng([settings.seed, repeat, 1])
    arrivals_s = arrival_times_s(chance, settings.num_prompts, settings.request_rate, settings.burstiness)
    async with open_session(settings, api_key) as session:
        return await run_load(Client(session, settings, model).send, prompts, arrivals_s, settings.concurrency)


def _summary(settings: ServeSettings, load: Load) -> Json:
    figures = summarize(
        load.results,
        load.duration_s,
        metrics=settings.percentile_metrics,
        percentiles=settings.metric_percentiles,
        goodput=settings.goodput,
    )
    return {**figures, "client_cpu_s": load.client_cpu_s}


def _progress(repeat: int, repeats: int, summary: Json) -> str:
    return (
        f"repeat {repeat} of {repeats}: {summary['completed']} answered, {summary['failed']} failed "
        f"in {summary['duration']:.1f} s, {summary['output_throughput']:.1f} tok/s"
    )


def _first_error(load: Load) -> str:
    return next((result.error for result in load.results if result.error), "unknown")
