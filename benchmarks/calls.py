"""What a PyTorch call costs besides its arithmetic, and what other kinds of calls cost.

    python benchmarks/calls.py

overhead    microseconds per call on a tiny problem (16 tokens, one head of 8 channels, a window of
            3x3), where next to nothing is computed: without autograd, with inputs that require
            gradients, and forward with backward; beside scaled_dot_product_attention
nested      a batch of images of different sizes as one nested tensor, and one call per image
modes       forward mode, and first and second derivatives, as multiples of one forward call

Each figure is the median of rounds in which all variants of a block take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import natten.functional as F

Variants = dict[str, Callable[[], object]]


def take_turns(variants: Variants, rounds: int, calls: int) -> dict[str, float]:
    """Seconds per call of each variant: the median over rounds of `calls` calls."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for function in variants.values():
        for _ in range(3):
            function()
    for _ in range(rounds):
        for name, function in variants.items():
            start = time.perf_counter()
            for _ in range(calls):
                function()
            times[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(t) for name, t in times.items()}


def backward(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    torch.autograd.grad(function(*inputs).sum(), inputs)


def overhead(rounds: int) -> None:
    heads_last = list(torch.randn(3, 1, 4, 4, 1, 8))
    heads_first = list(torch.randn(3, 1, 1, 4, 4, 8))
    weights = torch.randn(1, 1, 4, 4, 9)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    calls: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        "na2d": (lambda q, k, v: F.na2d(q, k, v, 3), heads_last),
        "na2d_qk": (lambda q, k: F.na2d_qk(q, k, 3), heads_first[:2]),
        "na2d_av": (lambda a, v: F.na2d_av(a, v, 3), [weights, heads_first[0]]),
        "sdpa": (sdpa, [x.flatten(2, 3) for x in heads_first]),
    }
    variants: Variants = {}
    for name, (function, inputs) in calls.items():
        leaves = [x.clone().requires_grad_() for x in inputs]
        variants[f"{name} plain"] = lambda f=function, x=inputs: f(*x)
        variants[f"{name} autograd"] = lambda f=function, x=leaves: f(*x)
        variants[f"{name} backward"] = lambda f=function, x=leaves: backward(f, *x)
    # Few calls at a time, so that slow phases of a machine meet all alike.
    us = {k: 1e6 * t for k, t in take_turns(variants, 30 * rounds, 10).items()}
    kinds = ("plain", "autograd", "backward")
    print(f"{'overhead, us':14} no autograd  autograd  forward+backward  times sdpa's")
    for name in calls:
        row = [us[f"{name} {kind}"] for kind in kinds]
        ratios = "  ".join(
            f"{t / us[f'sdpa {kind}']:.2f}" for kind, t in zip(kinds, row, strict=True)
        )
        print(f"{name:14} {row[0]:11.1f} {row[1]:9.1f} {row[2]:17.1f}  {ratios}")


def nested(rounds: int) -> None:
    print(f"\n{'nested, ms':24} one call  one per image  ratio")
    for title, sizes in {
        "64 images of 6^2..13^2": [(6 + i % 8, 6 + i * 3 % 8) for i in range(64)],
        "8 images of 24^2..59^2": [(24 + 5 * i, 59 - 5 * i) for i in range(8)],
    }.items():
        images = [torch.randn(*size, 4, 32) for size in sizes]
        batch = torch.nested.as_nested_tensor(images)
        variants: Variants = {
            "one": lambda x=batch: F.na2d(x, x, x, 5),
            "each": lambda xs=images: [F.na2d(x, x, x, 5) for x in (x[None] for x in xs)],
        }
        ms = {k: 1e3 * t for k, t in take_turns(variants, rounds, 3).items()}
        ratio = ms["each"] / ms["one"]
        print(f"{title:24} {ms['one']:8.2f} {ms['each']:14.2f} {ratio:6.2f}")


def modes(rounds: int) -> None:
    inputs = tuple(torch.randn(3, 1, 32, 32, 4, 32).unbind())
    leaves = [x.clone().requires_grad_() for x in inputs]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.na2d(q, k, v, 7)

    def second() -> None:
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    def hessian_vector() -> object:
        gradient = torch.func.grad(lambda *x: function(*x).square().sum(), argnums=(0, 1, 2))
        return torch.func.jvp(gradient, inputs, inputs)

    variants: Variants = {
        "forward": lambda: function(*inputs),
        "forward and backward": lambda: backward(function, *leaves),
        "forward mode": lambda: torch.func.jvp(function, inputs, inputs),
        "forward over reverse": hessian_vector,
        "backward twice": second,
    }
    times = take_turns(variants, rounds, 1)
    print("\nmodes: 32x32 tokens, 4 heads of 32, 7x7")
    for name, seconds in times.items():
        print(f"{name:24} {1e3 * seconds:8.2f} ms {seconds / times['forward']:6.1f} x forward")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"PyTorch {torch.__version__}, {args.threads} threads, median of {args.rounds} rounds")
    with torch.no_grad():
        nested(args.rounds)
    modes(args.rounds)
    torch.set_num_threads(1)
    print()
    overhead(args.rounds)


if __name__ == "__main__":
    main()
