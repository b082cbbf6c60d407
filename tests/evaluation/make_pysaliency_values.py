"""Makes pysaliency_values.npz: what pysaliency 0.2.22 gives for small maps.

It runs on its own, since pysaliency imports PyTorch and needs np.trapz. From this folder, with Python 3.11:

    python3.11 -m venv /tmp/pysaliency
    /tmp/pysaliency/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu
    /tmp/pysaliency/bin/pip install setuptools Cython "numpy<2.3" pysaliency==0.2.22
    /tmp/pysaliency/bin/python make_pysaliency_values.py

Each case is a batch of maps, references and fixations of one size, stored beside pysaliency's values for it:
`<case>/maps`, `<case>/references` (B, H, W), `<case>/points` (B, F, 2), row and column, -1 where there is none, and
`<case>/<metric>` (B,), NaN where pysaliency gives NaN or raises. Maps are float32 that float64 holds exactly, and
pysaliency was given float64.
"""

import pathlib
import platform
import warnings

import numpy as np
import pysaliency
from pysaliency import metrics

OUTPUT = pathlib.Path(__file__).with_name("pysaliency_values.npz")
RANDOM = np.random.default_rng(7)


class Maps(pysaliency.SaliencyMapModel):
    """Maps that are written down: the image says which."""

    def __init__(self, maps):
        super().__init__(caching=False)
        self.maps = maps

    def _saliency_map(self, stimulus):
        return self.maps[stimulus[0, 0]].copy()


def scores(maps, references, points):
    """pysaliency's values for one batch."""
    images = [np.full(maps.shape[1:], number, np.uint8) for number in range(len(maps))]
    stimuli = pysaliency.Stimuli(images)
    there = points[..., 0] >= 0
    number = np.nonzero(there)[0]
    fixations = pysaliency.Fixations.create_without_history(points[there][:, 1], points[there][:, 0], number)
    model = Maps(maps)

    def judd(image):
        own = fixations[fixations.n == image]
        if not len(own.n):
            return np.nan
        one = pysaliency.Fixations.create_without_history(own.x, own.y, np.zeros(len(own.n), int))
        return Maps(maps[image : image + 1]).AUC_Judd(pysaliency.Stimuli([images[0]]), one, jitter=False)

    def nss(image):
        own = fixations[fixations.n == image]
        return metrics.NSS(maps[image], own.x_int, own.y_int).mean()

    def or_nan(function, *arguments):
        try:
            return function(*arguments)
        except (IndexError, ValueError, ZeroDivisionError):
            return np.nan

    pairs = list(zip(maps, references, strict=True))
    return {
        "cc": [metrics.CC(a.copy(), b.copy()) for a, b in pairs],
        "sim": [metrics.SIM(a.copy(), b.copy()) for a, b in pairs],
        "kl_nats": [metrics.MIT_KLDiv(a.copy(), b.copy()) for a, b in pairs],
        "nss": [or_nan(nss, image) for image in range(len(maps))],
        "auc_judd": [or_nan(judd, image) for image in range(len(maps))],
        "shuffled_auc": model.AUC_per_image(stimuli, fixations, nonfixations="shuffled"),
    }


def drawn_points(images, height, width, most, repeats=False):
    """From 1 to `most` places an image; with repeats, out of a corner of a few pixels."""
    points = np.full((images, most, 2), -1, np.int32)
    for image in range(images):
        count = RANDOM.integers(1, most + 1)
        points[image, :count, 0] = RANDOM.integers(0, 5 if repeats else height, count)
        points[image, :count, 1] = RANDOM.integers(0, 6 if repeats else width, count)
    return points


def cases():
    """Name to maps, references and points."""
    # 391 pixels are no multiple of anything.
    images, height, width = 12, 17, 23
    size = (images, height, width)
    random = RANDOM.random(size)
    ties = RANDOM.integers(0, 4, size) / 4
    yield "random", random, RANDOM.random(size), drawn_points(images, height, width, 30)
    yield "ties", ties, RANDOM.integers(0, 3, size), drawn_points(images, height, width, 30)
    yield "repeated", random, random**4, drawn_points(images, height, width, 30, repeats=True)
    # Some maps with a large offset, some peaked, some of very small numbers.
    scales = 10.0 ** RANDOM.integers(-12, 6, (images, 1, 1))
    negative = scales * (RANDOM.normal(size=size) + RANDOM.integers(-3, 4, (images, 1, 1)))
    yield "negative", negative, RANDOM.normal(size=size) ** 3, drawn_points(images, height, width, 30)
    peaked = np.exp(-RANDOM.gamma(2.0, 8.0, size))
    peaked[:, ::3] = 0
    gaps = RANDOM.random(size) * (RANDOM.random(size) < 0.1)
    yield "peaked", peaked, gaps, drawn_points(images, height, width, 30)
    yield "edges", *edges(height, width)


def edges(height, width):
    """Constant maps and references, no fixations, a single one, and all pixels fixated."""
    random = RANDOM.random((height, width))
    zero, half, negative = (np.full((height, width), value) for value in (0.0, 0.5, -2.0))
    single = np.eye(height, width)
    pairs = [
        (zero, random),
        (half, random),
        (negative, random),
        (random, zero),
        (random, half),
        (random, negative),
        (zero, half),
        (random, random),
        (random, -random),
        (single, random),
        (random, single),
        (single, single[::-1, ::-1]),
    ]
    points = np.full((len(pairs), height * width, 2), -1, np.int32)
    everywhere = np.stack(np.mgrid[:height, :width], axis=-1).reshape(-1, 2)
    for image, count in enumerate([3, 3, 3, 1, 1, 0, 0, len(everywhere), len(everywhere) - 1, 5, 5, 5]):
        points[image, :count] = RANDOM.permutation(everywhere)[:count]
    maps, references = (np.stack(each) for each in zip(*pairs, strict=True))
    return maps, references, points


def main():
    values = {"versions": np.array([f"pysaliency 0.2.22, numpy {np.__version__}, Python {platform.python_version()}"])}
    for name, maps, references, points in cases():
        maps, references = (each.astype(np.float32) for each in (maps, references))
        values |= {f"{name}/maps": maps, f"{name}/references": references, f"{name}/points": points.astype(np.int16)}
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            found = scores(maps.astype(np.float64), references.astype(np.float64), points)
        values |= {f"{name}/{metric}": np.array(each, np.float64) for metric, each in found.items()}
    np.savez_compressed(OUTPUT, **values)


if __name__ == "__main__":
    main()
