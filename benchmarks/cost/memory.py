"""Memory in use, and its peak."""

import ctypes
from pathlib import Path

import torch


def keep_freed_memory(keep: bool) -> None:
    """
    Have glibc keep the memory of freed tensors for the next ones, as PyTorch does on GPUs, or give it all back at once.

    By default its behaviour depends on what was allocated before, and page faults decide which arm is faster. Given
    back, freed memory does not count as resident.
    """
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_threshold, m_mmap_max, m_arena_max = -1, -3, -4, -8  # malloc.h
    libc.mallopt(m_arena_max, 1)
    libc.mallopt(m_mmap_max, 0 if keep else 65_536)
    libc.mallopt(m_mmap_threshold, 65_536)
    libc.mallopt(m_trim_threshold, 2**31 - 1 if keep else 65_536)


def resident_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def reset_peak(device: torch.device) -> int:
    """Bytes in use now, from which on the peak is taken."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory starts anew
    return resident_bytes("VmRSS")


def peak_since_reset(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes("VmHWM")
