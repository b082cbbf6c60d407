"""VGG networks: for images of 32x32 pixels with batch normalisation, and VGG-16 for large images without."""

import keras

from aib_tf.models import cbam
from aib_tf.models.backbone import Backbone
from aib_tf.models.blocks import AdaptiveAveragePooling2D


class VGG(Backbone):
    """VGG for images of 32x32 pixels and more, in the shape the AIB paper uses for CIFAR and SVHN."""

    title = "VGG"
    halvings = 5

    def features(self):
        """Images (B, H, W, channels) -> features (B, H/2, W/2, 256 * width)."""
        images = keras.Input(self.input_shape)
        x = self._block(images, "block1", 64, 2)
        x = self._block(x, "block2", 128, 2)
        x = self._block(x, "block3", 256, 3)
        return keras.Model(images, self.blocks.pool(x, "block3_pool"), name="features")

    def encoder(self, features_shape):
        """Modulated features -> one vector (B, 512 * width) for images of 32x32."""
        features = keras.Input(features_shape)
        x = features
        for block, count in (("block4", 3), ("block5", 3), ("block6", 1), ("block7", 1)):
            x = self.blocks.pool(self._block(x, block, 512, count), f"{block}_pool")
        x = self.blocks.convolution(x, self.blocks.channels(512), "global", size=1)
        x = keras.layers.ReLU(name="global_relu")(x)
        # For larger images a map is left, which PyTorch lays out with channels first.
        x = keras.layers.Permute((3, 1, 2), name="channels_first")(x)
        x = keras.layers.Flatten(data_format="channels_last", name="flatten")(x)
        return keras.Model(features, x, name="encoder")

    def _block(self, x, name, channels, count):
        return self.blocks.convolutions(x, name, channels, count)


class CBAMVGG(VGG):
    """The same with an attention behind each of its five blocks, in front of the pooling: of channels, then of places.

    It is what AIB is compared with where the question is whether it takes a bottleneck.
    """

    def _block(self, x, name, channels, count):
        x = super()._block(x, name, channels, count)
        # Behind the fifth block come two single convolutions, which the paper of VGG does not have.
        return x if count == 1 else cbam.attend(x, self.blocks, name)


class VGG16(Backbone):
    """VGG-16 (configuration D of Simonyan and Zisserman, 2015), in the shape the AIB paper uses for CUB."""

    title = "VGG-16"
    halvings = 4

    def features(self):
        """Images (B, H, W, channels) -> features (B, H/16, W/16, 512 * width): all convolutions but no last pooling."""
        images = x = keras.Input(self.input_shape)
        for block, (channels, count) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), start=1):
            if block > 1:
                x = self.blocks.pool(x, f"block{block - 1}_pool")
            for number in range(1, count + 1):
                x = self._convolution_relu(x, channels, f"block{block}_conv{number}")
        return keras.Model(images, x, name="features")

    def attention_head(self, features_shape, quantized):
        """Three convolutions and the scores where attention is quantized; else the scores alone."""
        if not quantized:
            return super().attention_head(features_shape, quantized)
        features = x = keras.Input(features_shape)
        for number in range(1, 4):
            x = self._convolution_relu(x, 512, f"conv{number}")
        return keras.Model(features, self.blocks.convolution(x, 1, "scores", linear=True), name="head")

    def encoder(self, features_shape):
        """Modulated features -> one vector (B, 9 * 512 * width)."""
        features = keras.Input(features_shape)
        x = AdaptiveAveragePooling2D(3, name="pool")(features)
        # Channels first, as PyTorch lays a map out, so that the weights of the next layer can be brought over.
        x = keras.layers.Permute((3, 1, 2), name="channels_first")(x)
        x = keras.layers.Flatten(data_format="channels_last", name="flatten")(x)
        return keras.Model(features, x, name="encoder")

    def _convolution_relu(self, x, channels, name):
        x = self.blocks.convolution(x, self.blocks.channels(channels), name)
        return keras.layers.ReLU(name=name.replace("conv", "relu"))(x)
