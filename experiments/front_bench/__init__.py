"""What the front door costs: the same requests by three ways into one cluster, in turns.

- `engine`: prompts as token ids over the coordinators' gRPC stream; no HTTP, no text.
- `http`: the front door as `octavo serve` builds it, behind uvicorn in a process of its own, without Ray Serve.
- `serve`: the same behind Ray Serve's proxy, which is what clients of `octavo serve` use.

`ttft`: one request alone, streamed, one token; the time from sending it to the first byte of its answer's body.
`overhead` is that less the time of the engine's steps for this very request, as the coordinator counted them: so it
has client, HTTP, proxy, parsing, chat template, tokenizer, the gRPC message to the coordinator and back, queueing,
detokenizing and the event. `roundtrip` is GET /version by the same way, with nothing behind it.

`throughput`: many streams at once; tokens of all answers by the time from the first request to the last answer's end.
"""
