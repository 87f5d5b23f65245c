# pyright: strict
"""A program that type checkers read: a network and a dataset in memory, a store, a loop, a student."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import permafrost


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.linear = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.conv(images)
        logits: Tensor = self.linear(features.relu().mean((2, 3)))
        return logits


class Squares(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((3, 16, 16), index / 64), index % 4


def fill(store: Path) -> tuple[str, ...]:
    result = permafrost.precompute(
        teacher=Net().eval(),
        dataset=Squares(),
        store=store,
        outputs=["logits", "maps"],
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        executor="serial",
    )
    return result.passes


def train(store: Path) -> float:
    samples = permafrost.load_store(store, augment="pad_crop_flip", seed=1)
    student, total = Net(), 0.0
    for batch in DataLoader(samples, batch_size=16, shuffle=True):
        loss = permafrost.kd_loss(student(batch.image), batch.logits, tau=4.0)
        total += loss.item()
    result = permafrost.distill(student=student, store=store, method="kd", tau=4, epochs=1)
    trained: nn.Module = result.model
    measured = permafrost.evaluate(student=trained, store=store, splits=["train"])
    accuracy: float = measured.splits["train"]["accuracy"]
    names: list[str] = permafrost.list_methods() + permafrost.list_networks("resnet*")
    return total + accuracy + len(names)


if __name__ == "__main__":
    print(fill(Path("store")), train(Path("store")))
