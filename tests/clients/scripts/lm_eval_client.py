"""lm-eval over `local-completions`: what it scores through the server against transformers, fp32, same checkpoint.

Runs in an environment of its own, in which torch and transformers are this project's (see `tests.clients`).
"""

import json
import urllib.error
import urllib.request
from pathlib import Path

import lm_eval
import lm_eval.tasks
import torch
import transformers
from checking import Server, Unsupported, main

TOLERANCE = 1e-3
QUESTIONS = [
    {"question": "The capital of France is", "choices": [" Paris", " Rome", " a river"], "answer": 0},
    {"question": "Two and two make", "choices": [" four", " five", " a number that is even"], "answer": 0},
    {"question": "Über die Brücke geht", "choices": [" ein Weg — 橋", " niemand"], "answer": 0},
    {"question": "x", "choices": ["y", "z"], "answer": 1},
]
CHOICES = """
task: octavo_choices
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
WRITING = """
task: octavo_writing
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{until: ["never said"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def evaluate(server, task, text, **more):
    """The samples of one task, each with the requests that were made for it and the answers to them."""
    folder = Path(server.scratch)
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    (folder / f"{task}.yaml").write_text(text.format(data=data))
    arguments = {"model": server.model, "base_url": f"{server.v1}/completions", "max_length": server.facts["context"]}
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={**arguments, "num_concurrent": 1, "max_retries": 1, "timeout": 120, **more},
        tasks=[task],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = found["samples"][task]
    assert len(samples) == len(QUESTIONS)
    return samples


def hf(server):
    return {"tokenizer_backend": "huggingface", "tokenizer": server.model_dir}


def remote(server):
    """The arguments for a tokenizer that is asked over HTTP."""
    try:
        urllib.request.urlopen(f"{server.url}/tokenizer_info", timeout=120).close()
    except urllib.error.HTTPError as error:
        raise Unsupported(f"/tokenizer_info answers {error.code}") from None
    return {"tokenizer_backend": "remote", "tokenized_requests": True}


def hold_to_transformers(server, samples):
    """Every log-likelihood, and whether its continuation is the greedy one."""
    model = transformers.AutoModelForCausalLM.from_pretrained(server.model_dir, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(server.model_dir)
    worst, num_compared = 0.0, 0
    for sample in samples:
        for place, request in enumerate(sample["arguments"]):
            context, continuation = request[0], request[1]
            whole = tokenizer.encode(context + continuation, add_special_tokens=False)
            start = len(tokenizer.encode(context, add_special_tokens=False))
            with torch.no_grad():
                logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            expected = sum(float(logprobs[at - 1, whole[at]]) for at in range(start, len(whole)))
            greedy = all(int(logprobs[at - 1].argmax()) == whole[at] for at in range(start, len(whole)))
            found, said_greedy = sample["filtered_resps"][place]
            worst = max(worst, abs(float(found) - expected))
            assert greedy == (str(said_greedy) == "True")
            num_compared += 1
    assert num_compared == sum(len(one["choices"]) for one in QUESTIONS)
    print(f"{num_compared} log-likelihoods, largest difference {worst:.2e}")
    assert worst < TOLERANCE, worst


def check_log_likelihoods_are_those_of_transformers(server: Server) -> None:
    hold_to_transformers(server, evaluate(server, "octavo_choices", CHOICES, **hf(server)))


def check_log_likelihoods_with_a_remote_tokenizer(server: Server) -> None:
    hold_to_transformers(server, evaluate(server, "octavo_choices", CHOICES, **remote(server)))


def check_batched_requests_score_the_same(server: Server) -> None:
    hold_to_transformers(server, evaluate(server, "octavo_choices", CHOICES, batch_size=4, **hf(server)))


def check_generation_is_greedy_as_in_transformers(server: Server) -> None:
    samples = evaluate(server, "octavo_writing", WRITING, **hf(server))
    model = transformers.AutoModelForCausalLM.from_pretrained(server.model_dir, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(server.model_dir)
    for sample in samples:
        ids = tokenizer.encode(sample["arguments"][0][0], add_special_tokens=False)
        prompt = len(ids)
        while len(ids) < prompt + 12:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        expected = tokenizer.decode(ids[prompt:], skip_special_tokens=True)
        assert sample["resps"][0][0] == expected


if __name__ == "__main__":
    main(globals())
