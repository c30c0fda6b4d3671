import torch
from accelerate import Accelerator
from tiny_models import NUM_CLASSES, build_dense, build_pruned, pixel_batch
from torch.utils.data import DataLoader, Dataset

from hf_prune.measure.accuracy import evaluate
from hf_prune.tokens.site import logits_of


class Rows(Dataset):
    def __init__(self, pixels, labels):
        self.pixels, self.labels = pixels, labels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "labels": self.labels[index], "unreadable": 0}


def test_every_readable_image_counts_once_and_unreadable_ones_do_not():
    model = build_dense("vit")
    build_pruned(model)
    pixels = pixel_batch(22)
    with torch.no_grad():
        predicted = logits_of(model(pixels)).argmax(-1)
    labels = predicted.clone()
    labels[:4] = (labels[:4] + 1) % NUM_CLASSES
    labels[4:6] = -100
    model.train()
    found = evaluate(model, DataLoader(Rows(pixels, labels), batch_size=8), Accelerator(cpu=True))
    assert (found.num_images, found.num_unreadable) == (20, 2)
    assert abs(found.top1 - 16 / 20) < 1e-6
    assert found.kept.shape == (20, 2)
    assert model.training  # as it was


def test_a_dense_model_keeps_no_counts():
    found = evaluate(
        build_dense("vit"), DataLoader(Rows(pixel_batch(3), torch.zeros(3).long()), batch_size=2), Accelerator(cpu=True)
    )
    assert found.kept.shape == (3, 0)
