"""Everything that happens: processes, sockets, devices, clocks."""
