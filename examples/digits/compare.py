"""Runs the trained classifier in Flax and compares it with PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from digits import model_flax, model_torch
from digits.config import Config


class Difference(NamedTuple):
    """How far Flax's logits are from PyTorch's."""

    max_absolute: float
    max_relative: float  # to the largest logit
    other_predictions: int  # images for which the largest logit is another one


def compare(
    config: Config, model: model_torch.Classifier, images: np.ndarray, logits: np.ndarray
) -> Difference:
    """Compares `logits`, which `model` gave for `images`, with those of its Flax counterpart."""
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    flax_model = model_flax.load(config, weights)
    theirs = np.asarray(nnx.jit(lambda model, x: model(x))(flax_model, jnp.asarray(images)))
    largest = float(np.abs(logits - theirs).max())
    return Difference(
        max_absolute=largest,
        max_relative=largest / float(np.abs(logits).max()),
        other_predictions=int((logits.argmax(-1) != theirs.argmax(-1)).sum()),
    )
