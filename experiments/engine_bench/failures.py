"""What can go wrong in a benchmark and be said in one line."""


class BenchError(RuntimeError):
    """A run that cannot be done, or cannot be believed; the message is one line for the person at the terminal."""
