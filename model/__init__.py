"""Mixtral as mathematics: runs alone, in one process, on CPU or CUDA."""
