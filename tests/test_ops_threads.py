"""The CPU backend's loops run on PyTorch's threads, from many callers at once, and on its own after a fork."""

import subprocess
import sys

import pytest

from zsq_ext.ops import native

pytestmark = pytest.mark.skipif(native.problem is not None, reason=f"no CPU backend: {native.problem}")

SETUP = """
import torch
from zsq_ext.ops import fake_quant
torch.set_num_threads(4)
x, scale, zero_point = torch.randn(1 << 20), torch.tensor([0.05]), torch.zeros(1, dtype=torch.int32)
run = lambda: fake_quant(x, scale, zero_point, -8, 7).numpy()
"""


def said(program: str) -> str:
    """What a program prints that has a process to itself: a hang of its threads is an error here, not a hang of all."""
    done = subprocess.run([sys.executable, "-c", SETUP + program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_forked_child_has_threads_again():
    # PyTorch's own loops hang in such a child, so it compares with NumPy.
    assert said(
        """
import multiprocessing
expected = run()
context = multiprocessing.get_context("fork")
queue = context.Queue()
child = context.Process(target=lambda: queue.put(bool((run() == expected).all())))
child.start()
print(queue.get(timeout=60))
child.join()
"""
    ).endswith("True")


def test_many_callers_at_once():
    assert said(
        """
from concurrent.futures import ThreadPoolExecutor
expected = run()
with ThreadPoolExecutor(4) as callers:
    print(all(callers.map(lambda _: (run() == expected).all(), range(64))))
"""
    ).endswith("True")


def test_no_threads_of_its_own_beside_pytorchs():
    counts = said(
        """
import os
torch.ones(1 << 22).add_(1)
before = len(os.listdir("/proc/self/task"))
run()
print(before, len(os.listdir("/proc/self/task")))
"""
    ).split()
    assert counts[0] == counts[1]
