"""All decoders that face a socket or a file, by name."""

from pathlib import Path

from tests.fuzz import file_targets, front_targets, wire_targets
from tests.fuzz.target import Make, Target

MAKERS: dict[str, Make] = {
    make.__name__: make
    for make in (
        wire_targets.forward_request,
        wire_targets.forward_reply,
        wire_targets.frame,
        wire_targets.weight_piece,
        wire_targets.lane_request,
        wire_targets.lane_reply,
        wire_targets.lane_hello,
        wire_targets.submit,
        wire_targets.generate_reply,
        wire_targets.expert_map,
        file_targets.strict_json,
        file_targets.safetensors_header,
        file_targets.weights_index,
        file_targets.manifest,
        file_targets.model_config,
        file_targets.mistral_params,
        file_targets.gguf_file,
        file_targets.trace_file,
        file_targets.tokenizer_json,
        file_targets.tokenizer_config,
        file_targets.sentencepiece_model,
        file_targets.cluster_args,
        file_targets.cluster_environment,
        front_targets.completion_body,
        front_targets.chat_body,
        front_targets.last_event_id,
        front_targets.sse_encoder,
        front_targets.chat_template,
        front_targets.client_tokens,
    )
}


def make(name: str, scratch: Path) -> Target:
    """The decoder of that name. Raises KeyError for a stranger."""
    place = scratch / name
    place.mkdir(parents=True, exist_ok=True)
    target = MAKERS[name](place)
    assert target.name == name, f"{target.name} is registered as {name}"
    return target
