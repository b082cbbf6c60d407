"""What the networks are made of, with PyTorch's conventions, which the recipes and the released weights assume."""

import keras
import numpy as np
from keras import ops

from aib_tf.ops.batch_normalization import fused_batch_normalization, synchronized_batch_normalization
from aib_tf.ops.replicas import SeedGenerator
from aib_tf.validation import check_count


@keras.saving.register_keras_serializable(package="aib_tf")
class BatchNormalization(keras.layers.BatchNormalization):
    """Batch normalisation with PyTorch's running variance.

    PyTorch divides the squares of a batch by n - 1 for the running variance and by n for the normalisation itself;
    Keras divides by n for both. In the deepest layers, where a channel has few values, the two part by percents.
    """

    def __init__(self, momentum=0.9, epsilon=1e-5, **kwargs):
        super().__init__(momentum=momentum, epsilon=epsilon, **kwargs)

    def call(self, inputs, training=None, mask=None):
        """Normalises, and in training updates the running statistics."""
        if not (training and self.trainable):
            return super().call(inputs, training=training, mask=mask)
        fused = None
        if mask is None and self.axis in (-1, len(inputs.shape) - 1) and self.scale and self.center:
            normalization = synchronized_batch_normalization if self.synchronized else fused_batch_normalization
            fused = normalization(inputs, self.gamma, self.beta, self.epsilon)
        if fused is not None:
            outputs, mean, variance = fused
            # The statistics of an empty batch, which tf.distribute can hand to a replica, are NaN.
            is_empty = ops.shape(inputs)[0] == 0
            for statistic, value in ((self.moving_mean, mean), (self.moving_variance, variance)):
                self._move(statistic, ops.where(is_empty, ops.cast(statistic, value.dtype), value))
            return ops.cast(outputs, self.compute_dtype)
        before = ops.copy(self.moving_variance)
        outputs = super().call(inputs, training=training, mask=mask)
        count = ops.cast(ops.prod(ops.shape(inputs)) // inputs.shape[self.axis], before.dtype)
        # What Keras added for this batch, times n / (n - 1); a single value has no variance.
        added = self.moving_variance - self.momentum * before
        self.moving_variance.assign(self.moving_variance + added / ops.maximum(count - 1.0, 1.0))
        return outputs

    def _move(self, statistic, value):
        statistic.assign(self.momentum * statistic + (1.0 - self.momentum) * ops.cast(value, statistic.dtype))


@keras.saving.register_keras_serializable(package="aib_tf")
class Dropout(keras.layers.Dropout):
    """Dropout whose masks differ between the replicas of `tf.distribute`."""

    def __init__(self, rate, noise_shape=None, seed=None, **kwargs):
        super().__init__(rate, noise_shape=noise_shape, seed=seed, **kwargs)
        if rate > 0:
            # Keras takes no generator here, and no new attribute that holds a variable either.
            self.seed_generator.__class__ = SeedGenerator


@keras.saving.register_keras_serializable(package="aib_tf")
class AdaptiveAveragePooling2D(keras.layers.Layer):
    """Average pooling to a fixed size, with PyTorch's windows: from floor(i n / size) up to ceil((i + 1) n / size).

    Windows overlap where n is no multiple of `size`. (Keras has such a layer from version 3.13 on.)

    Args:
        output_size: height and width of the result.
        **kwargs: `name`, `dtype` as for every Keras layer.

    Call arguments:
        inputs: (B, H, W, C) float tensor with known H and W.

    Returns:
        (B, output_size, output_size, C).

    Raises:
        ValueError: if the height or the width is unknown.
    """

    def __init__(self, output_size, **kwargs):
        super().__init__(**kwargs)
        self.output_size = check_count("output_size", output_size)

    def build(self, input_shape):
        """Checks that the size is known."""
        if len(input_shape) != 4 or None in input_shape[1:3]:
            raise ValueError(
                "AdaptiveAveragePooling2D expects maps (batch, height, width, channels) of a known size. "
                f"Received: inputs.shape={tuple(input_shape)}"
            )

    def call(self, inputs):
        """Averages over rows, then over columns."""
        rows, columns = (
            ops.convert_to_tensor(_windows(size, self.output_size), dtype=inputs.dtype) for size in inputs.shape[1:3]
        )
        return ops.einsum("ih,bhwc,jw->bijc", rows, inputs, columns)

    def compute_output_shape(self, input_shape):
        """Returns (B, output_size, output_size, C)."""
        return (input_shape[0], self.output_size, self.output_size, input_shape[-1])

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "output_size": self.output_size}


def _windows(size, count):
    """(count, size) matrix whose row i averages over the i-th window."""
    weights = np.zeros((count, size))
    for i in range(count):
        begin, end = i * size // count, -(-(i + 1) * size // count)
        weights[i, begin:end] = 1 / (end - begin)
    return weights


def logits_dtype():
    """The dtype of the layers that give class scores: float32 also in half precision, float64 where asked for."""
    return "float64" if keras.config.floatx() == "float64" else "float32"


class Blocks:
    """Applies the blocks of a network, all with its width and its way to start.

    Args:
        width: factor for all numbers of channels.
        kernel: called with a seed, returns the initializer of a convolution's kernel.
        linear: the same for layers whose output no ReLU or normalisation follows, such as scores; None: as `kernel`.
        scale: the same for the scale of a batch normalisation; None stands for ones.
        seed: called for each layer that draws numbers; returns its seed, or None for a random one.
        synchronized: whether batch normalisation takes its statistics over the batches of all replicas.
    """

    def __init__(
        self,
        width=1.0,
        kernel=keras.initializers.GlorotUniform,
        linear=None,
        scale=None,
        seed=lambda: None,
        synchronized=False,
    ):
        self.width = width
        self.seed = seed
        self._synchronized = synchronized
        self._kernel = kernel
        self._linear = linear or kernel
        self._scale = scale

    def linear_initializer(self):
        """A new initializer for one kernel of a layer that gives scores."""
        return self._linear(seed=self.seed())

    def channels(self, count):
        """A number of channels of the paper's network, for this width."""
        return max(1, round(count * self.width))

    def convolution(self, x, channels, name, size=3, strides=1, bias=True, linear=False):
        """A convolution to exactly `channels` channels, which pads as PyTorch does: by size // 2 on every side."""
        if strides > 1 and size > 1:
            # Keras's "same" would pad more at the bottom and on the right.
            x = keras.layers.ZeroPadding2D(size // 2, data_format="channels_last", name=f"{name}_padding")(x)
        elif strides > 1:
            # The same as a strided 1x1 convolution, whose gradient on few channels corrupts the heap in TensorFlow 2.21
            # with oneDNN.
            x = keras.layers.MaxPooling2D(1, strides, data_format="channels_last", name=f"{name}_stride")(x)
            strides = 1
        return keras.layers.Conv2D(
            channels,
            size,
            strides=strides,
            padding="same" if strides == 1 else "valid",
            data_format="channels_last",
            use_bias=bias,
            kernel_initializer=self.linear_initializer() if linear else self._kernel(seed=self.seed()),
            name=name,
        )(x)

    def norm(self, x, name):
        """Batch normalisation."""
        scale = self._scale(seed=self.seed()) if self._scale else "ones"
        return BatchNormalization(gamma_initializer=scale, synchronized=self._synchronized, name=name)(x)

    def norm_relu(self, x, name):
        """Batch normalisation and ReLU; `name` ends in "norm", with a number behind it or not."""
        return keras.layers.ReLU(name=name.replace("norm", "relu"))(self.norm(x, name))

    def convolutions(self, x, name, channels, count):
        """`count` times (3x3 convolution, batch normalisation, ReLU), `channels` being those at width 1."""
        for number in range(1, count + 1):
            x = self.convolution(x, self.channels(channels), f"{name}_conv{number}")
            x = self.norm_relu(x, f"{name}_norm{number}")
        return x

    def pool(self, x, name):
        """2x2 max-pooling, which halves a map."""
        return keras.layers.MaxPooling2D(data_format="channels_last", name=name)(x)

    def dense(self, x, units, name, **arguments):
        """A dense layer."""
        return self.dense_layer(units, name, **arguments)(x)

    def dense_layer(self, units, name, activation=None, **arguments):
        """A dense layer that is not applied yet, since it is applied more than once."""
        initializer = self.linear_initializer()
        return keras.layers.Dense(units, activation, kernel_initializer=initializer, name=name, **arguments)

    def logits(self, x, classes):
        """The last layer: scores of the classes, in float32 also in half precision."""
        return self.dense(x, classes, "logits", dtype=logits_dtype())

    def decoder(self, code_size, hidden, classes):
        """The model from a code (B, code_size) through `hidden` units with ReLU to logits (B, classes)."""
        code = keras.Input((code_size,))
        x = self.dense(code, hidden, "hidden", activation="relu")
        return keras.Model(code, self.logits(x, classes), name="decoder")
