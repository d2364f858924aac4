"""Everything that happens: processes, sockets, devices, clocks."""

__version__ = "0.1.0"
