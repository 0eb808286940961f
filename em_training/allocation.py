"""Memory that a training on the CPU takes and gives back thousands of times a step."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Tell the C library to keep freed memory for the next tensor instead of handing it back; says whether it took that in.

    glibc returns every large tensor to the system when it is freed, and the next one's pages are then cleared and mapped again one by one
    as they are first written, which takes longer than many an operation. It holds for the whole process, which keeps the most that it ever
    needed. Elsewhere than under glibc it does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
