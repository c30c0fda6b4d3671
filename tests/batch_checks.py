"""What tests of loaders and of streams ask of batches."""

import torch


def batches_of(loader):
    return [{name: tensor.clone() for name, tensor in batch.items()} for batch in loader]


def labels_of(batches):
    return torch.cat([batch["labels"] for batch in batches]).tolist()


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name, tensor in batch.items():
            assert torch.equal(tensor, other[name]), name
