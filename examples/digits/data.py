"""The 1,797 handwritten digits that scikit-learn ships."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

SIZE = 8  # pixels along either axis
CLASSES = 10
_SPLIT_SEED = 0  # the split is the same for every training seed


class Digits(NamedTuple):
    """Images [n, 8, 8, 1] with values from 0 to 1, and labels [n] from 0 to 9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load() -> Digits:
    """1,347 images to train on and 450 to test on, with all digits equally frequent in both."""
    digits = load_digits()
    images = torch.tensor(digits.images[..., None] / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    train, test = train_test_split(
        range(len(labels)), test_size=450, random_state=_SPLIT_SEED, stratify=labels
    )
    return Digits(images[train], labels[train], images[test], labels[test])


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image moved by -1, 0 or 1 pixel along either axis, filled up with background."""
    n = len(images)
    padded = torch.nn.functional.pad(images, (0, 0, 1, 1, 1, 1))
    first = torch.randint(0, 3, (2, n, 1), generator=generator)
    rows, columns = first + torch.arange(SIZE)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
