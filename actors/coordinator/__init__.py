"""The coordinator actor: the hot loop, its queue, and what it answers to ingresses and supervisor."""
