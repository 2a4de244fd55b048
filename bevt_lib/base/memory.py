"""Freed memory stays with the process, so that the next tensor needn't fetch it anew."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # glibc's names, of mallopt(3)
# Where a process that frees large blocks gets to by itself: glibc moves both thresholds up.
USUAL = {M_TRIM_THRESHOLD: 2**26, M_MMAP_THRESHOLD: 2**25, M_MMAP_MAX: 65536}
KEPT = {M_TRIM_THRESHOLD: -1, M_MMAP_MAX: 0}


def keep_freed_memory(switch: bool = True) -> bool:
    """Let glibc keep what is freed, or give it back as usual; return whether there is glibc.

    glibc gives every large block back to Linux when it is freed, and Linux clears each page of the
    next one: for tensors of 100 MB, which a step makes by the hundred, that takes longer than what
    is computed in them. Kept, the process holds its largest size until it ends. Results don't
    change. Other systems' allocators are left as they are. Our choice.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        return False
    for option, value in (KEPT if switch else USUAL).items():
        libc.mallopt(option, value)
    if not switch:
        libc.malloc_trim(0)
    return True
