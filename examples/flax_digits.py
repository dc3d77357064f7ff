"""Trains a small vision model of neighborhood attention in Flax nnx, with optax.

    python examples/flax_digits.py [--steps 210] [--seed 0]

The model of `digits/model_flax.py` learns the handwritten digits that scikit-learn ships, and is
tested on images held out. Runs on the CPU, downloads nothing, does without PyTorch, and fails if
the accuracy is too low.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # read when JAX is imported

import jax
import numpy as np
import optax
from digits import data
from digits.config import TRAINING, Config
from digits.model_flax import Classifier
from flax import nnx


def make_optimizer(steps: int) -> optax.GradientTransformation:
    """AdamW with the schedule of `TRAINING` over that many steps."""
    warmup = int(TRAINING.warmup * steps)
    rate = optax.warmup_cosine_decay_schedule(0.0, TRAINING.peak_rate, warmup, steps)
    return optax.chain(
        optax.clip_by_global_norm(TRAINING.max_norm),
        optax.adamw(rate, weight_decay=TRAINING.weight_decay),
    )


def loss_of(model: Classifier, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross entropy with smoothed labels, the mean over images."""
    logits = model(images)
    targets = jax.nn.one_hot(labels, logits.shape[-1])
    targets = optax.smooth_labels(targets, TRAINING.label_smoothing)
    return optax.softmax_cross_entropy(logits, targets).mean()


@nnx.jit
def logits_of(model: Classifier, images: jax.Array) -> jax.Array:
    return model(images)


def train(
    digits: data.Digits, config: Config, seed: int = 0, steps: int | None = None
) -> tuple[Classifier, list[float]]:
    """A trained classifier, in evaluation mode, and the loss of every step.

    Args:
        digits, config: what to learn, and the sizes of the model.
        seed: of the parameters, of dropout and of the order and shifts of images. The same one
            gives the same result.
        steps: how many batches; by default as many as `TRAINING.epochs` hold.
    """
    n = len(digits.train_labels)
    epoch = n // TRAINING.batch  # without the last, shorter batch, to be compiled separately
    steps = TRAINING.epochs * epoch if steps is None else steps
    model = Classifier(config, nnx.Rngs(seed))
    optimizer = make_optimizer(steps)
    optimizer_state = optimizer.init(nnx.state(model, nnx.Param))

    @nnx.jit
    def train_step(
        model: Classifier, optimizer_state: optax.OptState, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, optax.OptState]:
        """Updates the model in place."""
        loss, gradients = nnx.value_and_grad(loss_of)(model, images, labels)
        params = nnx.state(model, nnx.Param)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        nnx.update(model, optax.apply_updates(params, updates))
        return loss, optimizer_state

    random = np.random.default_rng(seed)
    losses: list[float] = []
    model.train()
    for step in range(steps):
        if step % epoch == 0:
            order = random.permutation(n)[: epoch * TRAINING.batch].reshape(epoch, TRAINING.batch)
        batch = order[step % epoch]
        images = data.shifted(digits.train_images[batch], random.integers(0, 3, (2, len(batch))))
        labels = digits.train_labels[batch]
        loss, optimizer_state = train_step(model, optimizer_state, images, labels)
        losses.append(float(loss))
        if (step + 1) % epoch == 0 or step + 1 == steps:
            print(f"step {step + 1:4}: loss {np.mean(losses[-epoch:]):.3f}", flush=True)
    model.eval()
    return model, losses


def main() -> int:
    """Trains and tests. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, help="batches to train on; by default ten epochs")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    args = parser.parse_args()

    digits = data.load()
    start = time.perf_counter()
    model, _ = train(digits, Config(), args.seed, args.steps)
    accuracy = data.accuracy(np.asarray(logits_of(model, digits.test_images)), digits.test_labels)
    print(
        f"accuracy: {accuracy:.2%} of {len(digits.test_labels)} held-out digits "
        f"({time.perf_counter() - start:.0f} s)"
    )
    if accuracy < data.MIN_ACCURACY:
        print(f"error: the accuracy must be at least {data.MIN_ACCURACY:.0%}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
