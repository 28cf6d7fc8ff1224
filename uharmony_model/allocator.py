"""Keep freed memory in the process, so that large activations do not fault their pages in anew.

glibc takes blocks above 32 MiB straight from the kernel and gives them back when freed; a training
step then spends much of its time on page faults. The price is resident memory that is not
returned before the process ends, a few blocks of each size at most.
"""

from __future__ import annotations

import ctypes

# Parameter numbers of mallopt(3) in glibc's malloc.h, with the values for them.
_M_TRIM_THRESHOLD = (-1, 1 << 30)  # bytes free at the heap's top before any is given back
_M_TOP_PAD = (-2, 64 << 20)  # bytes by which the heap grows at least
_M_MMAP_MAX = (-4, 0)  # no block gets a mapping of its own


def keep_freed_pages() -> bool:
    """Ask glibc to keep freed memory; says whether it agreed, False where there is no glibc.

    It may be called again at any time and changes nothing then. Blocks allocated before it stay
    as they are, so call it before the first network is built.
    """
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows takes no None
        return False
    # Other C libraries may have a mallopt that does nothing, or reads its numbers differently.
    if not (hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt")):
        return False
    mallopt = library.mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    settings = (_M_MMAP_MAX, _M_TRIM_THRESHOLD, _M_TOP_PAD)
    return all(mallopt(name, value) == 1 for name, value in settings)
