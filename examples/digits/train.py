"""Training and evaluation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from tqdm import tqdm

from digits.config import Config
from digits.data import Digits, shifted
from digits.model_torch import Classifier

EPOCHS = 10
BATCH = 64
PEAK_RATE = 3e-3
WEIGHT_DECAY = 0.05


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """The model's logits without dropout. Leaves it in evaluation mode."""
    model.eval()
    return torch.cat([model(batch) for batch in images.split(BATCH)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of images whose largest logit is the right one."""
    return (logits.argmax(-1) == labels).double().mean().item()


def _rate(step: int, steps: int) -> float:
    """Part of the peak learning rate: a short linear rise, then half a cosine to 0."""
    warmup = steps // 20
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))


def train(digits: Digits, config: Config, seed: int = 0, epochs: int = EPOCHS) -> Classifier:
    """A classifier trained on the training images. A seed gives the same result every time."""
    torch.manual_seed(seed)
    model = Classifier(config)
    generator = torch.Generator().manual_seed(seed)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=WEIGHT_DECAY)
    n = len(digits.train_labels)
    steps = epochs * math.ceil(n / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))

    with tqdm(total=steps, desc="training", unit="step", ncols=100) as bar:
        for _ in range(epochs):
            model.train()
            total_loss, right = 0.0, 0
            for batch in torch.randperm(n, generator=generator).split(BATCH):
                labels = digits.train_labels[batch]
                logits = model(shifted(digits.train_images[batch], generator))
                loss = loss_of(logits, labels)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                total_loss += loss.item() * len(batch)
                right += int((logits.argmax(-1) == labels).sum())
                bar.update()
            bar.set_postfix(loss=f"{total_loss / n:.3f}", accuracy=f"{right / n:.3f}")
    return model
