"""PyTorch functions against the oracle, on random problems of every kind."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import cases  # noqa: E402
import oracle  # noqa: E402

import natten  # noqa: E402
import natten.functional as F  # noqa: E402

COUNT = cases.COUNT or 600


DEVICE = "cpu"  # of all tensors here; test_cuda.py changes it


def to_torch(case: cases.Case, x: np.ndarray, dtype: str | None = None) -> torch.Tensor:
    return torch.from_numpy(np.array(x)).to(DEVICE, getattr(torch, dtype or case.dtype))


def leaves(case: cases.Case, arrays: cases.Arrays, names: tuple[str, ...]) -> dict:
    """The named arguments that the case has, as tensors that require gradients. Every other case
    gets views with gaps in memory instead of dense tensors."""
    tensors = {n: to_torch(case, arrays[n]) for n in names if n in arrays}
    if case.seed % 2:
        tensors = {n: torch.stack([t, t], dim=1)[:, 1] for n, t in tensors.items()}
    return {n: t.requires_grad_() for n, t in tensors.items()}


def mask_of(case: cases.Case, arrays: cases.Arrays) -> dict:
    """The argument key_mask, if the case has it. For every other case it too has gaps, even in its
    innermost axis."""
    if "key_mask" not in arrays:
        return {}
    mask = to_torch(case, arrays["key_mask"], "bool")
    if case.seed % 2:
        mask = torch.stack([mask, ~mask], dim=-1)[..., 0]
    return {"key_mask": mask}


def to_numpy(tensors: dict) -> cases.Arrays:
    return {n: t.detach().to("cpu", torch.float64).numpy() for n, t in tensors.items()}


def statistic(case: cases.Case) -> str:
    return "float64" if case.dtype == "float64" else "float32"


def gradients(results: list, incoming: list, inputs: dict) -> dict:
    grads = torch.autograd.grad(results, list(inputs.values()), incoming)
    return {f"grad_{n}": g for n, g in zip(inputs, grads, strict=True)}


def run_fused(case: cases.Case, arrays: cases.Arrays) -> cases.Arrays:
    """Results and gradients."""
    names = ("query", "key", "value", "rpb", "additional_keys", "additional_values")
    inputs = leaves(case, arrays, names)
    function = (F.na1d, F.na2d, F.na3d)[case.rank - 1]
    options = case.neighborhood | mask_of(case, arrays)
    output, lse = function(**inputs, **options, scale=case.scale, return_lse=True)
    incoming = [
        to_torch(case, arrays["grad_output"]),
        to_torch(case, arrays["grad_logsumexp"], statistic(case)),
    ]
    assert output.dtype == inputs["query"].dtype
    assert lse.dtype == getattr(torch, statistic(case))
    got = {"output": output, "logsumexp": lse}
    return to_numpy(got | gradients([output, lse], incoming, inputs))


def check_fused(case: cases.Case, errors: cases.Errors) -> None:
    arrays = case.fused_arrays()
    scale = float(np.linalg.norm(arrays["grad_output"]))
    errors.check(case, run_fused(case, arrays), oracle.fused(case, arrays), scale)


def run_unfused(case: cases.Case, arrays: cases.Arrays) -> tuple[cases.Arrays, cases.Arrays]:
    """Results and gradients of qk and of av."""
    qk = (F.na1d_qk, F.na2d_qk, F.na3d_qk)[case.rank - 1]
    av = (F.na1d_av, F.na2d_av, F.na3d_av)[case.rank - 1]
    inputs = leaves(case, arrays, ("query", "key", "rpb", "additional_keys"))
    options = case.neighborhood | mask_of(case, arrays)
    attn = qk(**inputs, **options)
    of_qk = {"attn": attn, **gradients([attn], [to_torch(case, arrays["grad_attn"])], inputs)}
    inputs = leaves(case, arrays, ("attn", "value", "additional_values"))
    output = av(**inputs, **options)
    incoming = to_torch(case, arrays["grad_output"])
    of_av = {"output": output, **gradients([output], [incoming], inputs)}
    return to_numpy(of_qk), to_numpy(of_av)


@cases.a_tenth_and_the_rest(COUNT)
def test_fused(drawn, capsys):
    errors = cases.Errors("torch fused")
    for case in drawn:
        check_fused(case, errors)
    with capsys.disabled():
        print(f"\n{errors.table()}")


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "kernel_size", "stride", "dilation", "is_causal"),
    [
        ((1500,), (1301,), (1,), (1,), (False,)),
        ((1500,), (700,), (5,), (2,), (True,)),
        ((40, 37), (31, 37), (1, 1), (1, 1), (False, True)),
        ((6, 16, 15), (5, 15, 13), (2, 1, 1), (1, 1, 1), (False, False, False)),
        ((7, 3, 70), (1, 2, 23), (1, 1, 1), (2, 1, 3), (False, False, False)),
    ],
)
def test_fused_with_large_windows(dtype, shape, kernel_size, stride, dilation, is_causal):
    """Windows that exceed caches and buffers, and take other ways through a backend."""
    case = cases.Case(
        seed=len(shape), shape=shape, kernel_size=kernel_size, stride=stride, dilation=dilation,
        is_causal=is_causal, batch=1, heads=2, kv_heads=1, head_dim=128, value_dim=96,
        dtype=dtype, scale=None, rpb=True, additional=9,
    )  # fmt: skip
    check_fused(case, cases.Errors("large windows"))


def check_unfused(case: cases.Case, errors: cases.Errors) -> None:
    arrays = case.unfused_arrays()
    for got, want, incoming in zip(
        run_unfused(case, arrays),
        oracle.unfused(case, arrays),
        ("grad_attn", "grad_output"),
        strict=True,
    ):
        errors.check(case, got, want, float(np.linalg.norm(arrays[incoming])))


@cases.a_tenth_and_the_rest(COUNT, cases.SEED + 1)
def test_unfused(drawn, capsys):
    errors = cases.Errors("torch unfused")
    for case in drawn:
        check_unfused(case, errors)
    with capsys.disabled():
        print(f"\n{errors.table()}")


def check_module(case: cases.Case, errors: cases.Errors) -> None:
    """From what `qkv` gives to what `proj` gets, and back. Half of the cases by unfused operations,
    but for 16 bits, whose weights these round on the way."""
    torch.manual_seed(case.seed)
    module = getattr(natten, f"NeighborhoodAttention{case.rank}D")(
        case.heads * case.head_dim,
        case.heads,
        **case.neighborhood,
        rel_pos_bias=case.rpb,
        qk_scale=case.scale,
    ).to(getattr(torch, case.dtype))
    module.proj = torch.nn.Identity()
    arrays = case.fused_arrays()
    if case.rpb:
        module.rpb.data.copy_(to_torch(case, arrays["rpb"]))
    projected: list[torch.Tensor] = []
    module.qkv.register_forward_hook(lambda *of_call: projected.append(of_call[-1]))
    natten.use_fused_na(case.seed % 2 == 0 or "16" in case.dtype)
    x = torch.randn(case.batch, *case.shape, module.qkv.in_features, dtype=module.qkv.weight.dtype)
    output = module(3 * x, **mask_of(case, arrays)).unflatten(-1, (case.heads, case.head_dim))
    inputs = {"qkv": projected[0]} | ({"rpb": module.rpb} if case.rpb else {})
    grads = gradients([output], [to_torch(case, arrays["grad_output"])], inputs)
    split = [
        (t.unflatten(-1, (3, *output.shape[-2:])).movedim(-3, 0), prefix)
        for t, prefix in ((projected[0], ""), (grads.pop("grad_qkv"), "grad_"))
    ]
    given, of_qkv = (
        to_numpy({prefix + n: t for n, t in zip(("query", "key", "value"), of_three, strict=True)})
        for of_three, prefix in split
    )
    arrays |= given | {"grad_logsumexp": np.zeros_like(arrays["grad_logsumexp"])}
    want = oracle.fused(case, arrays)
    del want["logsumexp"]
    scale = float(np.linalg.norm(arrays["grad_output"]))
    errors.check(case, to_numpy({"output": output} | grads) | of_qkv, want, scale)


@cases.a_tenth_and_the_rest(COUNT, cases.SEED + 4)
def test_modules(drawn, capsys):
    errors = cases.Errors("torch modules")
    try:
        for case in map(cases.of_module, drawn):
            check_module(case, errors)
    finally:
        natten.use_fused_na(False)
    with capsys.disabled():
        print(f"\n{errors.table()}")
