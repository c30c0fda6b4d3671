"""Top-1 accuracy, and how many tokens each image kept on the way."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_prune.tokens.pruning import TokenPruning
from hf_prune.tokens.site import logits_of


@dataclass(frozen=True)
class Accuracy:
    """What an evaluation found.

    Attributes:
        top1: Share of readable images classified right, 0 to 1.
        num_images: Readable images.
        num_unreadable: Images that could not be read and do not count.
        kept: `(images, selectors)` patches alive after each selector; no columns for a dense model.
    """

    top1: float
    num_images: int
    num_unreadable: int
    kept: Tensor


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, accelerator: Accelerator, *, title: str = "evaluate") -> Accuracy:
    """Classify a split and count.

    Memory: a few numbers an image. Works on several processes; every image counts once.

    Args:
        model: On the accelerator's device; put into evaluation mode meanwhile.
        loader: Not yet prepared evaluation batches.
        accelerator: Devices and processes.
        title: Of the progress bar.
    """
    was_training = model.training
    model.eval()
    pruning = next((module for module in model.modules() if isinstance(module, TokenPruning)), None)
    labels, predictions, kept = [], [], []
    batches = accelerator.prepare_data_loader(loader)
    for batch in tqdm(batches, desc=title, disable=not accelerator.is_main_process, unit="batch", leave=False):
        logits = logits_of(model(batch["pixel_values"]))
        counts = torch.zeros(len(logits), 0, device=logits.device)
        if pruning is not None:
            counts = torch.stack([record.keep.sum(1) for record in pruning.take_records()], dim=1)
        gathered = accelerator.gather_for_metrics((batch["labels"], logits.argmax(-1), counts))
        for store, values in zip((labels, predictions, kept), gathered, strict=True):
            store.append(values.cpu())
    model.train(was_training)
    all_labels, all_kept = torch.cat(labels), torch.cat(kept)
    readable = all_labels >= 0
    right = (torch.cat(predictions) == all_labels)[readable]
    return Accuracy(right.float().mean().item(), int(readable.sum()), int((~readable).sum()), all_kept[readable])
