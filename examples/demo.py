"""Trains a classifier made of neighborhood attention, runs it in Flax, and draws attention.

    python examples/demo.py [--out demo_output] [--seed 0]

1. Trains on the handwritten digits that scikit-learn ships, and tests on images held out.
2. Gives the weights to a Flax model of the same shape and compares the logits.
3. Draws neighborhoods and attention weights over a photograph.

Runs on the CPU, downloads nothing, and fails if the accuracy or the agreement is too low.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

# Read when PyTorch and JAX are imported. PyTorch's threads sleep while they wait, where by default
# they spin: on a busy machine that keeps the thread they wait for from running.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import photo
from digits import compare, data, train
from digits.config import Config

import natten

MAX_DIFFERENCE = 1e-4  # of logits between PyTorch and Flax, relative to the largest


def main() -> int:
    """Runs the demo. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="for the pictures")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    natten.use_fused_na()
    config = Config()
    digits = data.load()
    start = time.perf_counter()
    model = train.train(digits, config, args.seed)
    logits = train.logits_of(model, digits.test_images)
    accuracy = data.accuracy(logits, digits.test_labels)
    trained = time.perf_counter()
    print(
        f"accuracy: {accuracy:.2%} of {len(logits)} held-out digits "
        f"({trained - start:.0f} s of training)"
    )
    if accuracy < data.MIN_ACCURACY:
        print(f"error: the accuracy must be at least {data.MIN_ACCURACY:.0%}", file=sys.stderr)
        return 1

    difference = compare.compare(config, model, digits.test_images, logits)
    compared = time.perf_counter()
    print(
        f"Flax with the same weights: logits differ by at most {difference.max_absolute:.1e} "
        f"({difference.max_relative:.1e} of the largest), {difference.other_predictions} other "
        f"predictions ({compared - trained:.0f} s)"
    )
    if difference.max_relative > MAX_DIFFERENCE or difference.other_predictions:
        print("error: PyTorch and Flax must agree", file=sys.stderr)
        return 1

    paths = photo.draw_all(args.out)
    done = time.perf_counter()
    print(f"pictures ({done - compared:.0f} s):")
    for path in paths:
        print(f"  {path.resolve()}")
    print(f"total: {done - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
