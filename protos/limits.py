"""How large what is said may be; what is in it is checked by whoever reads it."""

MAX_MESSAGE_BYTES = 32 * 1024 * 1024
"""The largest serialised message of any service: both ends of every channel refuse more."""
