"""Which backends of libnatten run a call, and the tile shapes that they take, by the names of
NATTEN 0.20 and newer.

NATTEN has a function for each family of its kernels. Those of one pass and kind are the same here:
they list what the fused backend of the tensors' device takes. `natten.explain` also says why a
backend does not run a call.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from natten import _core
from natten._args import SEPARATE_KEY_GRID, Config, attention_flags, make_config
from natten._kernel import COMPOSED
from natten.torch import _ops
from natten.torch._composed import lacks_kernels
from natten.types import DimensionType, KernelSchedule

Tile = DimensionType

# Powers of two, of fewer and of more tokens than tiles of any kernel hold.
_LEAST_BITS, _MOST_BITS = 3, 9


def _config(query: Tensor, is_fmha: bool, is_causal: bool = False, **tiles: Any) -> Config:
    """Attention to a token itself, or to all tokens, which every grid admits."""
    rank = _ops.rank_of(query)
    flags = attention_flags(None) | (SEPARATE_KEY_GRID if is_fmha else 0)
    return make_config(rank, 1, is_causal=is_causal, flags=flags, **tiles)


def _answers(backward: bool, config: Config, tensors: tuple[Tensor, ...]) -> dict[str, str]:
    """By name, why a fused backend of the device does not run a pass; nothing where it does."""
    for name, x in zip(("query", "key", "value"), tensors, strict=True):
        _ops.check_tensor(name, x)
        if lacks_kernels(x.device):
            return {COMPOSED: ""}
        if x.device.type not in ("cpu", "cuda"):  # meta, which no kernel runs
            return {}
    inputs: list[Any] = [*tensors, None, None, None, None]
    operator = _ops.attention_forward
    rows = _core.explain(operator.name, config, None, "", inputs)
    if backward:
        query, sizes = tensors[0], operator.sizes(inputs, {}, config)
        output, logsumexp = (
            query.new_empty(_ops.shape_of(role, sizes), dtype=_ops.dtype_of(role, query.dtype))
            for role in operator.outputs
        )
        inputs += [logsumexp, output, None]
        rows = _core.explain(_ops.attention_backward.name, config, None, "", inputs)
    return {name: refusal for name, refusal, _ in rows if name != "naive"}


def _tiles(rank: int) -> Iterator[Tile]:
    """Shapes that may be those of tiles."""
    for bits in itertools.product(range(_MOST_BITS + 1), repeat=rank):
        if _LEAST_BITS <= sum(bits) <= _MOST_BITS:
            yield tuple(1 << b for b in bits)  # type: ignore[misc]


def _configs(
    tensors: tuple[Tensor, Tensor, Tensor], backward: bool, is_fmha: bool
) -> list[tuple[Tile, Tile]]:
    """Shapes of the tiles of queries and keys that the first backend takes which runs the problem.
    None where it has no use for tiles."""
    query = tensors[0]
    answers = _answers(backward, _config(query, is_fmha), tensors)
    first = next((name for name, refusal in answers.items() if not refusal), None)
    if first is None:
        return []
    prefix = "backward_" if backward else ""

    def takes(name: str, tile: Any) -> bool:
        config = _config(query, is_fmha, **{f"{prefix}{name}_tile_shape": tile})
        return not _answers(backward, config, tensors)[first]

    if takes("q", 3):  # no kernel for tiles has such; those without only check that it is positive
        return []
    q, kv = ([tile for tile in _tiles(_ops.rank_of(query)) if takes(x, tile)] for x in ("q", "kv"))
    return list(itertools.product(q, kv))


def get_configs_for_cutlass_fna(
    query: Tensor, key: Tensor, value: Tensor
) -> list[tuple[Tile, Tile]]:
    """Shapes of tiles of queries and of keys, `q_tile_shape` and `kv_tile_shape` of `na1d`, `na2d`
    and `na3d`, that run with such tensors. None on the CPU, whose backends have no use for them."""
    return _configs((query, key, value), backward=False, is_fmha=False)


def get_bwd_configs_for_cutlass_fna(
    query: Tensor, key: Tensor, value: Tensor
) -> list[tuple[Tile, Tile]]:
    """As `get_configs_for_cutlass_fna`, for the backward pass: `backward_q_tile_shape` and
    `backward_kv_tile_shape`."""
    return _configs((query, key, value), backward=True, is_fmha=False)


def get_configs_for_cutlass_fmha(
    query: Tensor, key: Tensor, value: Tensor
) -> list[tuple[int, int]]:
    """Lengths of tiles of queries and of keys, `q_tile_size` and `kv_tile_size` of `attention`,
    that run with such tensors. None on the CPU, whose backends have no use for them."""
    return [(q[0], kv[0]) for q, kv in _configs((query, key, value), backward=False, is_fmha=True)]


def get_bwd_configs_for_cutlass_fmha(
    query: Tensor, key: Tensor, value: Tensor
) -> list[tuple[int, int]]:
    """As `get_configs_for_cutlass_fmha`, for the backward pass: `backward_q_tile_size` and
    `backward_kv_tile_size`."""
    return [(q[0], kv[0]) for q, kv in _configs((query, key, value), backward=True, is_fmha=True)]


def get_configs_for_cutlass_hopper_fna(
    query: Tensor, key: Tensor, value: Tensor
) -> list[tuple[tuple[Tile, Tile], KernelSchedule]]:
    """As `get_configs_for_cutlass_fna`, each with a schedule, which has no effect here."""
    configs = get_configs_for_cutlass_fna(query, key, value)
    return [(config, KernelSchedule.NonPersistent) for config in configs]


def get_configs_for_cutlass_hopper_fmha(
    query: Tensor, key: Tensor, value: Tensor
) -> list[tuple[tuple[int, int], KernelSchedule]]:
    """As `get_configs_for_cutlass_fmha`, each with a schedule, which has no effect here."""
    configs = get_configs_for_cutlass_fmha(query, key, value)
    return [(config, KernelSchedule.NonPersistent) for config in configs]


def get_configs_for_flex_fna(
    query: Tensor, key: Tensor, value: Tensor, torch_compile: bool = False
) -> list[tuple[Tile, Tile]]:
    """As `get_configs_for_cutlass_fna`. torch_compile has no effect."""
    return get_configs_for_cutlass_fna(query, key, value)


def get_configs_for_flex_fmha(
    query: Tensor, key: Tensor, value: Tensor, torch_compile: bool = False
) -> list[tuple[int, int]]:
    """As `get_configs_for_cutlass_fmha`. torch_compile has no effect."""
    return get_configs_for_cutlass_fmha(query, key, value)


get_configs_for_cutlass_blackwell_fna = get_configs_for_cutlass_fna
get_configs_for_cutlass_blackwell_fmha = get_configs_for_cutlass_fmha
get_bwd_configs_for_cutlass_blackwell_fna = get_bwd_configs_for_cutlass_fna
get_bwd_configs_for_cutlass_blackwell_fmha = get_bwd_configs_for_cutlass_fmha
get_bwd_configs_for_cutlass_hopper_fna = get_bwd_configs_for_cutlass_fna
get_bwd_configs_for_cutlass_hopper_fmha = get_bwd_configs_for_cutlass_fmha


def get_compatible_backends(
    query: Tensor, key: Tensor, value: Tensor, torch_compile: bool = False
) -> list[str]:
    """Names of the fused backends that run `na1d`, `na2d` or `na3d` with such tensors, best first;
    there is always the reference, "naive", besides on the CPU. Only "composed" where libnatten has
    no kernels for the device. torch_compile has no effect."""
    answers = _answers(False, _config(query, is_fmha=False), (query, key, value))
    return [name for name, refusal in answers.items() if not refusal]


def get_compatible_fmha_backends(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    is_varlen: bool = False,
    torch_compile: bool = False,
) -> list[str]:
    """Names of the fused backends that run `attention` with such tensors, best first. is_varlen and
    torch_compile have no effect."""
    answers = _answers(False, _config(query, True, is_causal), (query, key, value))
    return [name for name, refusal in answers.items() if not refusal]


def choose_backend(query: Tensor, key: Tensor, value: Tensor, torch_compile: bool = False) -> str:
    """The first of `get_compatible_backends`.

    Raises:
        NotImplementedError: there is none.
    """
    return _first(get_compatible_backends(query, key, value, torch_compile))


def choose_fmha_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    is_varlen: bool = False,
    torch_compile: bool = False,
) -> str:
    """The first of `get_compatible_fmha_backends`.

    Raises:
        NotImplementedError: there is none.
    """
    return _first(
        get_compatible_fmha_backends(query, key, value, is_causal, is_varlen, torch_compile)
    )


def _first(names: list[str]) -> str:
    if not names:
        raise NotImplementedError("no backend runs these tensors; natten.explain says why")
    return names[0]


__all__ = [
    "choose_backend",
    "choose_fmha_backend",
    "get_bwd_configs_for_cutlass_blackwell_fmha",
    "get_bwd_configs_for_cutlass_blackwell_fna",
    "get_bwd_configs_for_cutlass_fmha",
    "get_bwd_configs_for_cutlass_fna",
    "get_bwd_configs_for_cutlass_hopper_fmha",
    "get_bwd_configs_for_cutlass_hopper_fna",
    "get_compatible_backends",
    "get_compatible_fmha_backends",
    "get_configs_for_cutlass_blackwell_fmha",
    "get_configs_for_cutlass_blackwell_fna",
    "get_configs_for_cutlass_fmha",
    "get_configs_for_cutlass_fna",
    "get_configs_for_cutlass_hopper_fmha",
    "get_configs_for_cutlass_hopper_fna",
    "get_configs_for_flex_fmha",
    "get_configs_for_flex_fna",
]
