"""The image tower: learns to read single cells, the part that CLIP's pretraining plays in LLaVA."""

import torch
from torch.nn import functional
from torch.utils.data import Dataset
from transformers.image_processing_utils import BaseImageProcessor

from .task import CELL, CELLS, COLUMNS, EDGE, LINES, RetentionTask

# What a vision token is to tell of its cell: digit, number, and the four lines of the digit's box.
CLASSES = (10, CELLS, LINES, LINES, LINES, LINES)


class Cells(Dataset):
    """Images and, per vision token, what `CLASSES` says: int64 [6, vision tokens]."""

    def __init__(self, count: int, image_processor: BaseImageProcessor, patch: int, seed: tuple[int, ...]):
        self.count, self.image_processor, self.seed = count, image_processor, seed
        self.task = RetentionTask("train")
        rows = torch.arange(EDGE // patch) * patch // CELL
        self.cell_of = (rows[:, None] * COLUMNS + rows).flatten()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.task.sample((*self.seed, index), ("position",))
        cells = torch.tensor([(sample.digits[cell], cell, *sample.boxes[cell]) for cell in range(CELLS)])
        pixels = self.image_processor([sample.image], return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": cells[self.cell_of].T}


class CellReader(torch.nn.Module):
    """A linear head on the tower, thrown away afterwards."""

    def __init__(self, tower: torch.nn.Module):
        super().__init__()
        self.tower = tower
        self.head = torch.nn.Linear(tower.config.hidden_size, sum(CLASSES))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """pixel_values [B, 3, H, W], labels [B, 6, vision tokens] -> loss, and logits [B, vision tokens, all classes]."""
        logits = self.head(self.tower(pixel_values).last_hidden_state[:, 1:])
        parts = zip(logits.split(CLASSES, dim=-1), labels.unbind(1), strict=True)
        digit, cell, *box = (functional.cross_entropy(part.flatten(0, 1), label.flatten()) for part, label in parts)
        return {"loss": digit + cell + sum(box) / len(box), "logits": logits}
