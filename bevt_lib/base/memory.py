"""Freed memory stays with the process, so that the next tensor needn't fetch it anew."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's names, of mallopt(3)


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, from now on; return whether there is glibc.

    glibc gives every block above 32 MB back to Linux when it is freed, and Linux clears each page
    of the next one: a step makes such tensors by the hundred. Kept, the process holds its largest
    size until it ends. Results don't change. Other systems' allocators are left as they are. Our
    choice.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        return False
    return bool(libc.mallopt(M_TRIM_THRESHOLD, -1) and libc.mallopt(M_MMAP_MAX, 0))
