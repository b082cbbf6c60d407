"""Trains a tiny model for many epochs, and shows whether the process grows: its memory, its open files.

    python benchmarks/soak.py
    python benchmarks/soak.py --epochs=24 --output_dir=FOLDER

It samples at the end of each epoch what /proc says of the process, so it needs Linux. The first quarter of the epochs
is the warm-up, in which TensorFlow traces its functions and allocators take what they keep. The exit status is 1 if
afterwards the resident size grows by more than 5%, or more files are open at the end: medians over the first and the
last eighth of the epochs that remain. Threads are shown only, since TensorFlow starts and ends its own as it likes.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tensorflow as tf

from aib_tf import training
from aib_tf.config import Config

_ALLOWED_GROWTH = {"resident MB": 0.05, "descriptors": 0.0}
_LINES = 20  # of the table


def sample(epoch) -> dict:
    """What the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "epoch": epoch,
        "resident MB": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        # One of them is the handle of the listing.
        "descriptors": len(os.listdir("/proc/self/fd")) - 1,
        "threads": len(os.listdir("/proc/self/task")),
        "seconds": time.monotonic(),
    }


def train(epochs, folder) -> list[dict]:
    """Trains with `training.fit`, and returns a sample for each epoch."""
    config = Config.from_flat(
        {
            "dataset": "cluttered_digits/train96_validation40_test40_seed0",
            "data_dir": str(folder / "data"),
            "model": "vgg_aib_qt",
            "width": 0.05,
            "latent_dim": 8,
            "num_anchors": 5,
            "batch_size": 16,
            "epochs": epochs,
        }
    )
    samples = []
    write_history = training.Run.write_history

    # `fit` takes no callbacks; it writes the history once at the end of each epoch.
    def write_and_sample(run, rows):
        write_history(run, rows)
        run.checkpoints.wait()  # the file that its thread has open is no leak
        samples.append(sample(len(rows)))

    with mock.patch.object(training.Run, "write_history", write_and_sample):
        training.fit(config, folder / "run", verbose=0)
    return samples


def ends(samples) -> dict[str, tuple[float, float]]:
    """Medians over the first and the last eighth of the epochs after the warm-up, of what may not grow."""
    later = samples[len(samples) // 4 :]
    size = max(1, len(later) // 8)
    return {
        name: tuple(statistics.median(row[name] for row in part) for part in (later[:size], later[-size:]))
        for name in _ALLOWED_GROWTH
    }


def grown(samples) -> list[str]:
    """Names of what grew by more than is allowed."""
    return [name for name, (first, last) in ends(samples).items() if last > first * (1 + _ALLOWED_GROWTH[name])]


def main() -> None:
    """Prints the table, and exits with 1 if the process grew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=200, help="at least 8")
    parser.add_argument("--output_dir", default=None, help="an empty folder to keep the run; by default it is removed")
    arguments = parser.parse_args()
    if arguments.epochs < 8:
        parser.error(f"A warm-up and what follows need 8 epochs. Received: epochs={arguments.epochs}")

    with tempfile.TemporaryDirectory() as temporary:
        samples = train(arguments.epochs, Path(arguments.output_dir or temporary))
    print(f"TensorFlow {tf.__version__}, {arguments.epochs} epochs in {_elapsed(samples):.0f} s after the first")
    print("".join(f"{name:>14}" for name in samples[0]))
    began = samples[0]["seconds"]
    for row in samples[:: max(1, len(samples) // _LINES)]:
        print(
            "".join(
                f"{value:14,.1f}" if isinstance(value, float) else f"{value:14}"
                for value in ({**row, "seconds": row["seconds"] - began}).values()
            )
        )
    for name, (first, last) in ends(samples).items():
        print(f"{name}: {first:,.1f} after the warm-up, {last:,.1f} at the end, {last / first - 1:+.2%}")
    found = grown(samples)
    if found:
        sys.exit(f"The process grew: {', '.join(found)}.")
    print("The process did not grow.")


def _elapsed(samples):
    return samples[-1]["seconds"] - samples[0]["seconds"]


if __name__ == "__main__":
    main()
