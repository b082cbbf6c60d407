"""Shares of batches: what several processes deliver together is what one delivers alone."""

import itertools

import numpy as np
import pytest

from aib_tf import data
from tests.data.conftest import TINY, TRAIN

# In memory, and read from disk in every epoch.
both_sources = pytest.mark.parametrize("memory_limit", [data.MEMORY_LIMIT, 0])


def rounds(total, count, make):
    """For each batch, the shares of all processes in order; each process has `count` of the `total`."""
    streams = []
    for first in range(0, total, count):
        dataset = make(data.Shards(total, first, count))
        shares = [tuple(values.numpy() for values in share) for share in dataset]
        assert len(shares) == dataset.cardinality().numpy()
        streams.append([shares[number : number + count] for number in range(0, len(shares), count)])
    return [list(itertools.chain(*parts)) for parts in zip(*streams, strict=True)]


@both_sources
@pytest.mark.parametrize(("total", "count"), [(2, 1), (4, 2), (3, 3)])
def test_processes_deliver_each_image_once_in_the_batches_of_one(published_dir, memory_limit, total, count):
    # 20 images, of which 18 are for training, in batches of 12 and 6: no share is empty, and all windows are the same.
    assert TRAIN == 20
    options = {"epochs": 2, "seed": 7, "data_dir": published_dir, "memory_limit": memory_limit}
    alone = [
        tuple(values.numpy() for values in batch) for batch in data.training_batches("cifar100", "train", 12, **options)
    ]
    together = rounds(
        total, count, lambda shards: data.training_batches("cifar100", "train", 12, shards=shards, **options)
    )
    assert len(together) == len(alone) == 4
    for shares, (images, labels) in zip(together, alone, strict=True):
        sizes = [len(share[1]) for share in shares]
        assert len(sizes) == total
        assert max(sizes) - min(sizes) <= 1
        np.testing.assert_array_equal(np.concatenate([share[1] for share in shares]), labels)
        np.testing.assert_array_equal(np.concatenate([share[0] for share in shares]), images)


@both_sources
def test_a_last_batch_with_fewer_images_than_shares_joins_the_one_before(data_dir, memory_limit):
    def make(shards):
        options = {"fields": ("id",), "shards": shards, "memory_limit": memory_limit}
        return data.load(TINY, "validation", 18, data_dir, **options).map(lambda batch: (batch["id"],))

    alone = [int(number) for (ids,) in make(data.Shards()) for number in ids]
    together = rounds(3, 1, make)  # 20 images: 18, and 2 for three shares
    assert [[len(ids) for (ids,) in shares] for shares in together] == [[6, 7, 7]]
    assert [int(number) for shares in together for (ids,) in shares for number in ids] == alone
    shards = data.Shards(3, 0, 1)
    assert data.batches_per_epoch(TINY, "validation", 18, data_dir, shards=shards) == 1
    assert data.batches_per_epoch(TINY, "validation", 18, data_dir) == 2


@both_sources
def test_an_endless_stream_of_shares_goes_on_bit_for_bit(data_dir, memory_limit):
    options = {"seed": 1, "data_dir": data_dir, "memory_limit": memory_limit, "shards": data.Shards(2, 1, 1)}
    whole = data.training_batches(TINY, "train", 16, epochs=3, **options)
    endless = data.training_batches(TINY, "train", 16, epochs=None, first_epoch=1, skip_batches=2, **options)
    assert int(endless.cardinality()) == -1
    batches = data.batches_per_epoch(TINY, "train", 16, data_dir)
    for one, other in zip(whole.skip(batches + 2), endless, strict=False):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: data.Shards(2, 2, 1), "`first` must be an integer from 0 to 1. Received: first=2"),
        (lambda folder: data.Shards(2, 0, 3), "`count` must be an integer from 1 to 2. Received: count=3"),
        (
            lambda folder: data.load(TINY, "train", 31, folder, shards=data.Shards(2)),
            "a multiple of 2, such as 30 or 32. Received: batch_size=31",
        ),
        (
            lambda folder: data.training_batches(
                TINY, "train", 3, epochs=1, seed=0, data_dir=folder, shards=data.Shards(4)
            ),
            "a multiple of 4, such as 4. Received: batch_size=3",
        ),
        (
            lambda folder: data.load(TINY, "test", 40, folder, shards=data.Shards(40)),
            "40 devices need as many images, and the split has 20. Use fewer devices.",
        ),
    ],
)
def test_impossible_shares_are_named(data_dir, make, message):
    with pytest.raises(ValueError) as error:
        make(data_dir)
    assert message in str(error.value)
