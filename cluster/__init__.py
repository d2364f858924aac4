"""Every decision as plain values: what runs where, how many, who serves this batch."""
