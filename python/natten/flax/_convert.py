"""Parameters of the modules as nested dictionaries, from and to PyTorch's state dictionaries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Params: TypeAlias = dict[str, Any]

# PyTorch's name of a parameter -> its path here. A kernel is the transpose of a weight, and query,
# key and value have an axis of their own.
_PATHS = {
    "qkv.weight": "qkv.kernel",
    "qkv.bias": "qkv.bias",
    "rpb": "rpb",
    "proj.weight": "proj.kernel",
    "proj.bias": "proj.bias",
}


def by_path(params: Mapping[str, Any], parent: str = "") -> dict[str, Any]:
    """The arrays of nested parameters by dotted path, without metadata."""
    leaves: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            leaves |= by_path(value, f"{parent}{name}.")
        else:
            # A box around an array, with metadata, is a tree of this one array.
            (leaves[f"{parent}{name}"],) = jax.tree.leaves(value)
    return leaves


def _check_names(
    argument: str, names: Iterable[str], known: Iterable[str], hint: str, prefix: str = ""
) -> None:
    """Raises unless names hold both kernels, or weights, and else only known ones."""
    names, known = set(names), list(known)
    unknown = sorted(names.difference(known))
    if unknown:
        raise ValueError(
            f"{argument}: got {', '.join(prefix + name for name in unknown[:5])}; must hold only "
            f"{', '.join(known)} ({hint})"
        )
    missing = [name for name in known if name.endswith(("weight", "kernel")) and name not in names]
    if missing:
        raise ValueError(f"{argument}: {prefix}{missing[0]} is missing ({hint})")


def _to_numpy(value: Any) -> np.ndarray:
    """A copy of an array or of a PyTorch tensor, with its dtype."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # which PyTorch cannot hand to numpy
            return value.float().numpy().astype(jnp.bfloat16)
        value = value.numpy()
    return np.array(value)


def from_torch(state_dict: Mapping[str, Any], prefix: str = "") -> Params:
    """Converts the state dictionary of a PyTorch NeighborhoodAttention module of any rank.

    Args:
        state_dict: name -> PyTorch tensor or numpy array, of the module or of a model that holds
            it.
        prefix: the module's place in that model, such as "blocks.0.attn".

    Returns:
        {"qkv": {"kernel": [dim, 3, dim], "bias": [3, dim]}, "rpb": [heads, ...],
        "proj": {"kernel": [dim, dim], "bias": [dim]}}, numpy arrays of the same dtypes, without the
        parameters that state_dict lacks: what a `linen` module has under "params".

    Raises:
        ValueError: a name that is no parameter of the module, or a weight that is missing, or a
            shape of `qkv` that is not of three maps.
    """
    prefix = f"{prefix.removesuffix('.')}." if prefix else ""
    values = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    hint = "prefix selects the module in a larger model"
    _check_names("state_dict", values, _PATHS, hint, prefix)
    params: Params = {}
    for name, value in values.items():
        array = _to_numpy(value)
        path = _PATHS[name]
        *outer, last = path.split(".")
        if last == "kernel":
            array = array.T
        if outer == ["qkv"]:
            if array.shape[-1] % 3 != 0:
                raise ValueError(
                    f"state_dict: got shape {tuple(value.shape)} for {prefix}{name}; the first "
                    "axis must hold query, key and value, three times as many as channels"
                )
            array = array.reshape(*array.shape[:-1], 3, array.shape[-1] // 3)
        parent = params.setdefault(outer[0], {}) if outer else params
        parent[last] = np.ascontiguousarray(array)
    return params


def to_state_dict(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`, of arrays by dotted path."""
    _check_names("params", params, _PATHS.values(), "give the parameters of one attention module")
    state_dict = {}
    for name, path in _PATHS.items():
        if path not in params:
            continue
        array = np.array(params[path])
        if path.startswith("qkv."):
            if array.ndim < 2 or array.shape[-2] != 3:
                raise ValueError(
                    f"params: got shape {array.shape} for {path}; the last axes must be [3, dim]"
                )
            array = array.reshape(*array.shape[:-2], -1)
        if path.endswith("kernel"):
            array = array.T
        state_dict[name] = np.ascontiguousarray(array)
    return state_dict
