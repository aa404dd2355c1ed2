"""Threads share few heaps, and large blocks go back to the system: seen on a process that asks glibc itself."""

import os
import re
import subprocess
import sys

import pytest

from kcfi.web import memory

CODE = """
import ctypes, runpy, sys, threading
if sys.argv[1] == "kept":
    runpy.run_path(sys.argv[2])["keep_arenas_small"]()  # alone: imports take seconds, and start threads
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
held = threading.Barrier(9)
def work():
    block = libc.malloc(100_000)
    held.wait()
    libc.free(block)
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
held.wait()
for thread in threads:
    thread.join()
libc.malloc_stats()
"""


FREED = """
import ctypes, runpy, sys
give_back = runpy.run_path(sys.argv[1])["give_back"]
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
libc = ctypes.CDLL(None)
libc.mallopt(-3, 1 << 20)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
blocks = []
for _ in range(200):
    blocks.append(libc.malloc(500_000))
    ctypes.memset(blocks[-1], 1, 500_000)
for block in blocks[:-1]:  # below one that stays, so that glibc keeps them
    libc.free(block)
kept = resident()
give_back()
print(kept - resident())
"""


@pytest.fixture
def glibc():
    if sys.platform != "linux" or not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
        pytest.skip("another C library")


def test_free_pages_below_a_small_block_are_given_back(glibc):
    command = [sys.executable, "-c", FREED, memory.__file__]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(process.stdout) > 80  # MiB, of 95


def test_threads_share_few_heaps(glibc):
    arenas = {}
    for how in ("left", "kept"):
        process = subprocess.run(
            [sys.executable, "-c", CODE, how, memory.__file__], capture_output=True, text=True, check=True
        )
        arenas[how] = len(re.findall(r"^Arena \d+:", process.stderr, re.MULTILINE))
    assert arenas["kept"] <= 2 < arenas["left"]


def test_another_system_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    monkeypatch.setattr(memory.ctypes, "CDLL", None)  # would be called
    assert memory.keep_arenas_small() is None and memory.give_back() is None
