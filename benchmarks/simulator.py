"""How well `natten.simulate` predicts this CPU: predicted and measured times of random problems.

    python benchmarks/simulator.py
    python benchmarks/simulator.py --count 100 --seed 7 --dtype float16 --backward

Problems are drawn over rank, window, stride, dilation, heads and head dim, other ones than those
that the simulator measures. Prints each with both times, then the correlation of their ranks, the
median of the relative errors and how long calibration took. The time of a problem is the best of
some, for others tell of what else the machine did. Needs numpy only.
"""

from __future__ import annotations

import argparse
import random
import time

import numpy as np

import natten
from natten import _core
from natten._calibration import calibrated, random_layer, runner, time_of


def ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "float16", "float64"], default="float32")
    parser.add_argument("--backward", action="store_true", help="of the backward pass alone")
    args = parser.parse_args()
    op = "attention_backward" if args.backward else "attention_forward"
    start = time.perf_counter()
    prices = calibrated(args.dtype, op)
    seconds = time.perf_counter() - start
    for name, row in prices.of_pass.items():
        print(name, " ".join(f"{price:.2e}" for price in row))
    rng = random.Random(args.seed)
    predicted, measured = [], []
    for number in range(args.count):
        layer = random_layer(rng, args.dtype, (3e7, 1e8, 4e8, 1e9)[number % 4])
        works = layer.work(op, "cpu", _core.num_threads())
        predicted.append(sum(prices.seconds(works)))
        run = runner(layer, op, ("grad_logsumexp",))
        measured.append(min(time_of(run) for _ in range(args.repeats)))
        window = " ".join(
            f"{name}={'x'.join(map(str, values))}"
            for name, values in layer.window.items()
            if name == "kernel_size" or len(set(values)) > 1 or values[0] not in (1, "shift", False)
        )
        print(
            f"{1e3 * predicted[-1]:8.2f} ms predicted {1e3 * measured[-1]:8.2f} ms measured "
            f"{predicted[-1] / measured[-1]:5.2f}  {'x'.join(map(str, layer.grid))} "
            f"heads={layer.heads} dim={layer.head_dim} {window}"
        )
    correlation = np.corrcoef(ranks(predicted), ranks(measured))[0, 1]
    errors = np.abs(np.array(predicted) / np.array(measured) - 1)
    print(
        f"natten {natten.__version__}, {args.dtype}, {op}, {_core.num_threads()} threads: rank "
        f"correlation {correlation:.3f}, median error {100 * np.median(errors):.1f} %, 90th "
        f"percentile {100 * np.percentile(errors, 90):.1f} %, calibrated in {seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
