"""`na_kernel`, the explicit choice of a backend."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, TypeVar

from natten import _core
from natten._log import logger

P = ParamSpec("P")
R = TypeVar("R")

# The backend that adapters make of their framework's own operations. libnatten knows nothing of it.
COMPOSED = "composed"

_OF_DEVICE = {device: _core.backends(device) for device in ("cpu", "cuda")}
_NAMES = sorted({"fused", COMPOSED}.union(*_OF_DEVICE.values()))

# What NATTEN calls its backends, and what that means here. Each pins kernels for GPUs of one maker
# or generation, all of which compute the same; so does the fused backend of any device.
_MEANINGS = {
    f"{kernels}-{operation}": "fused"
    for kernels in ("cutlass", "hopper", "blackwell", "flex")
    for operation in ("fna", "fmha")
}
_told: set[str] = set()


def taken_as(backend: str) -> str:
    """The name of a backend of this library that a name stands for."""
    return _MEANINGS.get(backend, backend)


def meaning(backend: str | None) -> str:
    """What a name of NATTEN's backends means, as a sentence; nothing for all other names."""
    if not isinstance(backend, str) or backend not in _MEANINGS:
        return ""
    return (
        f'backend "{backend}" is a name of NATTEN\'s kernels; it is taken as '
        f'"{_MEANINGS[backend]}", the fused backend of the device'
    )


def tell_meaning(backend: str | None) -> None:
    """Logs `meaning`, once for each name."""
    told = meaning(backend)
    if told and told not in _told:
        _told.add(told)
        logger.info("%s", told)


_without_kernels: set[str] = set()  # devices of which it has been told


def tell_without_kernels(device: str, framework: str, advice: str = "") -> None:
    """Logs, once for each kind of device, that `composed` runs there though nobody asked for it."""
    if device not in _without_kernels:
        _without_kernels.add(device)
        logger.warning(
            "libnatten has no kernels for %s here%s: calls are made of %s's own operations there "
            '(backend "%s")', device, advice, framework, COMPOSED,
        )  # fmt: skip


def check_name(backend: str, device: str = "") -> None:
    """Raises unless it is the name of a backend, or of one for a kind of device. If there are no
    kernels for that, libnatten says so."""
    _check_type(backend)
    names, where = _NAMES, ""
    if device:
        if not _OF_DEVICE.get(device):
            return
        names = sorted({"fused", COMPOSED, *_OF_DEVICE[device]})
        where = f" for tensors on {device}"
    if taken_as(backend) not in names:
        raise ValueError(f'backend: got "{backend}"; must be one of {", ".join(names)}{where}')


def check_environment() -> None:
    """Raises where NATTEN_BACKEND names the one backend of which libnatten knows nothing, and did
    not when natten was imported."""
    if os.environ.get("NATTEN_BACKEND") == COMPOSED:
        raise ValueError(
            f'backend: got "{COMPOSED}" from the environment variable NATTEN_BACKEND, which must '
            f'be set before natten is imported; later, natten.na_kernel("{COMPOSED}") chooses it'
        )


def _check_type(backend: str) -> None:
    if not isinstance(backend, str):
        raise TypeError(f"backend: got {backend!r}; must be a name (a string) or None")


# NATTEN_BACKEND is libnatten's to read, but for this name.
_DEFAULT = COMPOSED if os.environ.get("NATTEN_BACKEND") == COMPOSED else ""


class _Chosen(threading.local):
    def __init__(self) -> None:
        self.backend = _DEFAULT
        self.outer: list[str] = []  # what the blocks that this thread is in took the place of


_chosen = _Chosen()


class na_kernel:  # named like PyTorch's sdpa_kernel
    """Inside the `with` block, PyTorch and numpy calls of this thread use one backend:

        with natten.na_kernel("naive"):
            output = natten.na2d(query, key, value, kernel_size=7)

    Blocks nest; a call's own `backend` argument goes first. A backward pass uses what its forward
    pass did. A backend that cannot run a call raises there and says why. As a decorator it has
    calls of a function be inside.

    Args:
        backend: a name that `natten.explain` shows, or "fused" for any but the reference, "naive".
            NATTEN's own names, such as "cutlass-fna", mean "fused".

    Raises:
        ValueError: an unknown name.
        TypeError: not a string.
    """

    def __init__(self, backend: str) -> None:
        check_name(backend)
        tell_meaning(backend)
        self._backend = taken_as(backend)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        backend = self._backend

        @functools.wraps(function)
        def inside(*args: P.args, **kwargs: P.kwargs) -> R:
            with na_kernel(backend):  # made here, as Dynamo follows no other
                return function(*args, **kwargs)

        return inside

    def __enter__(self) -> None:
        _chosen.outer.append(_chosen.backend)
        _chosen.backend = self._backend

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _chosen.backend = _chosen.outer.pop()


def chosen_backend(backend: str | None) -> str:
    """`backend`, or else what the innermost `na_kernel` block says; "" leaves the choice."""
    if backend is not None:
        _check_type(backend)
        backend = taken_as(backend)
    return backend or _chosen.backend
