"""Desired is observed: what a cluster consists of, who keeps it so, and how it is described."""
