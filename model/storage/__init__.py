"""A checkpoint on disk: its configuration, its tensors' names, owners and byte ranges."""
