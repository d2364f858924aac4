"""How weights are held and multiplied: what a kernel is, and a file for each."""
