"""Batches are the same whatever the workers, processes and history; broken images are lived with."""

import itertools
import pickle
import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader, skip_first_batches
from batch_checks import assert_same, batches_of, labels_of

from hf_prune.data.decode import decode_image
from hf_prune.data.examples import ImageExamples, own_randomness
from hf_prune.data.loader import EpochShuffle, make_loader
from hf_prune.data.transforms import eval_transform, train_transform
from hf_prune.errors import DataError

# Batches


def test_training_batches(numbered, train_loader):
    batches = batches_of(train_loader(numbered, batch_size=5))
    assert len(batches) == 4  # the last, of 4 images, is dropped
    for batch in batches:
        assert batch.keys() == {"pixel_values", "labels", "unreadable"}
        assert (batch["pixel_values"].shape, batch["pixel_values"].dtype) == ((5, 3, 16, 16), torch.float32)
        assert (batch["labels"].shape, batch["labels"].dtype) == ((5,), torch.int64)
        assert batch["unreadable"].tolist() == [0] * 5
    labels = labels_of(batches)
    assert len(set(labels)) == 20
    assert labels != sorted(labels)


def test_fewer_rows_than_a_batch_still_give_one(numbered, train_loader):
    (batch,) = batches_of(train_loader(numbered, batch_size=100))
    assert sorted(batch["labels"].tolist()) == list(range(24))


def test_evaluation_batches_hold_every_row_in_order(numbered, plain):
    loader = make_loader(numbered.test, splits=numbered, transform=eval_transform(plain), batch_size=7, train=False)
    batches = batches_of(loader)
    assert labels_of(batches) == list(range(24))
    first_image = decode_image(numbered.test[0]["image"])
    assert torch.equal(batches[0]["pixel_values"][0], eval_transform(plain)(first_image))


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"num_workers": -1}, {"seed": -1}])
def test_settings_are_checked(numbered, train_loader, settings):
    with pytest.raises(DataError, match=f"`{next(iter(settings))}` must be at least"):
        train_loader(numbered, **settings)


def test_empty_split_is_refused(numbered, plain):
    empty = numbered.train.select([])
    with pytest.raises(DataError, match="at least one image"):
        make_loader(empty, splits=numbered, transform=eval_transform(plain), batch_size=2, train=True)


# Reproducibility


def test_pixels_do_not_depend_on_workers(numbered, train_loader):
    alone, with_workers = train_loader(numbered), train_loader(numbered, num_workers=2)
    for epoch in (0, 1):
        alone.dataset.set_epoch(epoch)
        with_workers.dataset.set_epoch(epoch)
        assert_same(batches_of(alone), batches_of(with_workers))


def test_resumed_run_sees_what_the_whole_run_saw(numbered, train_loader):
    whole = train_loader(numbered)
    seen = []
    for epoch in range(3):
        whole.dataset.set_epoch(epoch)
        seen.append(batches_of(whole))
    torch.manual_seed(99)
    random.seed(99)
    resumed = train_loader(numbered)
    resumed.dataset.set_epoch(2)
    assert_same(batches_of(resumed), seen[2])


def test_epochs_and_seeds_change_order_and_augmentation(numbered, train_loader, plain):
    loader = train_loader(numbered)
    orders = [labels_of(batches_of(loader))]
    loader.dataset.set_epoch(1)
    orders.append(labels_of(batches_of(loader)))
    orders.append(labels_of(batches_of(train_loader(numbered, seed=4))))
    assert len({tuple(order) for order in orders}) == 3
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(24))}

    def pixels(seed, epoch, index):
        examples = ImageExamples(
            numbered.train, splits=numbered, transform=train_transform(plain), train=True, seed=seed
        )
        examples.set_epoch(epoch)
        return examples[index]["pixel_values"]

    assert torch.equal(pixels(0, 0, 5), pixels(0, 0, 5))
    assert not torch.equal(pixels(0, 0, 5), pixels(0, 1, 5))
    assert not torch.equal(pixels(0, 0, 5), pixels(1, 0, 5))


def test_equal_images_are_augmented_differently(make_rows, splits_of, plain):
    twins = make_rows([0]).select([0, 0])
    splits = splits_of(twins)
    examples = ImageExamples(splits.train, splits=splits, transform=train_transform(plain), train=True)
    assert not torch.equal(examples[0]["pixel_values"], examples[1]["pixel_values"])


def test_own_randomness_covers_every_stream_and_follows_its_key():
    def draw(*key):
        with own_randomness(*key):
            return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    assert draw(1, 2, 3) == draw(1, 2, 3)
    for other in ((1, 2, 4), (1, 3, 3), (0, 2, 3), (1, 2)):
        assert all(one != another for one, another in zip(draw(1, 2, 3), draw(*other), strict=True))


def numpy_state():
    return np.random.get_state()[1].tolist()  # noqa: NPY002


def test_global_random_streams_are_left_alone(numbered, train_loader):
    states = random.getstate(), numpy_state(), torch.get_rng_state()
    for num_workers in (0, 1):
        batches_of(train_loader(numbered, num_workers=num_workers))
    assert random.getstate() == states[0]
    assert numpy_state() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_examples_can_be_sent_to_workers(numbered, plain):
    examples = ImageExamples(numbered.train, splits=numbered, transform=train_transform(plain), train=True)
    examples.set_epoch(4)
    restored = pickle.loads(pickle.dumps(examples))
    assert torch.equal(restored[3]["pixel_values"], examples[3]["pixel_values"])


# Processes, as `Accelerator.prepare` divides batches among them


def shards(loader, num_processes):
    """What `Accelerator.prepare` makes of one loader in each of several processes."""
    return [
        prepare_data_loader(
            loader(),
            num_processes=num_processes,
            process_index=index,
            put_on_device=False,
            use_seedable_sampler=True,
        )
        for index in range(num_processes)
    ]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_two_processes_share_the_batches_of_one(numbered, train_loader, num_workers):
    torch.manual_seed(1)
    one = Accelerator(cpu=True).prepare(train_loader(numbered, batch_size=8))
    torch.manual_seed(2)
    two = shards(lambda: train_loader(numbered, batch_size=4, num_workers=num_workers), 2)
    assert isinstance(two[0].batch_sampler, BatchSamplerShard)
    for _epoch in range(2):
        shared = []
        for first, second in zip(batches_of(two[0]), batches_of(two[1]), strict=True):
            shared.append({name: torch.cat([first[name], second[name]]) for name in first})
        assert_same(batches_of(one), shared)


def test_prepared_loader_counts_epochs_and_can_begin_at_any(numbered, train_loader):
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(train_loader(numbered))
    seen = [batches_of(loader) for _ in range(3)]
    assert len({tuple(labels_of(batches)) for batches in seen}) == 3
    again = accelerator.prepare(train_loader(numbered))
    again.set_epoch(2)
    assert_same(batches_of(again), seen[2])


@pytest.mark.parametrize("num_processes", [1, 2])
def test_skipped_batches_leave_the_rest_as_it_was(numbered, train_loader, num_processes):
    def at_epoch_one():
        loaders = shards(lambda: train_loader(numbered, batch_size=4), num_processes)
        for loader in loaders:
            loader.set_epoch(1)
        return loaders

    for whole, interrupted in zip(at_epoch_one(), at_epoch_one(), strict=True):
        assert_same(batches_of(skip_first_batches(interrupted, 2)), batches_of(whole)[2:])


def test_processes_evaluate_every_row(numbered, plain):
    def loader():
        return make_loader(numbered.test, splits=numbered, transform=eval_transform(plain), batch_size=5, train=False)

    found = [labels_of(batches_of(shard)) for shard in shards(loader, 2)]
    assert set(itertools.chain(*found)) == set(range(24))


def test_order_follows_the_epoch_of_the_examples(numbered, plain):
    examples = ImageExamples(numbered.train, splits=numbered, transform=train_transform(plain), train=True)
    sampler = EpochShuffle(examples, seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert examples.epoch == 1
    assert sorted(first) == list(range(24))
    assert list(sampler) != first
