"""The 1,797 handwritten digits that scikit-learn ships."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SIZE = 8  # pixels along either axis
CLASSES = 10
MIN_ACCURACY = 0.97  # what a classifier must reach on the images held out
_SPLIT_SEED = 0  # the split is the same for every training seed


class Digits(NamedTuple):
    """Images [n, 8, 8, 1] with values from 0 to 1, and labels [n] from 0 to 9."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load() -> Digits:
    """1,347 images to train on and 450 to test on, with all digits equally frequent in both."""
    digits = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    labels = digits.target
    train, test = train_test_split(
        range(len(labels)), test_size=450, random_state=_SPLIT_SEED, stratify=labels
    )
    return Digits(images[train], labels[train], images[test], labels[test])


def shifted(images: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Every image moved by -1, 0 or 1 pixel along either axis, filled up with background.

    Args:
        images: [n, 8, 8, 1].
        first: [2, n], the row and the column of the image, padded by a pixel on all sides, at which
            the result begins: random integers from 0 to 2.
    """
    n = len(images)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, columns = first[..., None] + np.arange(SIZE)
    return padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The share of images whose largest logit is the right one."""
    return float((logits.argmax(-1) == labels).mean())
