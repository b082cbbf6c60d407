"""What is measured: a classifier, the maps that go with its decisions, and the scale of its pixels."""

import contextlib
import functools
from collections.abc import Callable

import keras
import numpy as np


class UnavailableError(ValueError):
    """The model or the data cannot serve a suite; the message is the reason."""


class Subject:
    """A classifier and its maps, as the suites see them.

    Every suite takes a model of this library as it is. For any other Keras model, or for other maps than the model's
    own attention, wrap it:

        Subject(keras_model, maps=GradCAM(keras_model))
        Subject(model, maps=lambda images: saliency_of(model, images))

    Args:
        model: a Keras model from images (B, H, W, C) to logits (B, classes), or any object with
            `explain(images, samples)`. Of several attention maps that a model's `attention_names` name, the last, which
            is the deepest, is measured.
        maps: function from images to maps (B, h, w), larger where it matters more; None for the attention of the model.
        mean: mean of the pixels in 0..1, a number or (C,): the images that the model takes are
            (pixels / 255 - mean) / stddev. The defaults stand for images in 0..1.
        stddev: standard deviation of the same.
        probabilities: whether a Keras model returns probabilities in the place of logits.
        baseline: classifier whose Grad-CAM stands beside the maps, such as the same network without attention; by
            default the model itself.

    Raises:
        TypeError: The model is neither a Keras model nor has `explain`.
        ValueError: `stddev` is not positive.
    """

    def __init__(self, model, maps: Callable | None = None, mean=0.0, stddev=1.0, probabilities=False, baseline=None):
        if isinstance(model, Subject):
            raise TypeError(f"`model` must be a model, not a Subject of one. Received: model={model!r}")
        self._is_keras = isinstance(model, keras.Model)
        if not self._is_keras and not callable(getattr(model, "explain", None)):
            raise TypeError(
                "The model must be a Keras model or have a method explain(images, samples). "
                f"Received: model={type(model).__name__}"
            )
        self.model = model
        self.mean = np.atleast_1d(np.asarray(mean, np.float32))
        self.stddev = np.atleast_1d(np.asarray(stddev, np.float32))
        if not (np.isfinite(self.mean).all() and np.isfinite(self.stddev).all() and (self.stddev > 0).all()):
            raise ValueError(f"stddev must be more than 0. Received: mean={mean}, stddev={stddev}")
        self.baseline = model if baseline is None else baseline
        self._maps = maps
        self._compiled: dict[int, Callable] = {}
        self.probabilities = probabilities
        self._explains = callable(getattr(model, "explain", None))
        names = getattr(model, "attention_names", ("attention_mean",) if self._explains else ())
        self._attention_name = names[-1] if names else None

    @classmethod
    def of(cls, model) -> "Subject":
        """The model as a Subject; a Subject stays what it is."""
        return model if isinstance(model, cls) else cls(model)

    @property
    def pixel(self) -> np.ndarray:
        """One level of a pixel, 1/255 of the range, in the images that the model takes: (1,) or (C,)."""
        return (1 / (255 * self.stddev)).astype(np.float32)

    @property
    def pixel_range(self) -> tuple[np.ndarray, np.ndarray]:
        """The pixels 0 and 255 in the images that the model takes: two arrays (1,) or (C,)."""
        return -self.mean / self.stddev, (1 - self.mean) / self.stddev

    def pixels(self, images) -> np.ndarray:
        """Images that the model takes as pictures: uint8 of the same shape, rounded and clipped to 0..255."""
        return np.clip(np.rint((np.asarray(images) * self.stddev + self.mean) * 255), 0, 255).astype(np.uint8)

    @property
    def differentiable(self) -> bool:
        """Whether gradients with respect to the images can be had."""
        return self._is_keras and keras.config.backend() == "tensorflow"

    def check_differentiable(self) -> None:
        """Raises UnavailableError where gradients cannot be had."""
        if not self.differentiable:
            raise UnavailableError("gradients need a Keras model on the TensorFlow backend")

    @property
    def has_maps(self) -> bool:
        """Whether there are maps to measure."""
        return self._maps is not None or self._attention_name is not None

    @property
    def has_own_maps(self) -> bool:
        """Whether a function of the caller gives the maps."""
        return self._maps is not None

    def logits(self, images, samples: int = 0):
        """Logits (B, classes) in inference mode; on TensorFlow with a gradient, also inside of a `tf.function`.

        Args:
            images: (B, H, W, C), as the model takes them.
            samples: Draws of attention and latent that logits are averaged over; 0 takes the means.
        """
        if self._explains:
            # A call of the model would add losses and count anchors in its metrics.
            return self.model.explain(images, samples=samples)["logits"]
        outputs = self.model(images, training=False)
        if self.probabilities:
            # The smallest normal number keeps the logarithm finite.
            outputs = keras.ops.log(keras.ops.maximum(outputs, float(np.finfo(np.float32).tiny)))
        return outputs

    def check_logits(self, logits: np.ndarray) -> None:
        """Raises ValueError where a Keras model that should return logits (B, classes) returns probabilities."""
        if self._explains or self.probabilities or not logits.size:
            return
        if (logits >= 0).all() and np.allclose(logits.sum(axis=1), 1, atol=1e-3):
            raise ValueError(
                "The model returns probabilities, and logits are expected. Use Subject(model, probabilities=True). "
                f"Received: outputs={logits[0, :3].tolist()} .. of sum {logits[0].sum():.4g}"
            )

    def explain(self, images, samples: int = 0) -> dict:
        """What `model.explain` returns; logits and probabilities where the model has no such method."""
        return self._compiled_explain(samples)(self._as_input(images))

    def maps(self, images):
        """The maps (B, h, w) that are measured.

        Raises:
            UnavailableError: There are none.
            ValueError: The function of the caller returned another shape.
        """
        if self._maps is not None:
            found = self._maps(images)
        elif self._attention_name is not None:
            found = self.explain(images).get(self._attention_name)
            if found is None:
                raise UnavailableError("the model has no attention")
        else:
            raise UnavailableError("the model has no attention")
        if len(found.shape) != 3 or found.shape[0] != len(images):
            raise ValueError(
                f"Maps must have shape ({len(images)}, h, w), one for each image. Received: shape={tuple(found.shape)}"
            )
        return found

    def attention_in(self, explanation):
        """The map of an explanation that `maps` would return, or None where it is a function's or there is none."""
        return None if self._maps is not None or not self._attention_name else explanation.get(self._attention_name)

    def grad_cam(self, images) -> np.ndarray:
        """Grad-CAM (B, h, w) of the baseline, for the class that it predicts.

        Raises:
            UnavailableError: Gradients cannot be had, or the baseline has no feature maps.
        """
        return np.asarray(self._grad_cam(self._as_input(images)))

    def drawn(self, samples: int) -> int:
        """How many draws are made where so many are wanted: none by a model that has nothing to draw."""
        from aib_tf.models import AIBClassifier, PayAttentionClassifier

        model = self.model
        if isinstance(model, AIBClassifier):
            return 0 if model.attention is None and model.bottleneck is None else samples
        return samples if self._explains and not isinstance(model, PayAttentionClassifier) else 0

    @contextlib.contextmanager
    def noise_from(self, seed: int):
        """Lets draws begin at the seed; afterwards the model's generators are as they were, for training to go on."""
        if not self._is_keras:
            yield
            return
        generators = [
            value
            for layer in self.model._flatten_layers()
            for value in vars(layer).values()
            if isinstance(value, keras.random.SeedGenerator)
        ]
        before = [keras.ops.convert_to_numpy(generator.state) for generator in generators]
        for number, generator in enumerate(generators):
            generator.state.assign(np.array([seed + number, 0], generator.state.dtype))
        try:
            yield
        finally:
            for generator, state in zip(generators, before, strict=True):
                generator.state.assign(state)

    @functools.cached_property
    def _grad_cam(self):
        from aib_tf.evaluation.grad_cam import GradCAM

        self.check_differentiable()
        return GradCAM(self.baseline, probabilities=self.probabilities and self.baseline is self.model)

    def _explain(self, images, samples):
        if self._explains:
            return self.model.explain(images, samples=samples)
        logits = self.logits(images)
        return {"logits": logits, "probabilities": keras.ops.softmax(logits)}

    def _compiled_explain(self, samples):
        if samples not in self._compiled:
            explain = functools.partial(self._explain, samples=samples)
            if self.differentiable:
                import tensorflow as tf

                explain = tf.function(explain, reduce_retracing=True)
            self._compiled[samples] = explain
        return self._compiled[samples]

    def _as_input(self, images):
        if not self.differentiable:
            return images
        import tensorflow as tf

        return tf.convert_to_tensor(images, tf.float32)
