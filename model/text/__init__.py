"""Text to token ids and back: tokenizers, detokenisation, chat templates."""
