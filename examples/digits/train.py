"""Training and evaluation in PyTorch."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from digits.config import TRAINING, Config
from digits.data import Digits, shifted
from digits.model_torch import Classifier


@torch.no_grad()
def logits_of(model: nn.Module, images: np.ndarray) -> np.ndarray:
    """The model's logits without dropout. Leaves it in evaluation mode."""
    model.eval()
    batches = torch.from_numpy(images).split(TRAINING.batch)
    return torch.cat([model(batch) for batch in batches]).numpy()


def _rate(step: int, steps: int, warmup: int) -> float:
    """Part of the peak learning rate."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))


def train(digits: Digits, config: Config, seed: int = 0) -> Classifier:
    """A classifier trained on the training images. A seed gives the same result every time."""
    torch.manual_seed(seed)
    model = Classifier(config)
    generator = torch.Generator().manual_seed(seed)
    loss_of = nn.CrossEntropyLoss(label_smoothing=TRAINING.label_smoothing)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=TRAINING.peak_rate, weight_decay=TRAINING.weight_decay
    )
    n = len(digits.train_labels)
    steps = TRAINING.epochs * math.ceil(n / TRAINING.batch)
    warmup = int(TRAINING.warmup * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps, warmup))

    with tqdm(total=steps, desc="training", unit="step", ncols=100) as bar:
        for _ in range(TRAINING.epochs):
            model.train()
            total_loss, right = 0.0, 0
            for batch in torch.randperm(n, generator=generator).split(TRAINING.batch):
                first = torch.randint(0, 3, (2, len(batch)), generator=generator)
                images = shifted(digits.train_images[batch.numpy()], first.numpy())
                labels = torch.from_numpy(digits.train_labels[batch.numpy()])
                logits = model(torch.from_numpy(images))
                loss = loss_of(logits, labels)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), TRAINING.max_norm)
                optimizer.step()
                schedule.step()
                total_loss += loss.item() * len(batch)
                right += int((logits.argmax(-1) == labels).sum())
                bar.update()
            bar.set_postfix(loss=f"{total_loss / n:.3f}", accuracy=f"{right / n:.3f}")
    return model
