"""Measures how many images a second the input pipeline delivers, stage by stage.

    python benchmarks/pipeline.py --data_dir=DIR
    python benchmarks/pipeline.py --dataset=cluttered_digits

First a check that the pipeline delivers what it should, then a table. A goal of this library is
20,000 augmented, normalised images of CIFAR-10 a second on 2 cores, so that the pipeline alone
never is what a small model waits for.

The rows of a half are those of one of two processes that train together: images a second that it
delivers. From memory it does half of the work; from disk it reads everything and decodes a half.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tensorflow as tf

from aib_tf import data


def check(arguments) -> None:
    """Raises AssertionError unless the whole pipeline delivers every image once, as stored."""
    info = data.get(arguments.dataset)
    plain = data.load(
        arguments.dataset,
        "train",
        arguments.batch_size,
        arguments.data_dir,
        normalize=False,
    )
    shuffled = data.load(
        arguments.dataset,
        "train",
        arguments.batch_size,
        arguments.data_dir,
        shuffle=True,
    )
    expected = sorted(row.tobytes() for images, _ in plain for row in images.numpy())
    delivered = sorted(row.tobytes() for images, _ in shuffled for row in data.denormalize_images(images.numpy(), info))
    assert delivered == expected, "The shuffled, normalised epoch holds other images."
    print(f"checked: {len(expected):,} images, each delivered once, equal after normalisation")
    for memory_limit in (data.MEMORY_LIMIT, 0):
        halves = [
            data.load(
                arguments.dataset,
                "train",
                arguments.batch_size,
                arguments.data_dir,
                normalize=False,
                shards=data.Shards(2, index),
                memory_limit=memory_limit,
            )
            for index in range(2)
        ]
        delivered = sorted(row.tobytes() for half in halves for images, _ in half for row in images.numpy())
        assert delivered == expected, "Two processes together deliver other images."
    print("checked: two processes deliver a half each, from memory and from disk")


def image_by_image(arguments):
    """The usual way to write it, for comparison: crop and flip are mapped over single images."""
    info = data.get(arguments.dataset)
    pad = info.crop_padding
    stored = data.load(arguments.dataset, "train", arguments.batch_size, arguments.data_dir, normalize=False)

    def augment(seed, example):
        image, label = example
        seed = tf.stack([seed, 0])
        if pad:
            image = tf.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="REFLECT")
            image = tf.image.stateless_random_crop(image, info.image_shape, seed)
        if info.horizontal_flip:
            image = tf.image.stateless_random_flip_left_right(image, seed)
        return data.normalize_images(image, info), label

    examples = stored.unbatch().cache().shuffle(10_000)
    return (
        tf.data.Dataset.zip(tf.data.Dataset.random(seed=0), examples)
        .map(augment, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(arguments.batch_size)
        .prefetch(tf.data.AUTOTUNE)
    )


def epoch_rates(batches) -> tuple[float, float]:
    """Images a second over one epoch, and images a second of processor time."""
    begin, begin_processor = time.perf_counter(), time.process_time()
    images = sum(int(tf.shape(element[0])[0]) for element in batches)
    seconds, busy = time.perf_counter() - begin, time.process_time() - begin_processor
    return images / seconds, images / busy


def row(title, first, rates) -> float:
    """Prints a line of the table, and returns the median rate."""
    seconds, processor = (statistics.median(column) for column in zip(*rates, strict=True))
    slowest = min(rate for rate, _ in rates)
    first = f"{first:,.0f}" if first else ""
    print(f"{title:22}{first:>12}{seconds:12,.0f}{slowest:12,.0f}{processor:18,.0f}")
    return seconds


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="cifar10", help="a key of aib_tf.data.DATASETS")
    parser.add_argument("--data_dir", default=None, help="folder of prepared TFDS data sets")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=5, help="epochs after the first, measured")
    arguments = parser.parse_args()
    if arguments.batch_size % 2:
        parser.error(f"two processes share a batch: its size must be even. Received: batch_size={arguments.batch_size}")

    print(f"TensorFlow {tf.__version__}, {os.cpu_count()} cores, {arguments.dataset}")
    check(arguments)
    stages = (
        ("decode from disk", {"memory_limit": 0, "normalize": False}),
        ("whole, from disk", {"memory_limit": 0, "shuffle": True, "augment": True}),
        ("batch, from memory", {"normalize": False}),
        ("+ shuffle", {"normalize": False, "shuffle": True}),
        ("+ augment", {"normalize": False, "shuffle": True, "augment": True}),
        ("+ normalise = whole", {"shuffle": True, "augment": True}),
    )
    print("images a second; the last column does not depend on what else the machine does")
    print(f"{'':22}{'first epoch':>12}{'later':>12}{'slowest':>12}{'per core-second':>18}")
    examples = data.num_examples(arguments.dataset, "train", arguments.data_dir)
    for title, options in stages:
        begin = time.perf_counter()
        batches = data.load(
            arguments.dataset,
            "train",
            arguments.batch_size,
            arguments.data_dir,
            **options,
        )
        loaded = time.perf_counter() - begin
        # The first epoch counts what `load` takes to decode the split into memory.
        first = examples / (loaded + examples / epoch_rates(batches)[0])
        whole = row(title, first, [epoch_rates(batches) for _ in range(arguments.epochs)])
    stream = data.training_batches(
        arguments.dataset,
        "train",
        arguments.batch_size,
        epochs=arguments.epochs,
        seed=0,
        data_dir=arguments.data_dir,
    )
    row("training_batches", None, [epoch_rates(stream)])
    for title, memory_limit in (("half, from memory", data.MEMORY_LIMIT), ("half, from disk", 0)):
        half = data.load(
            arguments.dataset,
            "train",
            arguments.batch_size,
            arguments.data_dir,
            shuffle=True,
            augment=True,
            shards=data.Shards(2, 0),
            memory_limit=memory_limit,
        )
        epoch_rates(half)
        row(title, None, [epoch_rates(half) for _ in range(arguments.epochs)])
    rival = image_by_image(arguments)
    first, _ = epoch_rates(rival)
    usual = row("image by image", first, [epoch_rates(rival) for _ in range(arguments.epochs)])
    print(f"whole / image by image: {whole / usual:.1f}")


if __name__ == "__main__":
    main()
