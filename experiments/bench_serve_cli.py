"""`octavo bench serve`: what can be typed. The work is done by `experiments.serving`, imported when it is run."""

import math
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

_GOODPUT = re.compile(r"[a-z0-9]+:[0-9.]+")


class ServeCommand(TyperCommand):
    """Takes `--goodput ttft:500 tpot:50` as vLLM does: the flag once, then any number of pairs."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeats the flag before each pair that follows another, then parses as always."""
        spread: list[str] = []
        for arg in args:
            if _GOODPUT.fullmatch(arg) and spread[-2:-1] == ["--goodput"]:
                spread.append("--goodput")
            spread.append(arg)
        return super().parse_args(ctx, spread)


def serve(
    url: Annotated[str, typer.Argument(help="Root of the server, such as http://127.0.0.1:8000.")],
    endpoint: Annotated[str, typer.Option(help="/v1/completions or /v1/chat/completions.")] = "/v1/completions",
    model: Annotated[str | None, typer.Option(help="Model name; the first listed without it.")] = None,
    dataset: Annotated[str, typer.Option(help="random (token ids) or text (windows of --text-path).")] = "random",
    input_len: Annotated[int, typer.Option(help="Tokens of a prompt; for text about so many.")] = 128,
    output_len: Annotated[int, typer.Option(help="Tokens of an answer at most; exactly, with --ignore-eos.")] = 128,
    vocab_size: Annotated[int, typer.Option(help="Random ids are below it.")] = 32_000,
    text_path: Annotated[Path | None, typer.Option(help="UTF-8 text for --dataset text.")] = None,
    num_prompts: Annotated[int, typer.Option(help="Requests of a repeat.")] = 64,
    request_rate: Annotated[float, typer.Option(help="Requests a second; inf sends all at once.")] = math.inf,
    burstiness: Annotated[float, typer.Option(help="Of the arrivals: 1 is Poisson, less is burstier.")] = 1.0,
    max_concurrency: Annotated[int | None, typer.Option(help="Requests in flight at most; 512 without it.")] = None,
    num_warmups: Annotated[int, typer.Option(help="Requests before the first repeat, besides the first check.")] = 0,
    repeats: Annotated[int, typer.Option(help="Repeats; the last line has the medians over them.")] = 1,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    ignore_eos: Annotated[bool | None, typer.Option(help="Answers of full length; by default with random.")] = None,
    goodput: Annotated[list[str] | None, typer.Option(help="Limits of a good request in ms: ttft:500 tpot:50.")] = None,
    percentile_metrics: Annotated[
        str, typer.Option(help="Of ttft, tpot, itl, e2el, client_queue_time.")
    ] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[str, typer.Option(help="Percentiles of those.")] = "50,90,99",
    timeout_s: Annotated[float, typer.Option(help="A request that takes longer has failed.")] = 600.0,
    detailed: Annotated[bool, typer.Option("--detailed", help="Lengths, times, texts and errors of all.")] = False,
) -> None:
    """Load an OpenAI-compatible server and measure it with the names and definitions of vLLM's bench serve.

    JSON lines on stdout, one for each repeat and one with the medians; a table on stderr. Token counts are the
    server's own. An inter-token latency is the time between two chunks, however many tokens a chunk has.
    """
    arguments: dict[str, Any] = dict(locals())
    import asyncio
    import os
    import sys

    from experiments.serving.bench import bench_serve
    from experiments.serving.settings import ServeSettings, parse_goodput, parse_metrics, parse_percentiles

    settings = ServeSettings(
        **{
            **arguments,
            "goodput": parse_goodput(goodput or ()),
            "percentile_metrics": parse_metrics(percentile_metrics),
            "metric_percentiles": parse_percentiles(metric_percentiles),
        }
    )

    def tell(line: str) -> None:
        print(line, flush=True)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    asyncio.run(bench_serve(settings, tell=tell, say=say, api_key=os.environ.get("OPENAI_API_KEY")))
