"""Memory that stays mapped between two updates."""

import ctypes
import os
from functools import cache

# glibc's names for mallopt(), and values that keep the temporaries of an update (tens of megabytes) in the process
_M_TRIM_THRESHOLD, _TRIM_THRESHOLD = -1, 512 * 2**20
_M_MMAP_THRESHOLD, _MMAP_THRESHOLD = -3, 32 * 2**20
#: Environment variable that switches :func:`keep_freed_memory` off when it is ``0``
SWITCH = "SB3_ALGD_KEEP_FREED_MEMORY"
_USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@cache
def keep_freed_memory() -> bool:
    """
    Let the C library keep up to 512 MiB of freed memory instead of returning it to the system at once.

    An update frees and allocates the same tens of megabytes again and again; glibc would unmap them each time, and touching
    fresh pages then costs up to a third of an update. The setting holds for the whole process. Nothing is set with
    ``SB3_ALGD_KEEP_FREED_MEMORY=0``, with another C library, or if the user has set ``MALLOC_TRIM_THRESHOLD_``,
    ``MALLOC_MMAP_THRESHOLD_`` or ``GLIBC_TUNABLES``.

    :return: Whether it was set.
    """
    if os.environ.get(SWITCH) == "0" or any(name in os.environ for name in _USERS_OWN):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD) and mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD))
