"""Train the small ViT on CIFAR-10 that benchmarks/token_accuracy.py prunes.

Run     python benchmarks/cifar_vit.py --data cifar10/ --teacher resnet20-cifar10/model.safetensors
Writes  outputs/benchmarks/vit-cifar10/ (a timm folder) and benchmarks/results/cifar_vit.json.

8 blocks of width 96, 65 tokens, trained on all 50,000 images with crops and flips; a convolutional teacher (keys as in
cifar_resnet.py) is asked once for every image and its mirror image, which lets so small a budget of epochs go further.
Cost: about three MACs of training a MAC of the model and image; an epoch is some nine minutes of one CPU thread.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from cifar_images import load_images, top1
from cifar_resnet import CifarResNet
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import Tensor, nn

FOLDER = Path("outputs", "benchmarks", "vit-cifar10")
RESULTS = Path(__file__).parent / "results" / "cifar_vit.json"
BATCH_SIZE, PEAK_RATE, WEIGHT_DECAY, CROP_PAD = 128, 1.5e-3, 0.05, 4


def small_vit() -> nn.Module:
    """Return the ViT, untrained."""
    size: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 8, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **size)


def augmented(pixels: Tensor, mirrored: Tensor) -> Tensor:
    """Return randomly shifted images, those marked mirrored."""
    size = pixels.shape[-1]
    padded = F.pad(torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels), (CROP_PAD,) * 4)
    shifts = torch.randint(2 * CROP_PAD + 1, (2, len(pixels), 1))
    rows, columns = (torch.arange(size) + shift for shift in shifts)
    image = torch.arange(len(pixels))[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def ask(teacher: nn.Module, pixels: Tensor) -> Tensor:
    """Return a teacher's log-probabilities `(2, images, classes)` of images and of their mirror images."""
    both = (pixels, pixels.flip(-1))
    return torch.stack([torch.cat([teacher(part).log_softmax(-1) for part in side.split(500)]) for side in both])


def train(model: nn.Module, pixels: Tensor, labels: Tensor, taught: Tensor, epochs: int) -> None:
    """Train in place on labels and a teacher's opinion, half each."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    )
    num_steps = epochs * (len(pixels) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, num_steps, pct_start=0.15)
    model.train()
    for epoch in range(epochs):
        started, loss = time.perf_counter(), torch.tensor(0.0)
        for batch in torch.randperm(len(pixels)).split(BATCH_SIZE)[: len(pixels) // BATCH_SIZE]:
            mirrored = torch.rand(len(batch)) < 0.5
            logits = model(augmented(pixels[batch], mirrored))
            divergence = F.kl_div(
                logits.log_softmax(-1), taught[mirrored.long(), batch], log_target=True, reduction="batchmean"
            )
            loss = F.cross_entropy(logits, labels[batch]) + divergence
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)


def main() -> None:
    """Train, score and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--num_train", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    pixels, labels = load_images(arguments.data, "train", arguments.num_train)
    teacher = CifarResNet(20).eval()
    teacher.load_state_dict(load_file(arguments.teacher))
    started = time.perf_counter()
    taught = ask(teacher, pixels)
    model = small_vit()
    train(model, pixels, labels, taught, arguments.epochs)
    result = {
        "top1": top1(model, *load_images(arguments.data, "test", 10_000)),
        "epochs": arguments.epochs,
        "num_train": len(pixels),
        "train_seconds": time.perf_counter() - started,
        "threads": torch.get_num_threads(),
    }
    save_for_hf(model, str(FOLDER))
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(result)


if __name__ == "__main__":
    main()
