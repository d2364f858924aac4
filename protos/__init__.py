"""What is said on the wire, and the only code that turns tensors into bytes."""
