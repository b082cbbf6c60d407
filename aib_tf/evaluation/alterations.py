"""Small changes of an image that should not change what a classifier looks at.

All take and return batches (B, H, W, C) in the units of the model's images, with `pixel_range` =
(low, high), the values of pixel levels 0 and 255, to which every result is clipped: an altered
image is still a picture. What is random is a function of `seed` and the image's number in the data
set (`indices`), so it does not depend on how the images are batched.
"""

import functools

import numpy as np

from aib_tf.validation import check_count

# A pasted digit covers a quarter of the shorter side of the image, half of what a digit of
# cluttered_digits does, and at least as many pixels as are needed to read one.
DIGIT_SHARE = 4
SMALLEST_DIGIT = 6

# Keep the random numbers of the two spatial alterations apart.
_WINDOW, _DIGIT = 0, 1


def recolour_window(images, size: int, pixel_range, seed: int, indices) -> np.ndarray:
    """Fills a square window at a random place with one random colour.

    The place is uniform among those where the whole window lies in the image; the colour is uniform
    in `pixel_range`, each channel for itself. (The flags of the code released with the paper say
    only that a window changes its colour.)

    Args:
        images: (B, H, W, C) float.
        size: Side of the window in pixels, at most the shorter side of the images.
        pixel_range: Values of pixel levels 0 and 255, each broadcastable to the images.
        seed: Seed of places and colours, 0 or more.
        indices: (B,), numbers of the images in the data set, 0 or more.

    Returns:
        (B, H, W, C) float32.

    Raises:
        ValueError: The window does not fit into the images, or the images have another shape.
    """
    images, low, high = _checked(images, pixel_range)
    count, height, width, channels = images.shape
    size = check_count("size", size, maximum=min(height, width))
    uniforms = _uniforms(seed, indices, (_WINDOW, size), 2 + channels)
    rows, columns = _places(uniforms, size, height, width)
    colours = low + uniforms[:, None, None, 2:] * (high - low)
    altered = images.copy()
    altered[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]] = colours
    return altered


def paste_digit(images, pixel_range, seed: int, indices) -> np.ndarray:
    """Writes a small handwritten digit at a random place, in white ink.

    The digit is drawn from scikit-learn's 1,797, reduced to a quarter of the shorter side of the
    image (at least 6 pixels). Where it meets the image the brighter value stays, in each channel,
    so its black background hides nothing.

    Args:
        images: (B, H, W, C) float, H and W at least 6.
        pixel_range: Values of pixel levels 0 and 255, each broadcastable to the images.
        seed: Seed of digits and places, 0 or more.
        indices: (B,), numbers of the images in the data set, 0 or more.

    Returns:
        (B, H, W, C) float32.

    Raises:
        ValueError: The images are smaller than a digit, or have another shape.
    """
    images, low, high = _checked(images, pixel_range)
    count, height, width, _ = images.shape
    size = digit_size(height, width)
    if size > min(height, width):
        raise ValueError(
            f"Images must have at least {SMALLEST_DIGIT} x {SMALLEST_DIGIT} pixels to hold a digit. "
            f"Received: images of shape {images.shape}"
        )
    digits = _small_digits(size)
    uniforms = _uniforms(seed, indices, (_DIGIT, size), 3)
    rows, columns = _places(uniforms, size, height, width)
    ink = digits[(uniforms[:, 2] * len(digits)).astype(int)][..., None]
    where = np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
    altered = images.copy()
    altered[where] = np.maximum(altered[where], low + ink * (high - low))
    return altered


def low_pass(images, radius: float, pixel_range) -> np.ndarray:
    """Keeps the spatial frequencies within a radius.

        F^-1[ F[x](u, v) * 1(sqrt(u^2 + v^2) <= radius) ]

    F is the two-dimensional discrete Fourier transform of each channel, with the zero frequency at
    the centre; u and v count periods per image side, from -H/2 to H/2 and -W/2 to W/2. The border
    belongs to what is kept. A radius of sqrt(H^2 + W^2) / 2 or more keeps everything.

    Args:
        images: (B, H, W, C) float.
        radius: Radius in periods per image side, 0 or more.
        pixel_range: Values of pixel levels 0 and 255, each broadcastable to the images.

    Returns:
        (B, H, W, C) float32, clipped to `pixel_range`.

    Raises:
        ValueError: The radius is negative, or the images have another shape.

    Reference:
        - Wang et al., "High-Frequency Component Helps Explain the Generalization of Convolutional
          Neural Networks", CVPR 2020, section 3.
    """
    images, low, high = _checked(images, pixel_range)
    return np.clip(_within(images, radius), low, high).astype(np.float32)


def high_pass(images, radius: float, pixel_range) -> np.ndarray:
    """Keeps the spatial frequencies outside a radius: what `low_pass` takes away.

    The mean of the image is taken away with them. In normalised images, zero is the mean colour of
    the data set: details stand on that colour, brighter and darker. Before clipping, `low_pass`
    and `high_pass` add up to the image.

    Args:
        images: (B, H, W, C) float.
        radius: Radius in periods per image side, 0 or more; the border is taken away.
        pixel_range: Values of pixel levels 0 and 255, each broadcastable to the images.

    Returns:
        (B, H, W, C) float32, clipped to `pixel_range`.

    Raises:
        ValueError: The radius is negative, or the images have another shape.
    """
    images, low, high = _checked(images, pixel_range)
    return np.clip(images - _within(images, radius), low, high).astype(np.float32)


def digit_size(height: int, width: int) -> int:
    """Side in pixels of the digit that `paste_digit` puts into an image."""
    return max(min(height, width) // DIGIT_SHARE, SMALLEST_DIGIT)


def _within(images, radius):
    """The part of the images within a radius of the zero frequency, float64."""
    if not radius >= 0:
        raise ValueError(f"radius must be 0 or more. Received: radius={radius}")
    height, width = images.shape[1:3]
    # `fftfreq` has the order of `fft2`: the zero frequency is the centre, wherever it is stored.
    u, v = np.fft.fftfreq(height, 1 / height), np.fft.fftfreq(width, 1 / width)
    # Squares of whole numbers compare exactly; their roots would not.
    kept = np.rint(u[:, None] ** 2 + v[None, :] ** 2) <= radius**2
    spectrum = np.fft.fft2(images, axes=(1, 2)) * kept[:, :, None]
    return np.fft.ifft2(spectrum, axes=(1, 2)).real


def _checked(images, pixel_range):
    images = np.asarray(images, np.float32)
    if images.ndim != 4:
        raise ValueError(f"images must have shape (B, H, W, C). Received: images of shape {images.shape}")
    return images, *(np.asarray(end, np.float32) for end in pixel_range)


def _uniforms(seed, indices, purpose, columns):
    """Uniform numbers in [0, 1), a row per image from a generator of its own: (B, columns)."""
    rows = [np.random.default_rng((seed, *purpose, int(index))).random(columns) for index in indices]
    return np.reshape(rows, (len(rows), columns))


def _places(uniforms, size, height, width):
    """Rows and columns of windows at places uniform in the image: (B, size) each."""
    corners = (uniforms[:, :2] * (height - size + 1, width - size + 1)).astype(int)
    return tuple(corner[:, None] + np.arange(size) for corner in corners.T)


@functools.cache
def _small_digits(size):
    """Scikit-learn's digits as ink in 0..1: (1797, size, size)."""
    import tensorflow as tf

    from aib_tf.data.cluttered_digits import source_digits

    digits, _ = source_digits()
    # Antialiased: without it, strokes thinner than a sampling step would vanish.
    return tf.image.resize(digits[..., None] / np.float32(255), (size, size), antialias=True).numpy()[..., 0]
