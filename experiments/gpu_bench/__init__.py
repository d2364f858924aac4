"""What a GPU makes of Mixtral 8x7B's layer shapes, against the floors of its memory and its arithmetic."""
