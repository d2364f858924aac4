"""The OpenAI-compatible HTTP door: text in, tokens to a coordinator, text out. Knows nothing of Ray."""
