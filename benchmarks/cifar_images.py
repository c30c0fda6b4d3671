"""Images of CIFAR-10 in memory for benchmarks: loaded, augmented, classified."""

from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_prune.tokens.site import logits_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Images = tuple[Tensor, Tensor]


def load_images(folder: Path, split: str, num_images: int) -> Images:
    """Return the first images of a split as model inputs, and their labels."""
    rows = datasets.load_dataset(
        "parquet", data_files=str(folder / f"{split}-*.parquet"), split="train", streaming=True
    )
    rows = list(rows.take(num_images))
    image, label = (next(key for key in rows[0] if word in key) for word in ("im", "label"))
    pixels = torch.stack([torch.from_numpy(np.array(row[image].convert("RGB"))) for row in rows])
    scaled = (pixels.permute(0, 3, 1, 2).float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(
        3, 1, 1
    )
    return scaled, torch.tensor([row[label] for row in rows])


@torch.no_grad()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images classified rightly."""
    model.eval()
    found = torch.cat([logits_of(model(part)).argmax(-1) for part in images.split(250)])
    return float((found == labels).float().mean())


def augmented(train: Images, generator: torch.Generator) -> Iterator[Images]:
    """Yield the whole batches of an epoch, each image shifted by up to an eighth of its size and flipped or not."""
    side, order = train[0].shape[-1], torch.randperm(len(train[1]), generator=generator)
    pad = side // 8
    for chosen in order.split(128):
        if len(chosen) < min(128, len(order)):
            continue
        padded = F.pad(train[0][chosen], (pad, pad, pad, pad))
        shifts = torch.randint(0, 2 * pad + 1, (len(chosen), 2), generator=generator).tolist()
        flips = torch.rand(len(chosen), generator=generator) < 0.5
        images = torch.stack([x[:, i : i + side, j : j + side] for x, (i, j) in zip(padded, shifts, strict=True)])
        yield torch.where(flips[:, None, None, None], images.flip(-1), images), train[1][chosen]
