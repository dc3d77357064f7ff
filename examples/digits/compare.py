"""Runs the trained classifier in Flax and compares it with PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from torch import Tensor

from digits import model_flax, model_torch
from digits.config import Config


class Difference(NamedTuple):
    """How far Flax's logits are from PyTorch's."""

    max_absolute: float
    max_relative: float  # to the largest logit
    other_predictions: int  # images for which the largest logit is another one


def compare(
    config: Config, model: model_torch.Classifier, images: Tensor, logits: Tensor
) -> Difference:
    """Compares `logits`, which `model` gave for `images`, with those of its Flax counterpart."""
    flax_model = model_flax.load(config, model.state_dict())
    ours = logits.numpy()
    theirs = np.asarray(nnx.jit(flax_model)(jnp.asarray(images.numpy())))
    largest = float(np.abs(ours - theirs).max())
    return Difference(
        max_absolute=largest,
        max_relative=largest / float(np.abs(ours).max()),
        other_predictions=int((ours.argmax(-1) != theirs.argmax(-1)).sum()),
    )
