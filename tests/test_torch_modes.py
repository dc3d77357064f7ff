"""PyTorch functions and modules in the precisions and modes that PyTorch can be in.

Most tests go over all operations: they compare a mode with a plain call, bit by bit.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from cases import FORWARD_BOUND, GRADIENT_BOUND, relative_error  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch_cases import AV, FUSED, MODULES, QK  # noqa: E402

import natten  # noqa: E402
import natten.functional as F  # noqa: E402

GRIDS = {1: (9,), 2: (6, 5), 3: (4, 4, 3)}
LARGE = {1: (400,), 2: (24, 20), 3: (8, 9, 7)}  # enough work to be split over threads
KERNELS = {1: (3,), 2: (2, 3), 3: (3, 2, 2)}
MIXED = {
    1: dict(kernel_size=KERNELS[1], dilation=2, is_causal=True, stride=2),
    2: dict(kernel_size=KERNELS[2], dilation=(2, 1), is_causal=(False, True), stride=(1, 2)),
    3: dict(kernel_size=KERNELS[3], dilation=(1, 2, 1), is_causal=(False, True, False)),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALVES = DTYPES[2:]
# A part of a grid twice as large in both axes, of which the keys are given whole and a little more.
PART: dict[str, Any] = dict(
    kernel_size=KERNELS[2], dilation=(2, 1), stride=(1, 3), boundary=("cut", "circular"),
)  # fmt: skip
OPERATIONS = [f"na{rank}d{kind}" for kind in ("", "_qk", "_av") for rank in (1, 2, 3)]
OPERATIONS += [f"part na2d{kind}" for kind in ("", "_qk", "_av")]  # of a grid, with a mask
OPERATIONS += ["attention", "merge_attentions"]

every_operation = pytest.mark.parametrize("name", OPERATIONS)
both_kinds = pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _modes_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    natten.use_fused_na(False)
    natten.use_deterministic_algorithms(False)
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Problem:
    """An operation with every option it has, and its inputs."""

    function: Callable[..., Sequence[Tensor]]
    inputs: tuple[Tensor, ...]

    def to(self, dtype: torch.dtype) -> Problem:
        """The same values as far as `dtype` has them. Statistics are at least float32."""
        inputs = (x.detach().to(dtype).requires_grad_() for x in self.inputs)
        return replace(self, inputs=tuple(inputs))

    def map(self, view: Callable[[Tensor], Tensor]) -> Problem:
        return replace(self, inputs=tuple(view(x) for x in self.inputs))

    def outputs(self) -> Sequence[Tensor]:
        return self.function(*self.inputs)

    def results(self, wrt: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Outputs, and gradients with respect to the inputs for random incoming ones."""
        outputs = self.outputs()
        return [*outputs, *gradients(outputs, self.inputs if wrt is None else wrt)]


def gradients(outputs: Sequence[Tensor], wrt: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch.autograd.grad(outputs, wrt, [incoming(x) for x in outputs])


def incoming(x: Tensor) -> Tensor:
    """A random gradient of `x`, the same for the same shape, exact in every dtype."""
    generator = torch.Generator().manual_seed(x.numel())
    return torch.randint(-8, 9, x.shape, generator=generator).to(x.dtype) / 8


def problem(name: str, batch: int = 2, grids: dict[int, tuple[int, ...]] = GRIDS) -> Problem:
    heads, kv_heads, dim, value_dim, additional = 4, 2, 4, 3, 2

    def made(function: Callable, *shapes: tuple[int, ...]) -> Problem:
        generator = torch.Generator().manual_seed(len(name))
        tensors = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
        return Problem(function, tuple(x.requires_grad_() for x in tensors))

    if name == "attention":
        length, kv_length = grids[1][0], grids[1][0] - 2
        return made(
            lambda q, k, v: natten.attention(q, k, v, is_causal=True, return_lse=True),
            (batch, length, heads, dim),
            (batch, kv_length, kv_heads, dim),
            (batch, kv_length, kv_heads, value_dim),
        )
    if name == "merge_attentions":

        def merge(q: Tensor, *parts: Tensor) -> Sequence[Tensor]:
            pairs = zip(parts[::2], parts[1::2], strict=True)
            done = [natten.attention(q, k, v, return_lse=True) for k, v in pairs]
            return natten.merge_attentions([o for o, _ in done], [lse for _, lse in done])

        length = grids[1][0]
        parts = [(batch, n, kv_heads, d) for n in (length, 2, length - 3) for d in (dim, value_dim)]
        return made(merge, (batch, length, heads, dim), *parts)

    is_part = name.startswith("part ")
    name = name.removeprefix("part ")
    rank, kind = int(name[2]), name[4:]
    grid, options = grids[rank], MIXED[rank]
    keys = grid
    if is_part:
        whole = (2 * grid[0], 3 * grid[1])
        keys = (whole[0] + 2, whole[1])
        options = PART | dict(query_offset=grid, key_offset=(-1, 1), grid_size=whole)
    bias = (heads, *(2 * k - 1 for k in KERNELS[rank]))

    def options_for(x: Tensor) -> dict[str, Any]:
        """The mask is on the device of the other tensors, and only as real as they are."""
        if not is_part:
            return options
        mask = torch.arange(math.prod(keys), device=x.device) % 4 > 0
        return options | dict(key_mask=mask.view(1, *keys))

    if kind == "_qk":

        def qk(q: Tensor, k: Tensor, rpb: Tensor, extra: Tensor) -> Sequence[Tensor]:
            attn = QK[rank](q, k, rpb=rpb, additional_keys=extra, **options_for(q))
            return (attn.masked_fill(attn == -torch.inf, 0.0),)

        return made(
            qk,
            (batch, heads, *grid, dim),
            (batch, heads, *keys, dim),
            bias,
            (batch, heads, additional, dim),
        )
    if kind == "_av":
        return made(
            lambda a, v, extra: (AV[rank](a, v, additional_values=extra, **options_for(a)),),
            (batch, heads, *grid, math.prod(KERNELS[rank]) + additional),
            (batch, heads, *keys, dim),
            (batch, heads, additional, dim),
        )
    return made(
        lambda q, k, v, rpb, ak, av: FUSED[rank](
            q, k, v, rpb=rpb, additional_keys=ak, additional_values=av, return_lse=True,
            **options_for(q),
        ),
        (batch, *grid, heads, dim),
        (batch, *keys, kv_heads, dim),
        (batch, *keys, kv_heads, value_dim),
        bias,
        (batch, additional, kv_heads, dim),
        (batch, additional, kv_heads, value_dim),
    )  # fmt: skip


def module_of(rank: int, **more: Any) -> torch.nn.Module:
    """A module with a bias that matters."""
    module = MODULES[rank](8, 2, rel_pos_bias=True, **MIXED[rank], **more)
    with torch.no_grad():
        module.rpb.normal_()
    return module


def module_results(module: torch.nn.Module, x: Tensor) -> list[Tensor]:
    out = module(x)
    return [out, *gradients([out], [x, *module.parameters()])]


def assert_same(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """Same dtypes, shapes and bits."""
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == b.dtype, f"result {i}: dtype {a.dtype}, expected {b.dtype}"
        assert a.shape == b.shape, f"result {i}: shape {a.shape}, expected {b.shape}"
        assert b.isfinite().all(), f"result {i}: nothing to compare with"
        assert torch.equal(a, b), f"result {i}: off by up to {(a - b).abs().max():.3g}"


# ---- autocast ----


@every_operation
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_is_a_cast_of_the_inputs(name, dtype):
    case = problem(name).to(torch.float32)
    with torch.autocast("cpu", dtype):
        outputs = case.outputs()
    got = [*outputs, *gradients(outputs, case.inputs)]
    assert got[0].dtype == dtype
    assert all(x.dtype == torch.float32 for x in got[1:])
    if name != "merge_attentions":  # in which the query is cast for each of the parts
        assert_same(got, case.map(lambda x: x.to(dtype)).results(case.inputs))

    # The reference from the same rounded inputs.
    want = case.to(dtype).to(torch.float64).results()
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        bound = FORWARD_BOUND if i < len(outputs) else GRADIENT_BOUND
        error = relative_error(a.detach().double().numpy(), b.detach().numpy())
        assert error <= bound[str(dtype).removeprefix("torch.")], f"result {i}: error {error:.3g}"


@every_operation
def test_autocast_leaves_float64(name):
    case = problem(name)
    want = case.results()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(case.results(), want)


def test_autocast_unites_dtypes():
    """As in a model where a norm's result is float32 and a linear map's is not."""
    case = problem("na2d").to(torch.float32)
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.bfloat16]
    mixed = [x.to(d) for x, d in zip(case.inputs, [*dtypes, torch.float16], strict=True)]
    with pytest.raises(TypeError, match=r"^key: "):
        case.function(*mixed)
    want = case.function(*(x.bfloat16() for x in mixed))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(case.function(*mixed), want)


def test_autocast_does_not_cast_what_has_no_kernel():
    x = torch.ones(1, 6, 1, 2, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"^query: "):
        F.na1d(x, x, x, 3)


@every_operation
def test_autocast_disabled_inside(name):
    case = problem(name).to(torch.float32)
    want = case.results()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            assert_same(case.results(), want)
        assert case.outputs()[0].dtype == torch.bfloat16
    assert_same(case.results(), want)


@pytest.mark.parametrize("name", OPERATIONS[:-1])  # merging is composed of PyTorch's operations
def test_autocast_does_not_reach_into_derivatives(name):
    """A backward pass, and one more, inside the region give what they give outside of it."""
    case = problem(name).to(torch.float32)

    def twice(region: contextlib.AbstractContextManager) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = case.outputs()
        with region:
            grads = torch.autograd.grad(
                outputs, case.inputs, [incoming(x) for x in outputs], create_graph=True
            )
            scalar = sum(x.square().sum() for x in grads)
            options: dict[str, Any] = dict(allow_unused=True, materialize_grads=True)
            return [*grads, *torch.autograd.grad(scalar, case.inputs, **options)]

    inside, outside = torch.autocast("cpu", torch.bfloat16), contextlib.nullcontext()
    assert_same(twice(inside), twice(outside))


def test_autocast_of_transforms():
    q = torch.randn(3, 2, 9, 2, 4)

    def loss(q: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        out = F.na1d(*(q.to(dtype) for _ in range(3)), 3)
        return out.float().square().sum()

    want = torch.func.vmap(torch.func.grad(lambda q: loss(q, torch.bfloat16)))(q)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.func.vmap(torch.func.grad(loss))(q)
    assert_same([got], [want])
    tangent = torch.randn_like(q)
    with torch.autocast("cpu", torch.float16):
        out, dual = torch.func.jvp(lambda q: F.na1d(q, q, q, 3), (q[0],), (tangent[0],))
    assert out.dtype == dual.dtype == torch.float16


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@both_kinds
def test_module_trains_under_autocast(rank, dtype, fused):
    """Steps of training are those of a model whose parameters are cast by hand."""
    natten.use_fused_na(fused)
    by_hand = module_of(rank)
    module = copy.deepcopy(by_hand)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (module, by_hand)]
    x = torch.randn(2, *GRIDS[rank], 8)
    losses = []
    for _ in range(3):
        with torch.autocast("cpu", dtype):
            out = module(x)
        assert out.dtype == dtype
        cast = {n: p.to(dtype) for n, p in by_hand.named_parameters()}
        want = torch.func.functional_call(by_hand, cast, x.to(dtype))
        for result, optimizer in zip((out, want), optimizers, strict=True):
            optimizer.zero_grad()
            (result.float() - x).square().mean().backward()
        grads = [[p.grad for p in m.parameters()] for m in (module, by_hand)]
        assert all(g.dtype == torch.float32 for g in grads[0])
        assert_same([out, *grads[0]], [want, *grads[1]])
        for optimizer in optimizers:
            optimizer.step()
        losses.append((out.float() - x).square().mean().item())
    assert losses[2] < losses[1] < losses[0]


# ---- determinism ----


@every_operation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_threads_and_every_time(name, dtype):
    case = problem(name, grids=LARGE).to(dtype)
    torch.set_num_threads(1)
    want = case.results()
    for threads in (2, 3, 2):
        torch.set_num_threads(threads)
        assert_same(case.results(), want)


@every_operation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_algorithms(name, dtype):
    """Allowed, the same as ever, and no element of memory that PyTorch fills is left."""
    case = problem(name).to(dtype)
    want = case.results()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan().all()
    assert_same(case.results(), want)
    assert_same(case.results(), want)
    natten.use_deterministic_algorithms(True)
    assert_same(case.results(), want)


@both_kinds
def test_module_with_deterministic_algorithms(fused):
    natten.use_fused_na(fused)
    module, x = module_of(2), torch.randn(2, *GRIDS[2], 8, requires_grad=True)
    want = module_results(module, x)
    torch.use_deterministic_algorithms(True)
    natten.use_deterministic_algorithms(True)
    assert_same(module_results(module, x), want)


# ---- without gradients ----


@every_operation
@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)],
    ids=["no_grad", "inference_mode", "set_grad_enabled"],
)  # fmt: skip
def test_modes_without_gradients(name, mode):
    case = problem(name)
    want = case.results()
    with mode():
        got = case.outputs()
        assert_same(got, want[: len(got)])
        if mode is not torch.inference_mode:
            with torch.enable_grad():
                assert_same(case.results(), want)
    assert not any(x.requires_grad for x in got)
    assert all(x.is_inference() == (mode is torch.inference_mode) for x in got)


@every_operation
def test_inference_tensors_later(name):
    case = problem(name)
    with torch.inference_mode():
        inputs = [x.clone() for x in case.inputs]
    assert_same(case.function(*inputs), case.outputs())
    if len(inputs) > 1:
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            case.function(case.inputs[0], *inputs[1:])
    clones = [x.clone() for x in inputs[1:]]
    outputs = case.function(case.inputs[0], *clones)
    assert_same(gradients(outputs, case.inputs[:1]), case.results(case.inputs[:1])[len(outputs) :])


@every_operation
def test_gradient_of_one_input(name):
    """The same bits as with all others; and nothing is computed for inputs that need none."""
    case = problem(name)
    outputs = case.outputs()
    want = gradients(outputs, case.inputs)
    for i in range(len(want)):
        inputs = [x.detach().requires_grad_(i == j) for j, x in enumerate(case.inputs)]
        outputs = case.function(*inputs)
        used = [x for x in outputs if x.requires_grad]
        assert_same(gradients(used, [inputs[i]]), [want[i]])


# ---- checkpointing ----


@every_operation
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(name, reentrant):
    case = problem(name)
    outputs = checkpoint(case.function, *case.inputs, use_reentrant=reentrant)
    got = [x.detach() for x in outputs]
    torch.autograd.backward(outputs, [incoming(x) for x in outputs])
    assert_same([*got, *(x.grad for x in case.inputs)], [x.detach() for x in case.results()])


@pytest.mark.parametrize("reentrant", [False, True])
@both_kinds
def test_checkpoint_of_module(reentrant, fused):
    """Dropout too is drawn once more as it was; then the module uses the unfused operations."""
    natten.use_fused_na(fused)
    for drop in (0.0, 0.5):
        module = module_of(2, attn_drop=drop, proj_drop=drop)
        x = torch.randn(2, *GRIDS[2], 8, requires_grad=True)
        torch.manual_seed(1)
        want = module_results(module, x)
        torch.manual_seed(1)
        out = checkpoint(module, x, use_reentrant=reentrant)
        out.backward(incoming(out))
        assert_same([out, x.grad, *(p.grad for p in module.parameters())], want)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_inside_na_kernel(reentrant):
    """What is computed once more in the backward pass runs outside of the block, so on another
    backend; `context_fn` takes the block along."""
    case = problem("na2d")
    with natten.na_kernel("naive"):
        want = case.results()
        outputs = checkpoint(case.function, *case.inputs, use_reentrant=reentrant)
    torch.autograd.backward(outputs, [incoming(x) for x in outputs])
    for x, grad in zip(case.inputs, want[2:], strict=True):
        assert relative_error(x.grad.numpy(), grad.numpy()) <= GRADIENT_BOUND["float64"]
    if reentrant:
        return
    outputs = checkpoint(
        case.function,
        *case.inputs,
        use_reentrant=False,
        context_fn=lambda: (natten.na_kernel("naive"), natten.na_kernel("naive")),
    )
    assert_same([*outputs, *gradients(outputs, case.inputs)], want)


class Backends(TorchDispatchMode):
    """Collects the backend that each of our operators is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Any backend may gather a bias: it only copies.
        if func.namespace == "natten" and func is not torch.ops.natten.rpb_gather.default:
            self.seen.append(args[-1])
        return func(*args, **(kwargs or {}))


@every_operation
def test_na_kernel_holds_for_the_backward_pass(name):
    case = problem(name)
    with Backends() as backends:
        with natten.na_kernel("naive"):
            outputs = case.outputs()
        count = len(backends.seen)
        grads = torch.autograd.grad(
            outputs, case.inputs, [incoming(x) for x in outputs], create_graph=True
        )
        sum(x.square().sum() for x in grads).backward()
        assert len(backends.seen) > 2 * count
        assert set(backends.seen) == {"naive"}
        case.outputs()
        assert backends.seen[-1] == ""


# ---- layouts ----


def innermost_apart(x: Tensor) -> Tensor:
    """As a channels-last tensor has it: the innermost axis is the slowest in memory."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


LAYOUTS = {
    "heads transposed": lambda x: x.transpose(1, -2).contiguous().transpose(1, -2),
    "innermost stride": innermost_apart,
    "steps": lambda x: torch.stack([x, x], -2)[..., 1, :],
    "steps innermost": lambda x: torch.stack([x, -x], -1).flatten(-2)[..., ::2],
    "steps of batch": lambda x: torch.stack([x, -x], 1).flatten(0, 1)[::2],
    "offset": lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
    "expanded batch": lambda x: x[:1].expand(x.shape),
    "expanded grid": lambda x: x[:, :1].expand(x.shape),
    "expanded head_dim": lambda x: x[..., :1].expand(x.shape),
    "negative view": lambda x: torch._neg_view(-x),
    "strides of permuted memory": lambda x: x.movedim(0, -2).contiguous().movedim(-2, 0),
}


@every_operation
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(name, layout):
    case = problem(name)
    viewed = case.map(LAYOUTS[layout])
    assert viewed.inputs[0].is_neg() or not viewed.inputs[0].is_contiguous()
    dense = case.map(lambda x: LAYOUTS[layout](x).clone(memory_format=torch.contiguous_format))
    assert_same(viewed.results(case.inputs), dense.results(case.inputs))


@every_operation
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_incoming_gradients(name, layout):
    case = problem(name)
    outputs = case.outputs()
    grads = [LAYOUTS[layout](incoming(x)) for x in outputs]
    got = torch.autograd.grad(outputs, case.inputs, grads, retain_graph=True)
    dense = [x.clone(memory_format=torch.contiguous_format) for x in grads]
    assert_same(got, torch.autograd.grad(outputs, case.inputs, dense))


def test_negated_views():
    """Their memory holds the values with the other sign, which a kernel would not know."""
    x = torch.randn(1, 9, 2, 4, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    y = x.resolve_neg()
    assert torch.equal(F.na1d(x, y, x, 3), F.na1d(y, y, y, 3))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_query_key_and_value_of_one_tensor(rank):
    """As models split the result of their linear map."""
    heads, dim, grid = 2, 4, GRIDS[rank]
    qkv = torch.randn(2, *grid, 3 * heads * dim, dtype=torch.float64, requires_grad=True)

    def of(parts: Sequence[Tensor]) -> list[Tensor]:
        out = FUSED[rank](*parts, **MIXED[rank])
        return [out, *gradients([out], [qkv])]

    by_part = qkv.unflatten(-1, (3, heads, dim))
    want = of([x.contiguous() for x in by_part.unbind(-3)])
    assert_same(of([x.unflatten(-1, (heads, dim)) for x in qkv.chunk(3, -1)]), want)
    assert_same(of(by_part.unbind(-3)), want)
    assert_same(of(by_part.movedim(-3, 0).contiguous()), want)
    heads_first = by_part.movedim(-3, 0).movedim(-2, 2).contiguous()
    assert_same(of([x.movedim(1, -2) for x in heads_first]), want)
    innermost = by_part.movedim(-3, -1).contiguous()
    assert_same(of(innermost.unbind(-1)), want)


# ---- empty batches ----


@every_operation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_of_zero(name, dtype):
    case = problem(name, batch=0).to(dtype)
    like = problem(name, batch=1).to(dtype).results()
    for x, want in zip(case.results(), like, strict=True):
        if 0 in x.shape:
            assert x.shape == (0, *want.shape[1:])
        else:  # the gradient of a bias
            assert x.shape == want.shape and not x.any()
        assert x.dtype == want.dtype
    with torch.inference_mode():
        assert case.outputs()[0].shape[0] == 0
    with torch.autocast("cpu", torch.bfloat16):
        wanted = dtype if dtype == torch.float64 else torch.bfloat16
        assert case.outputs()[0].dtype == wanted


@pytest.mark.parametrize("rank", [1, 2, 3])
@both_kinds
def test_module_with_batch_of_zero(rank, fused):
    natten.use_fused_na(fused)
    module = module_of(rank)
    x = torch.randn(0, *GRIDS[rank], 8, requires_grad=True)
    out, x_grad, *grads = module_results(module, x)
    assert out.shape == x_grad.shape == x.shape
    for parameter, grad in zip(module.parameters(), grads, strict=True):
        assert grad.shape == parameter.shape and not grad.any()


@every_operation
@pytest.mark.parametrize(("batch", "mapped"), [(0, 3), (2, 0), (0, 0), (0, 1)])
def test_vmap_with_nothing_inside(name, batch, mapped):
    case = problem(name, batch=batch)
    inputs = [x.detach().expand(mapped, *x.shape).clone().requires_grad_() for x in case.inputs]
    outputs = torch.func.vmap(lambda *x: tuple(case.function(*x)))(*inputs)
    for x, want in zip(outputs, case.outputs(), strict=True):
        assert x.shape == (mapped, *want.shape)
    grads = gradients(outputs, inputs)
    for grad, x in zip(grads, inputs, strict=True):
        assert grad.shape == x.shape and not grad.any()


# ---- modules as objects ----


@pytest.mark.parametrize("rank", [1, 2, 3])
@both_kinds
def test_module_saved_and_loaded_whole(rank, fused):
    natten.use_fused_na(fused)
    module, x = module_of(rank), torch.randn(2, *GRIDS[rank], 8, requires_grad=True)
    want = module_results(module, x)  # also: a module that was used can still be saved
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    assert_same(module_results(torch.load(buffer, weights_only=False), x), want)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    fresh = module_of(rank)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same(module_results(fresh, x), want)


def test_deep_copy_of_module_is_its_own():
    module, x = module_of(1), torch.randn(2, *GRIDS[1], 8)
    copied = copy.deepcopy(module)
    want = module(x)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1)
    assert torch.equal(module(x), want)
    assert not torch.equal(copied(x), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@both_kinds
def test_module_converted(dtype, fused):
    """`to`, and the method named for the type, convert every parameter, and back."""
    natten.use_fused_na(fused)
    method = {torch.float64: "double", torch.float32: "float", torch.float16: "half"}
    module = module_of(2)
    weights = {n: p.detach().clone() for n, p in module.named_parameters()}
    named = getattr(copy.deepcopy(module), method.get(dtype, "bfloat16"))()
    module = module.to(dtype)
    assert {p.dtype for p in module.parameters()} == {dtype}
    x = torch.randn(2, *GRIDS[2], 8).to(dtype).requires_grad_()
    results = module_results(module, x)
    assert all(y.dtype == dtype for y in results)
    assert_same(module_results(named, x), results)
    for name, parameter in module.float().named_parameters():
        assert torch.equal(parameter, weights[name].to(dtype).float())


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("assign", [False, True])
def test_module_made_without_memory(rank, assign):
    module, x = module_of(rank), torch.randn(2, *GRIDS[rank], 8)
    with torch.device("meta"):
        empty = MODULES[rank](8, 2, rel_pos_bias=True, **MIXED[rank])
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert {n: p.shape for n, p in empty.named_parameters()} == {
        n: p.shape for n, p in module.named_parameters()
    }
    if not assign:
        empty = empty.to_empty(device="cpu")
    empty.load_state_dict(module.state_dict(), assign=assign)
    assert_same([empty(x)], [module(x)])


def test_default_dtype_is_that_of_parameters():
    torch.set_default_dtype(torch.float64)
    try:
        module = module_of(1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in module.parameters()} == {torch.float64}


# ---- autograd ----


@every_operation
def test_saved_tensor_hooks(name):
    case = problem(name)
    want = case.results()
    with torch.autograd.graph.save_on_cpu():
        outputs = case.outputs()
    assert_same([*outputs, *gradients(outputs, case.inputs)], want)

    packed: list[tuple[torch.dtype, bytes, torch.Size]] = []

    def pack(x: Tensor) -> int:
        packed.append(
            (x.dtype, bytes(x.detach().contiguous().flatten().view(torch.uint8)), x.shape)
        )
        return len(packed) - 1

    def unpack(i: int) -> Tensor:
        dtype, data, shape = packed[i]
        return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        outputs = case.outputs()
    assert packed
    assert_same([*outputs, *gradients(outputs, case.inputs)], want)


@pytest.mark.parametrize("backend", [None, "composed"])
def test_saved_tensor_hooks_around_derivatives(backend):
    """Derivatives that hooks are active around too, as if loss.backward() stood below `with`."""
    x = torch.randn(1, 5, 6, 2, 4, requires_grad=True, dtype=torch.float64)

    def twice():
        output = natten.na2d(x, x, x, kernel_size=3, backend=backend)
        (first,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        return first, *torch.autograd.grad(first.square().sum(), x)

    want = twice()
    seen: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        assert_same(twice(), want)
        before = len(seen)
        x.square()
        assert len(seen) == before + 1  # it is active still


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_fused_saves_inputs_and_logsumexp_alone(rank):
    """No weights, and no copies: the tensors that are given, and one number per token and head."""
    case = problem(f"na{rank}d")
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        _, lse = case.outputs()
    addresses = {x.data_ptr() for x in (*case.inputs, lse)}
    assert {x.data_ptr() for x in saved} == addresses and len(saved) == len(addresses)


@every_operation
def test_backward_twice(name):
    case = problem(name)
    outputs = case.outputs()
    grads = [incoming(x) for x in outputs]
    want = gradients(case.outputs(), case.inputs)
    for times in (1, 2):
        torch.autograd.backward(outputs, grads, retain_graph=times == 1)
        assert_same([x.grad for x in case.inputs], [times * g for g in want])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.backward(outputs, grads)


@every_operation
def test_gradient_hooks(name):
    case = problem(name)
    want = case.results()
    outputs = case.outputs()
    seen: dict[int, Tensor] = {}
    for i, x in enumerate(case.inputs):
        x.register_hook(lambda grad, i=i: seen.__setitem__(i, grad.clone()) or 2 * grad)
    torch.autograd.backward(outputs, [incoming(x) for x in outputs])
    for i, (x, grad) in enumerate(zip(case.inputs, want[len(outputs) :], strict=True)):
        assert_same([seen[i], x.grad], [grad, 2 * grad])


@both_kinds
def test_module_hooks(fused):
    natten.use_fused_na(fused)
    module, x = module_of(1), torch.randn(2, *GRIDS[1], 8, requires_grad=True)
    _, x_grad, *_ = module_results(module, x)
    calls = []
    module.register_forward_pre_hook(lambda module, args: (args[0] * 1,))
    module.register_forward_hook(lambda module, args, out: calls.append("forward"))
    module.register_full_backward_hook(lambda module, into, out: calls.append(into[0]))
    out = module(x)
    out.backward(incoming(out))
    assert calls[0] == "forward"
    assert_same([calls[1], x.grad], [x_grad, x_grad])


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_one_tensor_as_query_key_and_value(rank):
    options = MIXED[rank]
    x = torch.randn(2, *GRIDS[rank], 2, 4, dtype=torch.float64, requires_grad=True)
    copies = [x.detach().clone().requires_grad_() for _ in range(3)]
    out = FUSED[rank](x, x, x, **options)
    want = FUSED[rank](*copies, **options)
    assert_same([out], [want])
    (got,) = gradients([out], [x])
    torch.testing.assert_close(got, sum(gradients([want], copies)), rtol=1e-13, atol=1e-13)


@every_operation
def test_input_changed_before_backward(name):
    """Every input that the gradients need is watched; the bias of qk is not needed."""
    count = len(problem(name).inputs)
    for i in range(count):
        case = problem(name).map(lambda x: x.detach().clone().requires_grad_())
        outputs = case.outputs()
        with torch.no_grad():
            case.inputs[i].add_(1)
        needed = not (name.endswith("_qk") and i == 2)
        context = (
            pytest.raises(RuntimeError, match="modified by an inplace operation")
            if needed
            else contextlib.nullcontext()
        )
        with context:
            gradients(outputs, case.inputs)


@pytest.mark.parametrize("name", ["na1d", "na2d", "na3d", "attention"])
def test_output_changed_before_backward(name):
    """The output is not needed for gradients; logsumexp is."""
    case = problem(name)
    want = case.results()[2:]
    output, lse = case.outputs()
    assert_same(gradients([output.mul_(1), lse], case.inputs), want)
    output, lse = case.outputs()
    lse.mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients([output, lse], case.inputs)


@every_operation
@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected")
def test_anomaly_mode(name):
    case = problem(name)
    want = case.results()
    with torch.autograd.detect_anomaly(check_nan=True):
        assert_same(case.results(), want)
        with torch.no_grad():
            case.inputs[0].view(-1)[0] = torch.nan
        outputs = case.outputs()
        with pytest.raises(RuntimeError, match="returned nan values"):
            gradients(outputs, case.inputs)


@pytest.mark.parametrize("name", ["na1d", "na1d_qk", "na1d_av", "attention"])
def test_autograd_functional(name):
    """torch.autograd.functional in all its ways, against torch.func."""
    case = problem(name, batch=1, grids={1: (4,)} if name == "attention" else {1: (6,)})
    x, *rest = (x.detach() for x in case.inputs)
    functional = torch.autograd.functional

    def function(x: Tensor) -> Tensor:
        return case.function(x, *rest)[0]

    def loss(x: Tensor) -> Tensor:
        return function(x).sin().sum()

    direction, out = torch.randn_like(x), function(x)
    jacobian = torch.func.jacrev(function)(x)
    hessian = torch.func.hessian(loss)(x)
    close = dict(rtol=1e-12, atol=1e-12)
    for way in (
        dict(),
        dict(vectorize=True),
        dict(vectorize=True, strategy="forward-mode"),
    ):
        torch.testing.assert_close(functional.jacobian(function, x, **way), jacobian, **close)
    for way in (
        dict(),
        dict(vectorize=True),
        dict(vectorize=True, outer_jacobian_strategy="forward-mode"),
    ):
        torch.testing.assert_close(functional.hessian(loss, x, **way), hessian, **close)
    matrix = jacobian.reshape(out.numel(), x.numel())
    torch.testing.assert_close(
        functional.jvp(function, x, direction)[1].flatten(), matrix @ direction.flatten(), **close
    )
    torch.testing.assert_close(
        functional.vjp(function, x, out)[1].flatten(), out.flatten() @ matrix, **close
    )
    product = hessian.reshape(x.numel(), x.numel()) @ direction.flatten()
    for way in (functional.hvp, functional.vhp):
        torch.testing.assert_close(way(loss, x, direction)[1].flatten(), product, **close)


@every_operation
@pytest.mark.parametrize("count", [1, 3])
def test_batched_gradients(name, count):
    """torch.autograd.grad(..., is_grads_batched=True), which maps by means of its own."""
    case = problem(name)
    outputs = case.outputs()
    grads = [torch.randn(count, *x.shape, dtype=x.dtype) for x in outputs]
    options: dict[str, Any] = dict(retain_graph=True, create_graph=True)
    got = torch.autograd.grad(outputs, case.inputs, grads, is_grads_batched=True, **options)
    each = [
        torch.autograd.grad(outputs, case.inputs, [g[i] for g in grads], **options)
        for i in range(count)
    ]
    want = [torch.stack(x) for x in zip(*each, strict=True)]
    torch.testing.assert_close(got, tuple(want), rtol=1e-12, atol=1e-12)
    for x, y in zip(got, want, strict=True):
        if y.requires_grad:  # the gradient of a bias of scores is no function of the inputs
            second = [
                torch.autograd.grad(
                    g.square().sum(),
                    case.inputs,
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                for g in (x, y)
            ]
            torch.testing.assert_close(*second, rtol=1e-11, atol=1e-11)


# ---- threads and processes ----


@pytest.mark.parametrize("name", ["na2d", "na2d_qk", "na2d_av", "attention"])
def test_threads_that_call_at_once(name):
    """Each gets the bits that it gets alone, whatever backend the others chose."""
    cases = [problem(name, grids=LARGE).map(lambda x, i=i: x.detach() + i) for i in range(4)]
    cases = [case.to(torch.float32) for case in cases]
    blocks = [natten.na_kernel("naive"), *[contextlib.nullcontext()] * 3]
    torch.set_num_threads(2)

    def work(i: int) -> list[Tensor]:
        with blocks[i]:
            return cases[i].results()

    want = [work(i) for i in range(4)]
    failures: list[BaseException] = []
    start = threading.Barrier(4)

    def repeat(i: int) -> None:
        try:
            start.wait()
            for _ in range(4):
                assert_same(work(i), want[i])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


class Attended(torch.utils.data.Dataset):
    """Examples that are made with natten, as a preprocessing step would."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Tensor:
        case = problem("na2d", grids=LARGE).map(lambda x: x.detach() + i).to(torch.float32)
        output, _, grad, *_ = case.results()
        return torch.cat([output.detach().flatten(), grad.flatten()])


@pytest.mark.skipif("fork" not in torch.multiprocessing.get_all_start_methods(), reason="no fork")
def test_data_loader_workers():
    dataset = Attended()
    torch.set_num_threads(2)
    want = [dataset[i] for i in range(len(dataset))]  # the parent's threads have started
    loader = torch.utils.data.DataLoader(
        dataset, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    got = [x[0] for x in loader]
    assert_same(got, want)
    assert_same([dataset[0]], want[:1])


# ---- what wraps or watches tensors ----


class OwnParameter(torch.nn.Parameter):
    pass


class OwnTensor(torch.Tensor):
    pass


@every_operation
@pytest.mark.parametrize("kind", [torch.nn.Parameter, OwnParameter, OwnTensor])
def test_subclasses(name, kind):
    case = problem(name)
    want = case.results()
    inputs = [
        x.detach().as_subclass(kind).requires_grad_() if kind is OwnTensor else kind(x.detach())
        for x in case.inputs
    ]
    outputs = case.function(*inputs)
    # As PyTorch has it for its own operations: results of parameters are plain tensors.
    expected = torch.Tensor if kind is not OwnTensor else OwnTensor
    assert all(type(x) is expected for x in outputs)
    torch.autograd.backward(outputs, [incoming(x) for x in outputs])
    got = [*outputs, *(x.grad for x in inputs)]
    assert_same([x.as_subclass(torch.Tensor) for x in got], want)


@every_operation
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_fake_tensors(name, dtype):
    """Shapes, dtypes and strides of results are known without computing them."""
    from torch._subclasses import FakeTensor, FakeTensorMode

    case = problem(name).to(dtype)
    want = case.results()
    mode = FakeTensorMode()
    inputs = [mode.from_tensor(x.detach()).requires_grad_() for x in case.inputs]
    with mode:
        outputs = case.function(*inputs)
        got = [*outputs, *torch.autograd.grad(outputs, inputs, [x.detach() for x in outputs])]
    for fake, real in zip(got, want, strict=True):
        assert isinstance(fake, FakeTensor)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@every_operation
def test_meta_tensors(name):
    case = problem(name).to(torch.float16)
    want = case.results()
    on_meta = case.map(lambda x: x.detach().to("meta").requires_grad_())
    outputs = on_meta.outputs()
    got = [*outputs, *torch.autograd.grad(outputs, on_meta.inputs, [x.detach() for x in outputs])]
    for x, real in zip(got, want, strict=True):
        assert x.is_meta
        assert (x.shape, x.dtype, x.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("name", ["na1d", "na2d", "na3d", "attention"])
def test_profiler_shows_operators(name):
    case = problem(name)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as profile:
        case.results()
    shapes = {e.key: e.input_shapes for e in profile.key_averages(group_by_input_shape=True)}
    given = [list(x.shape) for x in case.inputs]
    for operator in ("attention_forward", "attention_backward"):
        assert shapes[f"natten::{operator}"][: len(given)] == given


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_profiler_shows_unfused_operators(rank):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        problem(f"na{rank}d_qk").results()
        problem(f"na{rank}d_av").results()
    names = {e.key for e in profile.key_averages()}
    assert {f"natten::{x}" for x in ("qk", "av", "av_transpose", "rpb_scatter")} <= names
