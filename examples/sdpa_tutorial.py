"""PyTorch's tutorial on scaled dot product attention, on `natten.attention`.

    python examples/sdpa_tutorial.py [--length 256] [--compile-backend inductor]

1. Calls fused attention and compares it with PyTorch's.
2. Chooses an implementation explicitly, and times each.
3. Builds causal self attention as a module.
4. Gives it a batch of sequences of different lengths, as a nested tensor.
5. Compiles it, times it and profiles it.

The default compiler, inductor, needs a C++ compiler on the CPU; `--compile-backend aot_eager` does
without.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils import benchmark

import natten

IMPLEMENTATIONS = ("vectorized", "naive")


def benchmark_in_microseconds(f: Callable, *args, **kwargs) -> float:
    """Mean time of `f(*args, **kwargs)`."""
    timer = benchmark.Timer(
        stmt="f(*args, **kwargs)", globals={"args": args, "kwargs": kwargs, "f": f}
    )
    return timer.blocked_autorange(min_run_time=0.1).mean * 1e6


def compare_with_torch() -> None:
    """The same numbers as `scaled_dot_product_attention`, whose heads come before its tokens."""
    query, key, value = (
        torch.randn(2, 3, 1, 8) for _ in range(3)
    )  # batch, tokens, heads, channels
    output = natten.attention(query, key, value)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
    difference = (output - expected.transpose(1, 2)).abs().max().item()
    print(f"largest difference from scaled_dot_product_attention: {difference:.1e}")
    if not difference < 1e-5:
        raise AssertionError("natten.attention and scaled_dot_product_attention differ")


def time_implementations(batch_size: int, length: int, num_heads: int, head_dim: int) -> None:
    """Times the implementation that natten chooses, then each by name."""
    query, key, value = (torch.rand(batch_size, length, num_heads, head_dim) for _ in range(3))
    time = benchmark_in_microseconds(natten.attention, query, key, value)
    print(f"default implementation: {time:.1f} microseconds")
    for name in IMPLEMENTATIONS:
        with natten.na_kernel(name):
            try:
                time = benchmark_in_microseconds(natten.attention, query, key, value)
            except (RuntimeError, ValueError) as error:
                print(f"{name} implementation: cannot, {error}")
            else:
                print(f"{name} implementation: {time:.1f} microseconds")


class CausalSelfAttention(nn.Module):
    """Multi-head self attention in which a token sees itself and those before it.

    Maps [batch, tokens, embed_dimension] to the same shape, also as a nested tensor of sequences
    [tokens, embed_dimension].

    The tutorial's module drops attention weights while it trains, and is causal only then.
    `natten.attention` has no dropout, which leaves the one on the result, and this module is causal
    always.
    """

    def __init__(
        self, num_heads: int, embed_dimension: int, bias: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if embed_dimension % num_heads != 0:
            raise ValueError(f"num_heads: got {num_heads}; must divide {embed_dimension}")
        self.num_heads = num_heads
        # Queries, keys and values of all heads in one product.
        self.c_attn = nn.Linear(embed_dimension, 3 * embed_dimension, bias=bias)
        self.c_proj = nn.Linear(embed_dimension, embed_dimension, bias=bias)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        # natten is heads-last: the heads need no transposing.
        qkv = self.c_attn(x).unflatten(-1, (3, self.num_heads, x.shape[-1] // self.num_heads))
        query, key, value = (qkv.select(2, i) for i in range(3))
        y = natten.attention(query, key, value, is_causal=True)
        return self.resid_dropout(self.c_proj(y.flatten(-2)))


def generate_rand_batch(
    batch_size: int, max_length: int, embed_dimension: int, pad_percentage: float | None = None
) -> Tensor:
    """Random sequences: all of max_length, or a nested tensor of sequences that are shorter by
    about `pad_percentage` but for one."""
    if not pad_percentage:
        return torch.randn(batch_size, max_length, embed_dimension)
    lengths = [
        max(1, int(max_length * (1 - random.gauss(pad_percentage, 0.01))))
        for _ in range(batch_size)
    ]
    lengths[random.randrange(batch_size)] = max_length
    sequences = [torch.randn(n, embed_dimension) for n in lengths]
    return torch.nested.nested_tensor(sequences, layout=torch.jagged)


def time_nested(model: nn.Module, batch_size: int, max_length: int, embed_dimension: int) -> None:
    """Sequences of their own lengths cost less than all padded to the longest."""
    nested = generate_rand_batch(batch_size, max_length, embed_dimension, pad_percentage=0.5)
    dense = generate_rand_batch(batch_size, max_length, embed_dimension)
    print(f"nested batch: {benchmark_in_microseconds(model, nested):.1f} microseconds")
    print(f"dense batch: {benchmark_in_microseconds(model, dense):.1f} microseconds")


def time_compiled(model: nn.Module, x: Tensor, compile_backend: str, steps: int) -> None:
    """Times and profiles the module as it is and compiled."""
    compiled_model = torch.compile(model, backend=compile_backend)
    torch.testing.assert_close(compiled_model(x), model(x))  # the first call compiles
    for name, module in (("non-compiled", model), ("compiled", compiled_model)):
        print(f"{name} module: {benchmark_in_microseconds(module, x):.1f} microseconds")
    for name, module in (("non-compiled", model), ("compiled", compiled_model)):
        with (
            profile(activities=[ProfilerActivity.CPU]) as profiled,
            record_function(f"{name} causal attention"),
        ):
            for _ in range(steps):
                module(x)
        print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=10))


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--num-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--steps", type=int, default=25, help="calls in a profile")
    parser.add_argument("--compile-backend", default="inductor", help="of torch.compile")
    args = parser.parse_args(arguments)
    random.seed(0)
    torch.manual_seed(0)

    compare_with_torch()
    time_implementations(args.batch_size, args.length, args.num_heads, args.head_dim)

    embed_dimension = args.num_heads * args.head_dim
    model = CausalSelfAttention(args.num_heads, embed_dimension, dropout=0.1).eval()
    print(model)
    time_nested(model, args.batch_size, args.length, embed_dimension)

    x = torch.rand(args.batch_size, args.length, embed_dimension)
    time_compiled(model, x, args.compile_backend, args.steps)


if __name__ == "__main__":
    main()
