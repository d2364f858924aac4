"""A load generator for OpenAI-compatible servers, with the names and definitions of vLLM's `vllm bench serve`."""
