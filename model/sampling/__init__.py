"""From logits to a token: parameters, filters, log-probabilities, stateless randomness."""
