"""Doubles the rows of a region whose descriptor it inherited: `python -m tests.support.shared_rows_writer FD N D`."""

import sys

from actors.shared_rows import SharedRows

if __name__ == "__main__":
    fd, num_rows, width = map(int, sys.argv[1:])
    SharedRows.adopt(fd, num_rows, width).tensor.mul_(2)
