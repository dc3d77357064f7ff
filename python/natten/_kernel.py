"""`na_kernel`, the explicit choice of a backend."""

from __future__ import annotations

import os
import threading
from types import TracebackType

from natten import _core

# The backend that adapters make of their framework's own operations. libnatten knows nothing of it.
COMPOSED = "composed"

_NAMES = sorted({"fused", COMPOSED, *_core.backends("cpu"), *_core.backends("cuda")})


def check_name(backend: str) -> None:
    _check_type(backend)
    if backend not in _NAMES:
        raise ValueError(f'backend: got "{backend}"; must be one of {", ".join(_NAMES)}')


def _check_type(backend: str) -> None:
    if not isinstance(backend, str):
        raise TypeError(f"backend: got {backend!r}; must be a name (a string) or None")


# NATTEN_BACKEND is libnatten's to read, but for this name.
_DEFAULT = COMPOSED if os.environ.get("NATTEN_BACKEND") == COMPOSED else ""


class _Chosen(threading.local):
    def __init__(self) -> None:
        self.backend = _DEFAULT


_chosen = _Chosen()


class na_kernel:  # named like PyTorch's sdpa_kernel
    """Inside the `with` block, PyTorch and numpy calls of this thread use one backend:

        with natten.na_kernel("naive"):
            output = natten.na2d(query, key, value, kernel_size=7)

    Blocks nest; a call's own `backend` argument goes first. A backward pass uses what its forward
    pass did. A backend that cannot run a call raises there and says why.

    Args:
        backend: a name that `natten.explain` shows, or "fused" for any but the reference, "naive".

    Raises:
        ValueError: an unknown name.
        TypeError: not a string.
    """

    def __init__(self, backend: str) -> None:
        check_name(backend)
        self._backend = backend
        self._outer: list[str] = []

    def __enter__(self) -> None:
        self._outer.append(_chosen.backend)
        _chosen.backend = self._backend

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _chosen.backend = self._outer.pop()


def chosen_backend(backend: str | None) -> str:
    """`backend`, or else what the innermost `na_kernel` block says; "" leaves the choice."""
    if backend is not None:
        _check_type(backend)
    return backend or _chosen.backend
