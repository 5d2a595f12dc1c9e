"""Tell whether a file is being written: a text cut short may be valid, and say that objects are gone.

Linux grants no read lease on a file that somebody has open for writing. The lease itself is of no use here, and is
given back within microseconds; a writer that comes just then waits that long.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from pathlib import Path
from typing import NamedTuple


class Reading(NamedTuple):
    """What a file holds, and whether that may be a part of it."""

    content: bytes
    is_being_written: bool


def read_file(path: str) -> Reading:
    """Read a file, and tell whether somebody was writing it meanwhile.

    Raises: OSError
    """
    with Path(path).open("rb") as file:
        before = os.fstat(file.fileno())
        content = file.read()
        # Asked after reading: who came since the beginning is still there, or has left another size or time.
        is_being_written = _has_writer(file.fileno())
        after = os.fstat(file.fileno())
    is_same = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    return Reading(content, is_being_written or not is_same)


def has_writer(path: str) -> bool:
    """Tell whether somebody has a file open for writing; False where that cannot be told.

    Raises: OSError, when the file cannot be opened.
    """
    with Path(path).open("rb") as file:
        return _has_writer(file.fileno())


def _has_writer(descriptor: int) -> bool:
    try:
        # A writer that comes while there is a lease makes the kernel send SIGIO, which would end the process: ask for
        # a signal that is ignored unless handled.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:  # others: not our file, or a file system without leases
        return error.errno == errno.EAGAIN
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False
