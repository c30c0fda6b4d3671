"""Streams give every row once, reproducibly, however they are shared out."""

from dataclasses import replace

import datasets
import pytest
import torch
from accelerate import Accelerator
from batch_checks import assert_same, batches_of, labels_of

from hf_prune.data.examples import IGNORED_LABEL, IterableExamples
from hf_prune.data.loader import make_loader
from hf_prune.data.transforms import eval_transform, train_transform


def test_stream_is_evaluated_in_order_and_in_full(numbered_stream, plain):
    splits = numbered_stream()
    for num_workers in (0, 2):
        loader = make_loader(
            splits.test,
            splits=splits,
            transform=eval_transform(plain),
            batch_size=5,
            train=False,
            num_workers=num_workers,
        )
        loader.dataset.set_epoch(2)
        assert labels_of(batches_of(loader)) == list(range(24))


@pytest.mark.parametrize(("num_files", "num_workers"), [(4, 0), (4, 2), (1, 2)])
def test_training_stream_is_shuffled_reproducibly(numbered_stream, train_loader, num_files, num_workers):
    splits = numbered_stream(num_files)

    def epoch_of(epoch, seed=0):
        loader = train_loader(splits, num_workers=num_workers, seed=seed)
        loader.dataset.set_epoch(epoch)
        return batches_of(loader)

    first = epoch_of(0)
    assert sorted(labels_of(first)) == list(range(24))
    assert labels_of(first) != list(range(24))
    assert_same(first, epoch_of(0))
    assert labels_of(epoch_of(1)) != labels_of(first)
    assert sorted(labels_of(epoch_of(1))) == list(range(24))
    assert labels_of(epoch_of(0, seed=1)) != labels_of(first)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_limited_stream_gives_as_many_rows(numbered_stream, train_loader, num_workers):
    splits = numbered_stream()
    limited = replace(splits, train=splits.train.take(10))
    labels = labels_of(batches_of(train_loader(limited, num_workers=num_workers)))
    assert len(set(labels)) == len(labels) == 10


def test_every_streamed_example_is_augmented_on_its_own(make_rows, splits_of, plain):
    splits = splits_of(make_rows([0]).select([0] * 16).to_iterable_dataset(num_shards=2))
    loader = make_loader(
        splits.train,
        splits=splits,
        transform=train_transform(plain),
        batch_size=4,
        train=True,
        num_workers=2,
    )
    pixels = torch.cat([batch["pixel_values"] for batch in batches_of(loader)])
    assert len({image.numpy().tobytes() for image in pixels}) == 16


@pytest.mark.parametrize(("num_files", "world_size"), [(4, 2), (3, 2), (1, 3)])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_processes_share_a_stream_without_repeats(numbered_stream, plain, num_files, world_size, num_workers):
    splits = numbered_stream(num_files)
    found = []
    for rank in range(world_size):
        stream = IterableExamples(
            splits.train,
            splits=splits,
            transform=train_transform(plain),
            train=True,
            rank=rank,
            world_size=world_size,
        )
        stream.set_epoch(1)
        batches = batches_of(torch.utils.data.DataLoader(stream, batch_size=3, num_workers=num_workers))
        assert batches
        found += labels_of(batches)
    assert sorted(found) == list(range(24))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_held_out_part_of_a_stream_stays_apart(make_rows, write_parquet, load, plain, num_workers, monkeypatch):
    # `datasets` waits for 5 seconds after each pass over several parquet files.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)
    one_class_per_row = datasets.ClassLabel(names=[str(row) for row in range(60)])
    rows = make_rows(list(range(60)), label_type=one_class_per_row)
    folder = write_parquet({"train": [rows.shard(2, index) for index in range(2)]})
    splits = load(folder, streaming=True, train_val_split=0.3)
    found = []
    for split, train in ((splits.train, True), (splits.validation, False)):
        loader = make_loader(
            split,
            splits=splits,
            transform=eval_transform(plain),
            batch_size=4,
            train=train,
            num_workers=num_workers,
        )
        found += labels_of(batches_of(loader))
    assert sorted(found) == list(range(60))


def test_streams_skip_or_report_unreadable_images(messy_folder, splits_of, plain):
    rows = datasets.load_dataset(str(messy_folder), streaming=True)["train"]
    splits = splits_of(rows)

    def loader(train):
        return make_loader(splits.train, splits=splits, transform=eval_transform(plain), batch_size=4, train=train)

    trained, reported = batches_of(loader(train=True)), batches_of(loader(train=False))
    assert len(labels_of(trained)) == 14
    assert IGNORED_LABEL not in labels_of(trained)
    assert sum(int(batch["unreadable"].sum()) for batch in trained) == 2
    assert [row for row, label in enumerate(labels_of(reported)) if label == IGNORED_LABEL] == [2, 11]
    assert sum(int(batch["unreadable"].sum()) for batch in reported) == 2


def test_streams_pass_through_accelerate(numbered_stream, train_loader, plain):
    splits = numbered_stream()
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(train_loader(splits, batch_size=5))
    seen = [batches_of(loader) for _ in range(2)]
    assert [sorted(labels_of(batches)) for batches in seen] == [list(range(24))] * 2
    assert labels_of(seen[0]) != labels_of(seen[1])
    again = accelerator.prepare(train_loader(splits, batch_size=5))
    again.set_epoch(1)
    assert_same(batches_of(again), seen[1])
