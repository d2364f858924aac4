"""The coordinator's side of the experts: rows out, rows back, whatever happens to a replica."""
