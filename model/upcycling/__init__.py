"""A dense checkpoint becomes a mixture of experts (sparse upcycling, arXiv 2212.05055)."""
