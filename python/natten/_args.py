"""Arguments that the adapters share, and the flat form in which they travel.

Only what C++ cannot see is checked here: that an argument is an integer or a sequence of them, one
per spatial axis. All else is checked by libnatten.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import (
    Any,
    NamedTuple,
    NoReturn,
    ParamSpec,
    TypeAlias,
    TypedDict,
    TypeVar,
)

from natten import _core, context
from natten.types import KernelSchedule

Ints: TypeAlias = int | Sequence[int]
Bools: TypeAlias = bool | Sequence[bool]
Boundaries: TypeAlias = str | Sequence[str]
Config: TypeAlias = tuple[int, ...]
P = ParamSpec("P")
F = TypeVar("F", bound=Callable[..., Any])

# Bits of the last integer of a config; mirrors natten::bindings::Flag.
HAS_SCALE = 1
EMPTY_SLOTS_ZERO = 2
SEPARATE_KEY_GRID = 4  # the window is all of the keys' grid; kernel_size only counts the axes
NONDETERMINISTIC = 8
ALLOW_TF32 = 16
UNKNOWN_OFFSETS = 32  # query_offset and key_offset are read at run time
ALLOW_NO_KEYS = 64  # a key grid of its own may be empty
NO_TIMING = 128  # the tuner's choices are read, and none is made
NOTHING_TUNED = 256
NO_GEMM = 512

_TOO_LARGE = 2**63  # for the integers that C++ takes
_MOST_ELEMENTS = 2**57  # of a tensor; libnatten refuses larger ones
_LARGEST_FLOAT32 = float.fromhex("0x1.fffffep127")


def _is_traced(value: Any) -> bool:
    """Whether JAX knows it, or one of several, only when a program runs."""
    jax = sys.modules.get("jax")
    values = value if isinstance(value, Sequence) else (value,)
    return jax is not None and any(isinstance(v, jax.core.Tracer) for v in values)


def _shown(value: Any) -> str:
    """A value of a wrong type in an error."""
    if _is_traced(value):
        return "a traced value, where a static one is needed (static_argnames of jax.jit)"
    return repr(value)


def integer(name: str, value: int, minimum: int | None = None) -> int:
    """`value` as an int of 64 bits. Bools are refused, as they are misplaced arguments."""
    if type(value) is not int:  # numpy has integers of its own
        try:
            if isinstance(value, bool):
                raise TypeError
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name}: got {_shown(value)}; must be an integer") from None
    if minimum is not None and value < minimum:
        raise ValueError(f"{name}: got {value}; must be at least {minimum}")
    if not -_TOO_LARGE <= value < _TOO_LARGE:
        raise ValueError(f"{name}: got {value}; must be an integer of 64 bits")
    return value


def per_axis(name: str, value: Ints, rank: int) -> tuple[int, ...]:
    """`value` for every axis, or one value per axis, as a tuple of `rank` ints."""
    # By far the most frequent, and quicker than what follows. Of 0 and less libnatten speaks.
    if type(value) is int and 0 < value < 2**30:
        return (value,) * rank
    try:
        if not isinstance(value, Sequence):
            return (integer(name, value),) * rank
        values = tuple([v if type(v) is int and 0 < v < 2**30 else integer(name, v) for v in value])
    except TypeError:
        raise TypeError(
            f"{name}: got {_shown(value)}; must be an integer or {rank} integers, one per spatial "
            "axis"
        ) from None
    if len(values) != rank:
        raise ValueError(
            f"{name}: got {value!r}, {len(values)} elements; must be an integer or {rank}, "
            "one per spatial axis"
        )
    return values


def causal_per_axis(name: str, value: Bools | None, rank: int) -> tuple[bool, ...]:
    """A bool for every axis, or one value per axis, as a tuple of `rank` bools. None is False.

    Integers are refused: they are how a misplaced stride or dilation slips in.
    """
    if type(value) is bool:
        return (value,) * rank
    values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    fits = [type(v) is bool or v is None or _is_numpy_bool(v) for v in values]
    if len(values) != rank or not all(fits):
        must = "must be True or False" + f", or {rank} of them, one per spatial axis" * (rank > 1)
        if not all(fits):
            raise TypeError(f"{name}: got {_shown(value)}; {must}")
        raise ValueError(f"{name}: got {value!r}, {len(values)} elements; {must}")
    return tuple([bool(v) for v in values])


BOUNDARIES = ("shift", "cut", "circular")  # in the order of natten::Boundary


def boundary_per_axis(name: str, value: Boundaries, rank: int) -> tuple[str, ...]:
    """The name of a boundary for every axis, from one, or from one per axis."""
    if type(value) is str and value in BOUNDARIES:
        return (value,) * rank
    values = (value,) * rank if isinstance(value, str) else value
    many = f", or {rank} of them, one per spatial axis" if rank > 1 else ""
    must = f"must be one of {', '.join(BOUNDARIES)}{many}"
    if not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
        raise TypeError(f"{name}: got {value!r}; {must}")
    if len(values) != rank:
        raise ValueError(f"{name}: got {value!r}, {len(values)} elements; {must}")
    if not all(v in BOUNDARIES for v in values):
        raise ValueError(f"{name}: got {value!r}; {must}")
    return tuple(values)


def offset_per_axis(name: str, value: Ints, rank: int) -> tuple[int, ...]:
    """As `per_axis`. There 0 is what libnatten speaks of; here it is frequent."""
    return (0,) * rank if type(value) is int and value == 0 else per_axis(name, value, rank)


def _is_numpy_bool(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.bool_)


class AxisOption(NamedTuple):
    """An argument that has one value per axis, or one for all of them. A new one goes into a table
    below; tests/test_options.py then names all signatures, pages and C++ that lack it."""

    name: str
    type: str  # as signatures have it
    default: Any  # what None stands for
    rule: Callable[[str, Any, int], tuple]  # (name, value, rank) -> a value per axis, checked
    names: tuple[Any, ...] = ()  # of values that are numbers in a config; the default is the first

    def per_axis(self, value: Any, rank: int) -> tuple:
        return self.rule(self.name, self.default if value is None else value, rank)

    def encoded(self, value: Any, rank: int) -> tuple[int, ...]:
        """`per_axis`, as integers."""
        values = self.per_axis(value, rank)
        return tuple([self.names.index(v) for v in values]) if self.names else values


# What says a window, in the order of the functions' arguments.
WINDOW_OPTIONS = (
    AxisOption("kernel_size", "Ints", None, per_axis),
    AxisOption("dilation", "Ints", 1, per_axis),
    AxisOption("is_causal", "Bools | None", False, causal_per_axis, (False, True)),
    AxisOption("stride", "Ints", 1, per_axis),
    AxisOption("boundary", "Boundaries", "shift", boundary_per_axis, BOUNDARIES),
)
# What says which part of a grid queries and keys are. None is not the same as 0: it says that they
# are one part.
PART_OPTIONS = (
    AxisOption("query_offset", "Ints | None", None, offset_per_axis),
    AxisOption("key_offset", "Ints | None", None, offset_per_axis),
    AxisOption("grid_size", "Ints | None", None, per_axis),
)
TILE_OPTIONS = tuple(
    AxisOption(name, "Ints | None", None, per_axis)
    for name in (
        "q_tile_shape",
        "kv_tile_shape",
        "backward_q_tile_shape",
        "backward_kv_tile_shape",
        "backward_kv_splits",
    )
)

OPTIONAL = (*PART_OPTIONS, *TILE_OPTIONS)
_NONE_GIVEN = (0,) * len(OPTIONAL)
_DEFAULTS = tuple(option.default for option in WINDOW_OPTIONS[1:])


def _default_config(rank: int) -> list[int]:
    """What a config says of `_DEFAULTS`."""
    return [n for o in WINDOW_OPTIONS[1:] for n in (rank, *o.encoded(None, rank))]


# A table, as Dynamo warns of functions with a cache. Other ranks are for libnatten to refuse.
_DEFAULT_CONFIGS = {rank: _default_config(rank) for rank in (1, 2, 3)}


def window_options(rank: int, **given: Any) -> dict[str, Any]:
    """The given options of a window by name, each with one value per axis."""
    return {
        option.name: option.per_axis(given[option.name], rank)
        for option in WINDOW_OPTIONS
        if option.name in given
    }


def window_of(module: Any) -> dict[str, Any]:
    """The options of a module's window by name."""
    return {option.name: getattr(module, option.name) for option in WINDOW_OPTIONS}


def make_config(
    rank: int,
    kernel_size: Ints,
    dilation: Ints = 1,
    is_causal: Bools | None = False,
    stride: Ints = 1,
    boundary: Boundaries = "shift",
    *,
    flags: int = 0,
    **optional: Ints | None,
) -> Config:
    """The flat list of integers that `natten._core` takes (bindings/call.h). `optional`: any of
    PART_OPTIONS and TILE_OPTIONS."""
    config = [rank, *per_axis("kernel_size", kernel_size, rank)]
    others = (dilation, is_causal, stride, boundary)
    for value, default in zip(others, _DEFAULTS, strict=True):
        if value is not default:
            for option, given in zip(WINDOW_OPTIONS[1:], others, strict=True):
                config += (rank, *option.encoded(given, rank))
            break
    else:  # by far the most frequent
        config += _DEFAULT_CONFIGS.get(rank) or _default_config(rank)
    for value in optional.values():
        if value is not None:
            for option in OPTIONAL:
                given = optional.get(option.name)
                config += (0,) if given is None else (rank, *option.encoded(given, rank))
            break
    else:
        config += _NONE_GIVEN
    config.append(flags)
    return tuple(config)


def options_of(config: Sequence[int]) -> dict[str, tuple]:
    """By name, the kernel size of a config and what else of it is not the default."""
    options, at = {}, 0
    for option in (*WINDOW_OPTIONS, *PART_OPTIONS):
        values = tuple(config[at + 1 : at + 1 + config[at]])
        at += 1 + len(values)
        if option.names:
            values = tuple([option.names[v] for v in values])
        if values and (option.default is None or any(v != option.default for v in values)):
            options[option.name] = values
    return options


def window_size(config: Sequence[int], key_grid: Sequence[int]) -> int:
    """Slots of a window: the product of its kernel size, or of the keys' grid where they have one
    of their own."""
    return math.prod(key_grid if config[-1] & SEPARATE_KEY_GRID else config[1 : 1 + config[0]])


def product_flags() -> int:
    """What the process's switches say of products of matrices: the flags of an unfused call."""
    flags = ALLOW_TF32 if context._switches.tf32 else 0
    return flags if context._switches.gemm else flags | NO_GEMM


def attention_flags(scale: float | None) -> int:
    """The flags of a fused call: what its arguments and the process's switches say."""
    flags = product_flags()  # some derivatives are made of unfused operations
    if scale is not None:
        flags |= HAS_SCALE
    if context._switches.kv_parallelism:
        flags |= NONDETERMINISTIC
    return flags


def with_grid_size(config: Config, key_grid: Sequence[int]) -> Config:
    """The config of a part of a grid with the size of that said, which is the keys' by default: for
    operations on biases, which have no keys."""
    at = len(WINDOW_OPTIONS) * (config[0] + 1)
    lengths = []
    for _ in PART_OPTIONS:
        lengths.append(config[at])
        at += 1 + config[at]
    if lengths[-1] or not any(lengths):
        return config
    return (*config[: at - 1], len(key_grid), *key_grid, *config[at:])


def is_whole_grid(config: Config) -> bool:
    """Whether queries and keys are one grid, and not parts of a larger one or unlike each other."""
    at = len(WINDOW_OPTIONS) * (config[0] + 1)
    of_parts = any(config[at : at + len(PART_OPTIONS)])
    return not of_parts and not config[-1] & (SEPARATE_KEY_GRID | UNKNOWN_OFFSETS)


def sees_all_keys(config: Config) -> bool:
    """Whether it is `attention`, of examples of one length."""
    return bool(config[-1] & SEPARATE_KEY_GRID) and not config[-1] & ALLOW_NO_KEYS


def with_window_of_all(config: Config, grid_size: Sequence[int]) -> Config:
    """`attention` to as many keys as the grid has as a neighborhood of all of them."""
    if not sees_all_keys(config):
        return config
    return (config[0], *grid_size, *config[1 + config[0] : -1], config[-1] & ~SEPARATE_KEY_GRID)


def with_parts(config: Config, *parts: Sequence[int]) -> Config:
    """The config of a whole grid as that of a part of it; `parts`: of each of PART_OPTIONS a value
    per axis, or nothing."""
    at = len(WINDOW_OPTIONS) * (config[0] + 1)
    given = [n for values in parts for n in (len(values), *values)]
    return (*config[:at], *given, *config[at + len(PART_OPTIONS) :])


def as_part(config: Config, grid_size: Sequence[int]) -> Config:
    """The config of a part, whose offsets are read at run time, of a call on a whole grid."""
    return with_flags(with_parts(config, (), (), grid_size), UNKNOWN_OFFSETS)


def with_flags(config: Config, flags: int) -> Config:
    return (*config[:-1], config[-1] | flags)


def real_scale(scale: float | None) -> float | None:
    """`scale` as a float; libnatten checks that it is finite."""
    return scale if scale is None or type(scale) is float else _real("scale", scale)


def _real(name: str, value: Any, must: str = "a real number or None") -> float:
    """A number as a float."""
    advice = " (multiply query by it instead)" if name == "scale" else ""
    if getattr(value, "requires_grad", False):
        raise TypeError(
            f"{name}: got a tensor that requires a gradient, which it would not get; must be a "
            f"real number{advice}"
        )
    try:
        if isinstance(value, (bool, str, bytes)):  # which float takes
            raise TypeError
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: got {value!r}; must be finite") from None
    except (TypeError, ValueError, RuntimeError):
        advice = advice if _is_traced(value) else ""
        raise TypeError(f"{name}: got {_shown(value)}; must be {must}{advice}") from None


def scale_or_default(scale: float | None, head_dim: int) -> float:
    """The factor on scores where libnatten is not there to choose it."""
    return head_dim**-0.5 if scale is None else scale


def module_scale(qk_scale: float | None, head_dim: int) -> float:
    """A module's factor on scores. It has to fit float32, as modules may compute in that. False is
    None: code for NATTEN passes it, whose modules take `qk_scale or` the default."""
    if qk_scale is None or qk_scale is False:
        return scale_or_default(None, head_dim)
    scale = _real("qk_scale", qk_scale)
    if not abs(scale) <= _LARGEST_FLOAT32:
        raise ValueError(f"qk_scale: got {scale}; must be finite in float32")
    return scale


def head_dim_of(dim: int, num_heads: int) -> int:
    """The channels of each of a module's heads."""
    dim, num_heads = integer("dim", dim, 1), integer("num_heads", num_heads, 1)
    if dim % num_heads != 0:
        raise ValueError(f"num_heads: got {num_heads}; must divide dim, {dim}")
    return dim // num_heads


def flag(name: str, value: bool | None) -> bool:
    """A module's argument that is true or false. None is False; other values are misplaced."""
    if value is None or type(value) is bool or _is_numpy_bool(value):
        return bool(value)
    raise TypeError(f"{name}: got {_shown(value)}; must be True or False")


def probability(name: str, value: float) -> float:
    """A module's rate of dropout."""
    rate = _real(name, value, "a real number")
    if not 0 <= rate <= 1:
        raise ValueError(f"{name}: got {value!r}; must lie in [0, 1]")
    return rate


def spelled_is_causal(is_causal: Bools | None, is_casual: Bools | None) -> Bools | None:
    """Accepts the misspelling `is_casual`, which widely copied examples contain."""
    if is_casual is None:
        return is_causal
    if is_causal is not None and is_causal is not False:
        raise TypeError(
            f"is_casual: got {is_casual} beside is_causal, {is_causal}; must be left out, as it is "
            "a misspelling of that"
        )
    warnings.warn("is_casual is a misspelling of is_causal; it is taken as is_causal", stacklevel=4)
    return is_casual


def listed(name: str, value: Any) -> list[Any]:
    """What `value` holds, as a list."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return list(value)
    except TypeError:
        raise TypeError(f"{name}: got {type(value).__name__}; must be a list or tuple") from None


def _shortest_axis(k: int, dilation: int, is_causal: bool, stride: int, boundary: str) -> int:
    """Of those that windows fit, where there are any."""
    if boundary == "cut":
        return 1
    if boundary == "circular" and stride > 0:
        k = -(-k // stride) * stride
    return max(k * dilation, 1)


def checked_window(rank: int, **given: Any) -> dict[str, Any]:
    """The options of a window by name, each with one value per axis. Raises what libnatten says of
    values that fit no grid at all."""
    window = window_options(rank, **{option.name: None for option in WINDOW_OPTIONS} | given)
    kernel_size, dilation = window["kernel_size"], window["dilation"]
    axes = zip(*(window[option.name] for option in WINDOW_OPTIONS), strict=True)
    smallest_grid = [_shortest_axis(*axis) for axis in axes]
    if math.prod(smallest_grid) > _MOST_ELEMENTS:
        raise ValueError(
            f"kernel_size: got {list(kernel_size)} with dilation {list(dilation)}; the product "
            "must not exceed the axis, and memory holds no grid of such axes"
        )
    tensor = ((1, *smallest_grid, 1, 1), "float32")
    inputs = [tensor, tensor, tensor, None, None, None, None]
    config = make_config(rank, **window)
    _core.plan("attention_forward", config, None, "", inputs, [True, None], device=None)
    return window


def check_merge(
    outputs: Sequence[tuple[Sequence[int], str]], lse_tensors: Sequence[tuple[Sequence[int], str]]
) -> None:
    """Raises where (shape, dtype name) of attentions and their logsumexps cannot be merged."""
    if not outputs or len(outputs) != len(lse_tensors):
        raise ValueError(
            f"outputs, lse_tensors: got {len(outputs)} and {len(lse_tensors)} tensors; must be "
            "equally many, at least one"
        )
    shape = list(outputs[0][0])
    if not shape:
        raise ValueError("outputs: got shape []; must be [..., heads, value_head_dim]")
    statistics = ["float64", "float32"]
    for name, tensors, want, dtypes in (
        ("outputs", outputs, shape, [*statistics, "bfloat16", "float16"]),
        ("lse_tensors", lse_tensors, shape[:-1], statistics),
    ):
        for got, dtype in tensors:
            if list(got) != want:
                raise ValueError(f"{name}: got shape {list(got)}; must be {want}")
            if dtype not in dtypes:
                raise TypeError(
                    f"{name}: got dtype {dtype}; must be {', '.join(dtypes[:-1])} or {dtypes[-1]}"
                )
            if dtype != tensors[0][1]:
                raise TypeError(f"{name}: got dtypes {tensors[0][1]} and {dtype}; must be one")


def check_both(given: Mapping[str, Any], names: tuple[str, str]) -> None:
    """Raises where one of two arguments is missing."""
    for name in names:
        if given[name] is None:
            raise ValueError(f"{name}: missing; {' and '.join(names)} must be given together")


def check_lengths(
    given: Mapping[str, Any], max_seqlen_Q: int | None, max_seqlen_KV: int | None
) -> tuple[tuple[str, str], dict[str, int | None]] | None:
    """Which two arguments of `attention` say where its examples lie, and what is given of the
    largest lengths, by name; None where it has one example. Raises where arguments do not go
    together. `given`: seqlens_Q, seqlens_KV, cumulative_seqlen_Q and cumulative_seqlen_KV."""
    lengths = "seqlens_Q", "seqlens_KV"
    ends = "cumulative_seqlen_Q", "cumulative_seqlen_KV"
    has_lengths, has_ends = (
        any(given[name] is not None for name in names) for names in (lengths, ends)
    )
    # 0 is what generate_varlen_parameters returns where there are no lengths.
    most = {"max_seqlen_Q": max_seqlen_Q or None, "max_seqlen_KV": max_seqlen_KV or None}
    if not has_lengths and not has_ends:
        for name, number in most.items():
            if number is not None:
                raise ValueError(
                    f"{name}: got {number} without cumulative_seqlen_Q and cumulative_seqlen_KV; "
                    "must be given with both"
                )
        return None
    if has_lengths and (has_ends or any(x is not None for x in most.values())):
        raise ValueError(
            "seqlens_Q, seqlens_KV: given together with cumulative_seqlen_Q, cumulative_seqlen_KV, "
            "max_seqlen_Q or max_seqlen_KV; must be the ones or the others"
        )
    names = lengths if has_lengths else ends
    check_both(given, names)
    return names, most


class UpstreamKeywords(TypedDict, total=False):
    """Keywords of NATTEN's functions for PyTorch that have no effect here: they set up its own
    kernels. What they hold is checked where NATTEN checks it."""

    attention_kwargs: Mapping[str, Any] | None  # for the part of additional tokens, 0.20 and newer
    backward_use_pt_reduction: bool
    run_persistent_kernel: bool
    kernel_schedule: str | KernelSchedule | None
    torch_compile: bool
    try_fuse_additional_kv: bool  # 0.20
    xformers_kwargs: Mapping[str, Any] | None  # 0.17


_UPSTREAM_DEFAULTS: UpstreamKeywords = {
    "attention_kwargs": None,
    "backward_use_pt_reduction": False,
    "run_persistent_kernel": True,
    "kernel_schedule": None,
    "torch_compile": False,
    "try_fuse_additional_kv": False,
    "xformers_kwargs": None,
}
_SCHEDULES = (None, "non", "coop", "pp", *KernelSchedule)


def check_extra(name: str, by_position: Sequence[Any], upstream: Mapping[str, Any] = {}) -> None:
    """Raises on what a function or module takes beside its named arguments: anything by position,
    and keywords that are none of UpstreamKeywords."""
    if by_position:
        _refuse_positional(name, len(by_position))
    for keyword, value in upstream.items():
        if keyword not in _UPSTREAM_DEFAULTS:
            raise TypeError(f"{name}() got an unexpected keyword argument '{keyword}'")
        if keyword == "kernel_schedule" and value not in _SCHEDULES:
            raise ValueError(
                f'kernel_schedule: got {value!r}; must be None, "non", "coop", "pp" or a '
                "natten.types.KernelSchedule"
            )
        if keyword.endswith("_kwargs") and not isinstance(value, Mapping | None):
            raise TypeError(f"{keyword}: got {value!r}; must be a dictionary or None")


def _refuse_positional(name: str, count: int) -> NoReturn:
    raise TypeError(
        f"{name}: got {count} argument{'s' * (count > 1)} by position after kernel_size; must be "
        "passed by name, such as dilation=2: NATTEN before 0.20 has the order (kernel_size, "
        "dilation, is_causal), and 0.20 to 0.21 have (kernel_size, stride, dilation, is_causal)"
    )


def by_name(function: F) -> F:
    """For a function with `*by_position` and maybe `**upstream`, which `check_extra` checks: shows
    the signature that it has for its callers. A call costs no more than without."""
    signature = inspect.signature(function)
    shown = []
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            shown += [
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=default,
                    # As annotations of functions here are: the text.
                    annotation=UpstreamKeywords.__annotations__[name].__forward_arg__,
                )
                for name, default in _UPSTREAM_DEFAULTS.items()
            ]
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            shown.append(parameter)
    function.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return function


# What to pass in place of keywords of modules that older versions of NATTEN take.
_HINTS = {
    "bias": "; NATTEN before 0.17 calls rel_pos_bias so",
    "kernel_size_d": "; kernel_size takes a tuple, (kernel_size_d, kernel_size, kernel_size)",
    "dilation_d": "; dilation takes a tuple, (dilation_d, dilation, dilation)",
}


def module_init(init: Callable[P, None]) -> Callable[P, None]:
    """For the `__init__` of a module: `embed_dim` is another name of `dim`, and what comes by
    position after the third argument is refused. What is missing is said of the class that is made,
    as Python would name that whose `__init__` it is."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        name = type(args[0]).__name__
        if len(args) > 4:  # with self
            _refuse_positional(name, len(args) - 4)
        if "embed_dim" in kwargs:
            embed_dim = kwargs.pop("embed_dim")
            if len(args) > 1 or "dim" in kwargs:
                dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
                raise TypeError(
                    f"embed_dim: got {embed_dim!r} besides dim, {dim!r}; must be given once, as "
                    "they are two names of one argument"
                )
            kwargs["dim"] = embed_dim
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            said: Any = error
            for keyword in kwargs:  # before what it may have been meant for is said to be missing
                if keyword not in signature.parameters:
                    said = f"got an unexpected keyword argument '{keyword}'"
                    said += _HINTS.get(keyword, "")
            raise TypeError(f"{name}() {said}") from None
        init(*args, **kwargs)

    return checked


def named(name: str, rank: int, module: str) -> Callable[[Callable], Callable]:
    """Names the function that a factory made for one rank, and fills the rank into its doc."""

    def apply(function: Callable) -> Callable:
        function.__name__ = function.__qualname__ = name.format(rank=rank)
        function.__module__ = module
        function.__doc__ = (function.__doc__ or "").replace("{rank}", str(rank))
        return by_name(function)

    return apply
