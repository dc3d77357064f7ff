"""Processes of torch.distributed on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch


@contextmanager
def environment_of_ranks() -> Iterator[None]:
    """For processes that share cores, and need no network, nor a host's name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        if os.path.isdir("/sys/class/net/lo"):
            patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        yield


def run_ranks(
    function: Callable[..., None],
    args: Sequence[Any],
    count: int,
    limit_s: float,
    start_method: str = "spawn",
) -> None:
    """Runs `function(rank, *args)` on every rank, and fails where it takes too long."""
    context = torch.multiprocessing.start_processes(
        function, tuple(args), count, join=False, start_method=start_method
    )
    end = time.monotonic() + limit_s
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, f"still running after {limit_s} s"
    finally:
        for process in context.processes:
            process.kill()
