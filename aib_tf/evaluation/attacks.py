"""Attacks bounded in the largest change of a pixel (L-infinity), in TensorFlow.

They take a function from images to logits, so they serve any model: `Subject.logits`, with
`samples=n` where the loss is to be that of logits averaged over n draws. All lengths are in the
units of the images; `Subject.pixel` converts pixel levels, channel by channel. Everything here may
be called inside `tf.function`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from aib_tf.data.geometry import RANDOM_ALGORITHM
from aib_tf.validation import check_count, check_seed

Logits = Callable[[tf.Tensor], tf.Tensor]


class Attack(NamedTuple):
    """What an attack found.

    Attributes:
        images: (B, H, W, C) float32: the first iterate that is misclassified, or the last one.
        broken: (B,) bool: whether any iterate is misclassified.
    """

    images: tf.Tensor
    broken: tf.Tensor


def loss_gradient(logits_fn: Logits, images, labels) -> tuple[tf.Tensor, tf.Tensor]:
    """Logits, and the gradient of each image's cross-entropy with respect to the image.

    Args:
        logits_fn: Function from images to logits (B, classes).
        images: (B, H, W, C) float.
        labels: (B,) integer.

    Returns:
        Logits (B, classes) and gradients (B, H, W, C), float32. A gradient that does not exist,
        because no differentiable path leads from the images to the logits, is zero.

    Raises:
        NotImplementedError: An operation between images and logits should have a gradient, but
            TensorFlow has none for it.
    """
    images, labels = _images(images), _labels(labels, images)
    with tf.GradientTape() as tape:
        tape.watch(images)
        logits = tf.cast(logits_fn(images), tf.float32)
        # The sum keeps the gradient of one image free of the other images, and of their number.
        loss = tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
    try:
        return logits, tape.gradient(loss, images, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    except LookupError as error:
        # Of a type that `tf.function` passes on.
        raise NotImplementedError(f"TensorFlow cannot differentiate the model: {error}") from error


def fgsm(logits_fn: Logits, images, labels, epsilon, low, high) -> tf.Tensor:
    """The fast gradient sign method: one step of the largest size, x + eps sign(grad loss).

    Args:
        logits_fn: Function from images to logits (B, classes).
        images: (B, H, W, C) float.
        labels: (B,) integer, the true classes.
        epsilon: Largest change, a scalar or one per channel (C,), in the units of the images.
        low: Smallest value of an image, broadcastable to it.
        high: Largest value of an image, broadcastable to it.

    Returns:
        (B, H, W, C) float32 within `epsilon` of the images and within `low`..`high`.

    Raises:
        ValueError: `epsilon` is negative, or `labels` are not one per image.

    Reference:
        - Goodfellow, Shlens and Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR
          2015, section 4.
    """
    images = _images(images)
    _, gradients = loss_gradient(logits_fn, images, labels)
    return signed_step(images, gradients, epsilon, low, high)


def signed_step(images, gradients, epsilon, low, high) -> tf.Tensor:
    """The step of `fgsm` along gradients that are known: clip(x + eps sign(g), low, high)."""
    epsilon, low, high = _bounds(epsilon, low, high)
    return tf.clip_by_value(_images(images) + epsilon * _sign(gradients), low, high)


def pgd(
    logits_fn: Logits,
    images,
    labels,
    epsilon,
    low,
    high,
    steps: int = 20,
    step_size=None,
    random_start: bool = True,
    seed: int = 0,
    indices=None,
    source_fn: Logits | None = None,
) -> Attack:
    """Projected gradient descent on the cross-entropy: the worst case over all its iterates.

        x_0     = x + u, u uniform in [-eps, eps], or x without a random start
        x_(t+1) = clip(x_t + step_size sign(grad loss(x_t)), to the ball around x and to low..high)

    An image that an iterate breaks is left out of the further steps, so broken images cost
    nothing. All iterates count, the random start included: `broken` can only grow with `steps`.

    Args:
        logits_fn: Function from images to logits (B, classes).
        images: (B, H, W, C) float.
        labels: (B,) integer, the true classes.
        epsilon: Radius of the ball, a scalar or one per channel (C,), in the units of the images.
        low: Smallest value of an image, broadcastable to it.
        high: Largest value of an image, broadcastable to it.
        steps: Number of steps, 1 or more.
        step_size: Size of a step, as `epsilon`; None takes 2.5 epsilon / steps, which can cross
            the ball from any start (Madry et al. 2018).
        random_start: Whether to start at a random place of the ball.
        seed: Seed of the random start.
        indices: (B,) integer, names of the images: the start of an image is a function of `seed`
            and its name, whatever batch it is in. None takes 0, 1, ...
        source_fn: Where the gradients come from, when not from `logits_fn`: logits of another
            model (a transferred attack), or of a differentiable stand-in for this one. Whether an
            image is broken is always decided by `logits_fn`.

    Returns:
        An `Attack`.

    Raises:
        ValueError: `steps` or `seed` is out of range, `epsilon` is negative, or `labels` are not
            one per image.

    Reference:
        - Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018,
          section 2.1.
    """
    steps = check_count("steps", steps)
    images = _images(images)
    labels = _labels(labels, images)
    epsilon, low, high = _bounds(epsilon, low, high)
    step_size = 2.5 * epsilon / steps if step_size is None else tf.cast(step_size, tf.float32)
    lower, upper = tf.maximum(images - epsilon, low), tf.minimum(images + epsilon, high)
    current = images
    if random_start:
        indices = tf.range(tf.shape(images)[0]) if indices is None else indices
        current += epsilon * _uniform(images, indices, check_seed(seed))
    current = tf.clip_by_value(current, lower, upper)

    def settle(attack, rows, current, wrong):
        """Writes down the images that broke."""
        found = tf.boolean_mask(rows, wrong)[:, None]
        return Attack(
            tf.tensor_scatter_nd_update(attack.images, found, tf.boolean_mask(current, wrong)),
            tf.tensor_scatter_nd_update(attack.broken, found, tf.ones(tf.shape(found)[:1], tf.bool)),
        )

    def step(number, attack, rows, current):
        own = tf.gather(labels, rows)
        logits, gradients = loss_gradient(source_fn or logits_fn, current, own)
        if source_fn is not None:
            logits = logits_fn(current)
        wrong = _misclassified(logits, own)
        attack = settle(attack, rows, current, wrong)
        rows = tf.boolean_mask(rows, ~wrong)
        current = tf.boolean_mask(current + step_size * _sign(gradients), ~wrong)
        current = tf.clip_by_value(current, tf.gather(lower, rows), tf.gather(upper, rows))
        return number + 1, attack, rows, tf.ensure_shape(current, [None, *images.shape[1:]])

    def unfinished(number, attack, rows, current):
        return (number < steps) & (tf.size(rows) > 0)

    rows = tf.range(tf.shape(images)[0])
    _, attack, rows, current = tf.while_loop(
        unfinished,
        step,
        (tf.constant(0), Attack(images, tf.zeros_like(rows, tf.bool)), rows, current),
        shape_invariants=(
            tf.TensorShape([]),
            Attack(images.shape, tf.TensorShape([images.shape[0]])),
            tf.TensorShape([None]),
            tf.TensorShape([None, *images.shape[1:]]),
        ),
    )
    # Not every model takes an empty batch.
    wrong = tf.cond(
        tf.size(rows) > 0,
        lambda: _misclassified(logits_fn(current), tf.gather(labels, rows)),
        lambda: tf.zeros_like(rows, tf.bool),
    )
    attack = settle(attack, rows, current, wrong)
    # Those that stand at the end show their last iterate.
    standing = tf.boolean_mask(rows, ~wrong)[:, None]
    last = tf.tensor_scatter_nd_update(attack.images, standing, tf.boolean_mask(current, ~wrong))
    return attack._replace(images=last)


def _images(images):
    images = tf.convert_to_tensor(images)
    return images if images.dtype == tf.float32 else tf.cast(images, tf.float32)


def _labels(labels, images):
    labels = tf.convert_to_tensor(labels)
    if not labels.dtype.is_integer or not labels.shape.is_compatible_with(images.shape[:1]):
        raise ValueError(
            "labels must be integers, one per image. "
            f"Received: labels of shape {tuple(labels.shape)} and type {labels.dtype.name}, "
            f"images of shape {tuple(images.shape)}"
        )
    return labels


def _bounds(epsilon, low, high):
    if not tf.is_tensor(epsilon) and not (np.asarray(epsilon) >= 0).all():
        raise ValueError(f"epsilon must be 0 or more. Received: epsilon={epsilon}")
    return tuple(tf.cast(value, tf.float32) for value in (epsilon, low, high))


def _sign(gradients):
    """The sign of gradients; 0 where one is not finite, so that no NaN gets into an image."""
    return tf.where(tf.math.is_finite(gradients), tf.sign(gradients), 0.0)


def _misclassified(logits, labels):
    return tf.argmax(logits, axis=1, output_type=labels.dtype) != labels


def _uniform(images, indices, seed):
    """Uniform in [-1, 1], each image from a seed of its own: (B, H, W, C)."""
    shape = tf.shape(images)[1:]

    def draw(index):
        return tf.random.stateless_uniform(shape, [seed, index], -1.0, 1.0, alg=RANDOM_ALGORITHM)

    indices = tf.cast(indices, tf.int32)
    noise = tf.map_fn(draw, indices, fn_output_signature=tf.TensorSpec(images.shape[1:], tf.float32))
    return tf.reshape(noise, tf.shape(images))
