"""`natten.simulate`: how long a call would take, from what its kernels would do.

What they do, libnatten counts by the kernels' own walk over windows (`_core.work_of`); here counts
become seconds. Of this CPU a few measurements say what a multiply-add, a weight, a packed byte and
so on cost (`_calibration.py`); of a GPU its data sheet does.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from natten import _core
from natten._args import (
    ALLOW_TF32,
    Bools,
    Boundaries,
    Config,
    Ints,
    integer,
    make_config,
    per_axis,
    window_options,
)
from natten._halos import halos_of
from natten._roles import roles_of

DTYPE_NAMES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DTYPES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}  # and bytes of an element


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What a prediction takes of a GPU. Rates are per second."""

    name: str
    half_flops: float  # of float16 and bfloat16 on tensor cores, without sparsity
    tf32_flops: float
    bandwidth: float  # of its memory, in bytes
    multiprocessors: int
    link: float  # to other GPUs, bytes in one direction
    source: str  # of the figures above
    # What no data sheet says: what the best published neighborhood attention has reached.
    efficiency: float  # share of the FLOP/s, where all of a tile is seen
    mask_cost: float  # time of a tile of which something is hidden, to that of one without
    permute_rate: float  # bytes that are moved where tokens are put in the order of tiles


# The shares are those with which NATTEN's kernels of 0.21 come closest to their published times on
# an H100 and a B200 (tests/test_simulate.py); of an A100 there are none for such kernels.
GPUS = {
    "h100": Gpu("NVIDIA H100 SXM", 989.4e12, 494.7e12, 3.35e12, 132, 450e9,
                "NVIDIA H100 data sheet, SXM5", 0.61, 1.50, 1.15e12),
    "b200": Gpu("NVIDIA B200", 2250e12, 1125e12, 8.0e12, 148, 900e9,
                "NVIDIA DGX B200 data sheet, one of eight GPUs", 0.51, 1.50, 1.25e12),
    "a100": Gpu("NVIDIA A100 SXM 80GB", 312e12, 156e12, 2.039e12, 108, 300e9,
                "NVIDIA A100 data sheet, SXM4 80GB", 0.61, 1.50, 1.0e12),
}  # fmt: skip
CPU_LINK = 12.5e9  # 100 gigabits per second, where no other is said


@dataclasses.dataclass(frozen=True)
class SimulatedPass:
    """One pass of the kernels."""

    name: str
    seconds: float
    useful_flops: float
    executed_flops: float
    masked: float  # share of what is multiplied that goes through a mask
    bytes: float
    tiles: float


@dataclasses.dataclass(frozen=True)
class Simulation:
    """What `simulate` returns; prints as a table.

    On a mesh `useful_flops` to `passes` are those of the device that has most to do.
    """

    device: str
    seconds: float
    useful_flops: float  # of pairs of a query and a key that it sees
    executed_flops: float
    bytes: float  # read from tensors and written to them, those that are read again counted again
    tiles: float  # visits: of a block of queries, or keys, at a line or tile of what these see
    passes: tuple[SimulatedPass, ...]
    devices: int = 1
    halo_bytes: float = 0.0  # that one device receives, of those that receive most
    total_halo_bytes: float = 0.0  # that all devices receive
    exchange_seconds: float = 0.0

    def __str__(self) -> str:
        rows = {
            "predicted": f"{duration(self.seconds)}, {self.device}",
            "useful": f"{quantity(self.useful_flops)}FLOP, "
            f"{quantity(self.useful_flops / self.seconds) if self.seconds else '0 '}FLOP/s",
            "executed": f"{quantity(self.executed_flops)}FLOP, "
            f"{_ratio(self.executed_flops, self.useful_flops)} of the useful",
            "moved": f"{quantity(self.bytes)}B",
            "tiles": f"{quantity(self.tiles)}".strip(),
        }
        for p in self.passes:
            rows[f"  {p.name}"] = (
                f"{duration(p.seconds)}, executed {_ratio(p.executed_flops, p.useful_flops)}, "
                f"masked {100 * p.masked:.0f} %"
            )
        if self.devices > 1:
            rows["devices"] = f"{self.devices}; figures above are those of the busiest"
            rows["halo"] = (
                f"{quantity(self.halo_bytes)}B to one device, {quantity(self.total_halo_bytes)}B "
                f"to all; {duration(self.exchange_seconds)} of the time"
            )
        width = max(map(len, rows))
        return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())

    __repr__ = __str__


def _ratio(executed: float, useful: float) -> str:
    return f"{executed / useful:.2f}" if useful else "-"


def duration(seconds: float) -> str:
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 1e-6:.3g} us"


def quantity(value: float) -> str:
    """With a prefix of a thousand's power, and a blank before it."""
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.3g} "


@dataclasses.dataclass(frozen=True)
class Layer:
    """A call, checked as far as Python has to."""

    grid: tuple[int, ...]
    window: dict[str, tuple]
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str

    @property
    def rank(self) -> int:
        return len(self.grid)

    def config(self, flags: int = 0, **optional: Any) -> Config:
        return make_config(self.rank, **self.window, flags=flags, **optional)

    def tensors(
        self, op: str, queries: Sequence[int], keys: Sequence[int], skip: Sequence[str] = ()
    ) -> list[list[Any]]:
        """(shape, dtype name) of the inputs and of the outputs of an operation."""
        sizes: dict[str, tuple[int, ...]] = {
            "B": (self.batch,), "H": (self.heads,), "G": (self.kv_heads,), "D": (self.head_dim,),
            "V": (self.value_dim,), "Q": tuple(queries), "K": tuple(keys),
        }  # fmt: skip
        statistic = "float64" if self.dtype == "float64" else "float32"
        lists: list[list[Any]] = []
        for roles in roles_of(op):
            given = []
            for role in roles:
                known = all(dim in sizes for dim in role.dims) and role.name not in skip
                shape = sum((sizes[dim] for dim in role.dims), ()) if known else None
                given.append(
                    None
                    if shape is None
                    else (shape, statistic if role.is_statistic else self.dtype)
                )
            lists.append(given)
        return lists

    def work(
        self,
        op: str,
        device: str = "cpu",
        threads: int = 1,
        *,
        queries: Sequence[int] | None = None,
        keys: Sequence[int] | None = None,
        skip: Sequence[str] = ("grad_logsumexp",),
        fixed_tiles: bool = False,
        flags: int = 0,
        **optional: Any,
    ) -> list[dict[str, Any]]:
        """What the passes of an operation do, as `_core.work_of` counts it."""
        inputs, outputs = self.tensors(op, queries or self.grid, keys or self.grid, skip)
        return _core.work_of(
            op, self.config(flags, **optional), inputs, outputs, device, threads, fixed_tiles
        )


def make_layer(
    input_size: Ints,
    kernel_size: Ints,
    stride: Ints,
    dilation: Ints,
    is_causal: Bools | None,
    boundary: Boundaries,
    batch: int,
    heads: int,
    head_dim: int,
    dtype: str,
    kv_heads: int | None = None,
    value_dim: int | None = None,
) -> Layer:
    rank = len(input_size) if isinstance(input_size, Sequence) else 1
    if not 1 <= rank <= 3:
        raise ValueError(f"input_size: got {input_size!r}; must be an integer or 1 to 3 of them")
    dtype = DTYPE_NAMES.get(dtype, dtype)
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}; must be one of {', '.join(DTYPES)}")
    return Layer(
        per_axis("input_size", input_size, rank),
        window_options(
            rank,
            kernel_size=kernel_size,
            dilation=dilation,
            is_causal=is_causal,
            stride=stride,
            boundary=boundary,
        ),
        integer("batch", batch, 1),
        integer("heads", heads, 1),
        integer("kv_heads", heads if kv_heads is None else kv_heads, 1),
        integer("head_dim", head_dim, 1),
        integer("value_dim", head_dim if value_dim is None else value_dim, 1),
        dtype,
    )


def _pass_of(work: dict[str, Any], seconds: float) -> SimulatedPass:
    return SimulatedPass(
        work["name"],
        seconds,
        2 * work["useful"],
        2 * work["executed"],
        work["masked"] / work["weights"] if work["weights"] else 0.0,
        work["read"] + work["written"],
        work["tiles"],
    )


def _tensor_bytes(layer: Layer, op: str, queries: Sequence[int], keys: Sequence[int]) -> float:
    """Of an operation's tensors, each once."""
    total = 0
    for given in itertools.chain(*layer.tensors(op, queries, keys, ("grad_logsumexp",))):
        if given is not None:
            shape, dtype = given
            total += math.prod(shape) * DTYPES[dtype]
    return total


def _on_gpu(
    gpu: Gpu,
    layer: Layer,
    op: str,
    works: list[dict[str, Any]],
    queries: Sequence[int],
    keys: Sequence[int],
    fixed_tiles: bool,
) -> list[SimulatedPass]:
    rate = gpu.efficiency * (gpu.tf32_flops if layer.dtype == "float32" else gpu.half_flops)
    memory = _tensor_bytes(layer, op, queries, keys) / gpu.bandwidth
    passes = []
    for work in works:
        masked = work["masked"] / work["weights"] if work["weights"] else 0.0
        # Kernels with tiles on a fixed grid take one loop for all tiles of a call, with a mask or
        # without; ours look at each tile.
        costly = float(masked > 0) if fixed_tiles else masked
        flops = 2 * work["executed"] * (1 + (gpu.mask_cost - 1) * costly)
        rounds = math.ceil(work["units"] / gpu.multiprocessors)
        idle = rounds * gpu.multiprocessors / max(work["units"], 1)
        passes.append(_pass_of(work, max(flops / rate * idle, memory)))
    # Along one axis tiles of undilated tokens are in a row anyway.
    if fixed_tiles and (layer.rank > 1 or layer.window["dilation"] != (1,)):
        moved = 2 * _tensor_bytes(layer, op, queries, keys)
        passes.append(SimulatedPass("permute", moved / gpu.permute_rate, 0, 0, 0, moved, 0))
    return passes


@dataclasses.dataclass(frozen=True)
class _Part:
    """The share of a device, one value per axis."""

    offset: tuple[int, ...]
    length: tuple[int, ...]
    key_offset: tuple[int, ...]
    key_length: tuple[int, ...]

    @property
    def halo(self) -> int:
        """Keys that it needs from others."""
        return max(math.prod(self.key_length) - math.prod(self.length), 0)


def _parts_of(layer: Layer, mesh: tuple[int, ...]) -> list[_Part]:
    """What each device of a mesh has and needs. Axes are cut by themselves, into parts of one
    length, of which the last may be shorter."""
    along = []
    for axis in halos_of(layer.grid, tuple((devices,) for devices in mesh), layer.window).axes:
        ranges = zip(axis.held, axis.needed, strict=True)
        along.append([(a, b - a, first, last - first) for (a, b), (first, last) in ranges if a < b])
    return [_Part(*zip(*cuts, strict=True)) for cuts in itertools.product(*along)]  # type: ignore[arg-type]


def simulate(
    input_size: Ints,
    kernel_size: Ints,
    *,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools | None = False,
    boundary: Boundaries = "shift",
    batch: int = 1,
    heads: int = 1,
    head_dim: int = 64,
    dtype: str = "float32",
    backward: bool = False,
    device: str = "cpu",
    kv_heads: int | None = None,
    value_dim: int | None = None,
    q_tile_shape: Ints | None = None,
    kv_tile_shape: Ints | None = None,
    fixed_tiles: bool = False,
    mesh: Ints | None = None,
    link: float | None = None,
    latency: float = 0.0,
) -> Simulation:
    """Predicts what a call of `na1d`, `na2d` or `na3d` costs, without running it.

        print(natten.simulate((256, 256), 80, stride=16, heads=24, head_dim=128,
                              dtype="bfloat16", device="h100"))

    Args:
        input_size: tokens per axis; an integer is one axis.
        kernel_size, stride, dilation, is_causal, boundary: the windows, as in `na1d`.
        batch, heads, head_dim, kv_heads, value_dim, dtype: the tensors.
        backward: the backward pass as well as the forward pass.
        device: "cpu", this processor with the library's own threads, of which the first call for a
            type measures some problems, which takes seconds; or "h100", "b200", "a100", of which
            data sheets tell. There float32 is computed in TF32.
        q_tile_shape, kv_tile_shape: shapes of tiles, on GPUs.
        fixed_tiles: the tiles, of any size, of keys lie on a grid of their own, for which tokens
            are put in another order before and after, as by NATTEN's kernels; forward pass only.
        mesh: into how many parts each axis is cut, each on a device of its own.
        link: bytes per second that a device of a mesh receives; default is what GPUs of the kind
            have between them, and 12.5e9 for CPUs.
        latency: seconds that an exchange takes beyond that, once in each pass;
            `benchmarks/link.py` measures both.

    Returns:
        A prediction: text when printed, its rows as attributes.

    Raises:
        ValueError, TypeError: as `na1d`, and for a device that is not known.
        NotImplementedError: what kernels for the device do not compute.
    """
    layer = make_layer(
        input_size, kernel_size, stride, dilation, is_causal, boundary, batch, heads, head_dim,
        dtype, kv_heads, value_dim,
    )  # fmt: skip
    if device != "cpu" and device not in GPUS:
        raise ValueError(f"device: got {device!r}; must be one of cpu, {', '.join(GPUS)}")
    rank = layer.rank
    tiles: dict[str, Any] = {
        name: None if value is None else per_axis(name, value, rank)
        for name, value in (("q_tile_shape", q_tile_shape), ("kv_tile_shape", kv_tile_shape))
    }
    if device == "cpu" and (fixed_tiles or any(tiles.values())):
        raise ValueError("q_tile_shape, kv_tile_shape, fixed_tiles: are for GPUs; device is cpu")
    if fixed_tiles and not all(tiles.values()):
        raise ValueError("fixed_tiles: needs q_tile_shape and kv_tile_shape")
    if fixed_tiles and (backward or mesh is not None):
        raise ValueError("fixed_tiles: with the forward pass of one device only")
    if link is not None and not link > 0:
        raise ValueError(f"link: got {link!r}; must be positive")
    if not latency >= 0:
        raise ValueError(f"latency: got {latency!r}; must not be negative")

    queries = keys = layer.grid
    part: dict[str, Any] = {}
    devices, halo, total_halo = 1, 0.0, 0.0
    if mesh is not None:
        cut = per_axis("mesh", mesh, rank)
        if any(n < 1 for n in cut):
            raise ValueError(f"mesh: got {mesh!r}; must be positive")
        layer.work("attention_forward", device if device == "cpu" else "cuda",
                   flags=ALLOW_TF32)  # fmt: skip  # for its checks
        parts = _parts_of(layer, cut)
        busiest = max(parts, key=lambda p: (math.prod(p.length), math.prod(p.key_length)))
        queries, keys = busiest.length, busiest.key_length
        part = {"query_offset": busiest.offset, "key_offset": busiest.key_offset,
                "grid_size": layer.grid}  # fmt: skip
        devices = math.prod(cut)
        # Keys and values travel; in the backward pass their gradients go home as well.
        of_token = batch * layer.kv_heads * (layer.head_dim + layer.value_dim) * DTYPES[dtype]
        of_token *= 2 if backward else 1
        halo = float(max(p.halo for p in parts) * of_token)
        total_halo = float(sum(p.halo for p in parts) * of_token)

    passes: list[SimulatedPass] = []
    for op in ("attention_forward", "attention_backward")[: 2 if backward else 1]:
        if device == "cpu":
            from natten import _calibration

            threads = _core.num_threads()
            works = layer.work(op, "cpu", threads, queries=queries, keys=keys, **part)
            seconds = _calibration.calibrated(dtype, op).seconds(works)
            passes += [_pass_of(w, s) for w, s in zip(works, seconds, strict=True)]
            continue
        prefix = "backward_" if op == "attention_backward" else ""
        if fixed_tiles:
            prefix = ""
        works = layer.work(
            op, "cuda", queries=queries, keys=keys, fixed_tiles=fixed_tiles, flags=ALLOW_TF32,
            **part, **({prefix + name: value for name, value in tiles.items()}),
        )  # fmt: skip
        passes += _on_gpu(GPUS[device], layer, op, works, queries, keys, fixed_tiles)
    exchange = halo / (link or (CPU_LINK if device == "cpu" else GPUS[device].link))
    if halo:
        exchange += latency * (2 if backward else 1)

    def total(name: str) -> float:
        return sum(getattr(p, name) for p in passes)

    if device == "cpu":
        text = f"this CPU, {_core.num_threads()} threads, calibrated by measurement"
    else:
        text = f"{GPUS[device].name} by data sheet"
    return Simulation(
        text, total("seconds") + exchange, total("useful_flops"), total("executed_flops"),
        total("bytes"), total("tiles"), tuple(passes), devices, halo, total_halo, exchange,
    )  # fmt: skip
