"""Parameters of the modules as nested dictionaries, from and to PyTorch's state dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

Params: TypeAlias = dict[str, Any]

# PyTorch's name of a parameter -> its path here. A kernel is the transpose of a weight.
_PATHS = {
    "qkv.weight": "qkv.kernel",
    "qkv.bias": "qkv.bias",
    "rpb": "rpb",
    "proj.weight": "proj.kernel",
    "proj.bias": "proj.bias",
}


def by_path(params: Mapping[str, Any], parent: str = "") -> dict[str, Any]:
    """Nested parameters by dotted path, without those that are None."""
    leaves: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            leaves |= by_path(value, f"{parent}{name}.")
        elif value is not None:
            leaves[f"{parent}{name}"] = value
    return leaves


def _transposed_if(path: str, array: np.ndarray) -> np.ndarray:
    return np.array(array.T, order="C") if path.endswith("kernel") else array


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
        {"qkv": {"kernel": ..., "bias": ...}, "rpb": ..., "proj": {"kernel": ..., "bias": ...}},
        numpy arrays of the same dtypes, without the parameters that state_dict lacks. A kernel is
        the transpose of a weight.

    Raises:
        ValueError: a name that is no parameter of the module, or a weight that is missing.
    """
    prefix = f"{prefix.removesuffix('.')}." if prefix else ""
    values = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    unknown = sorted(values.keys() - _PATHS.keys())
    if unknown:
        raise ValueError(
            f"state_dict: got {', '.join(prefix + name for name in unknown[:5])}; must hold only "
            f"{', '.join(_PATHS)} (prefix selects the module in a larger model)"
        )
    missing = [name for name in ("qkv.weight", "proj.weight") if name not in values]
    if missing:
        raise ValueError(f"state_dict: {prefix}{missing[0]} is missing")
    params: Params = {}
    for name, value in values.items():
        path = _PATHS[name]
        *outer, last = path.split(".")
        parent = params.setdefault(outer[0], {}) if outer else params
        parent[last] = _transposed_if(path, _to_numpy(value))
    return params


def to_state_dict(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`, of arrays by dotted path."""
    return {
        name: _transposed_if(path, np.array(params[path]))
        for name, path in _PATHS.items()
        if path in params
    }
