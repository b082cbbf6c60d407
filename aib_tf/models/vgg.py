"""VGG for images of 32x32 pixels and more, in the shape the AIB paper uses for CIFAR and SVHN."""

import keras

_BATCH_NORM = {"momentum": 0.9, "epsilon": 1e-5}  # PyTorch's defaults, which the recipes were tuned with


class VGG:
    """The networks of a VGG: what comes before the attention, what comes after it, and the classifier.

    Args:
        input_shape: (H, W, channels), H and W at least 32.
        classes: number of classes.
        latent_dim: K, units of the decoder's hidden layer.
        width: factor for all numbers of channels; 1 is the network of the paper.
        initializer: makes the initializer of each layer's kernel.

    Raises:
        ValueError: for images smaller than 32x32.
    """

    def __init__(self, input_shape, classes, latent_dim, width, initializer):
        height, wide, _ = input_shape
        if height is None or wide is None or min(height, wide) < 32:
            raise ValueError(
                "VGG halves the image five times and needs 32x32 pixels or more. "
                f"Received: input_shape={tuple(input_shape)}"
            )
        self.input_shape = tuple(input_shape)
        self.classes = classes
        self.latent_dim = latent_dim
        self.initializer = initializer
        self.width = width

    def features(self):
        """Images (B, H, W, channels) -> features (B, H/2, W/2, 256 * width)."""
        return keras.Sequential(
            [
                keras.Input(self.input_shape),
                *self._convolutions("block1", 64, 2),
                *self._convolutions("block2", 128, 2),
                *self._convolutions("block3", 256, 3),
                keras.layers.MaxPooling2D(name="block3_pool"),
            ],
            name="features",
        )

    def encoder(self, features_shape):
        """Modulated features -> one vector (B, 512 * width) for images of 32x32."""
        pooled_block = []
        for block in ("block6", "block7"):
            pooled_block += [*self._convolutions(block, 512, 1), keras.layers.MaxPooling2D(name=f"{block}_pool")]
        return keras.Sequential(
            [
                keras.Input(features_shape),
                *self._convolutions("block4", 512, 3),
                keras.layers.MaxPooling2D(name="block4_pool"),
                *self._convolutions("block5", 512, 3),
                keras.layers.MaxPooling2D(name="block5_pool"),
                *pooled_block,
                keras.layers.Conv2D(
                    self._channels(512), 1, activation="relu", kernel_initializer=self.initializer(), name="global"
                ),
                keras.layers.Flatten(name="flatten"),
            ],
            name="encoder",
        )

    def decoder(self, code_size):
        """Latent, or the encoder's vector -> logits (B, classes), in float32 also under mixed precision."""
        return keras.Sequential(
            [
                keras.Input((code_size,)),
                keras.layers.Dense(
                    self.latent_dim, activation="relu", kernel_initializer=self.initializer(), name="hidden"
                ),
                keras.layers.Dense(
                    self.classes,
                    kernel_initializer=self.initializer(),
                    dtype="float64" if keras.config.floatx() == "float64" else "float32",
                    name="logits",
                ),
            ],
            name="decoder",
        )

    def _convolutions(self, name, channels, count):
        for number in range(1, count + 1):
            yield keras.layers.Conv2D(
                self._channels(channels),
                3,
                padding="same",
                kernel_initializer=self.initializer(),
                name=f"{name}_conv{number}",
            )
            yield keras.layers.BatchNormalization(**_BATCH_NORM, name=f"{name}_norm{number}")
            yield keras.layers.ReLU(name=f"{name}_relu{number}")

    def _channels(self, channels):
        return max(1, round(channels * self.width))
