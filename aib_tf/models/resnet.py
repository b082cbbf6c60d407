"""Residual networks: WideResNet for images of 32x32 pixels, and WideResNet-50-2 for large ones."""

import keras

from aib_tf.models.backbone import Backbone
from aib_tf.models.blocks import Dropout


class WideResNet(Backbone):
    """WideResNet-d-k (Zagoruyko and Komodakis, 2016), as in the AIB paper's code.

    Args:
        depth: d = 6 n + 4, for groups of n blocks.
        widening: k, the factor of the numbers of channels.
        *args: as for `Backbone`.
        **kwargs: as for `Backbone`.

    Raises:
        ValueError: if depth is not 6 n + 4 for an n of at least 1.
    """

    title = "WideResNet"
    halvings = 2

    def __init__(self, depth, widening, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.count, rest = divmod(depth - 4, 6)
        if rest or self.count < 1:
            raise ValueError(
                f"The depth of a WideResNet is 6 n + 4: 10, 16, 22, 28, 34, 40 ... Received: depth={depth}"
            )
        self.widths = [self.blocks.channels(16), *(self.blocks.channels(c * widening) for c in (16, 32, 64))]

    def features(self):
        """Images (B, H, W, channels) -> features (B, H/2, W/2, 32 * k * width)."""
        images = keras.Input(self.input_shape)
        x = self.blocks.convolution(images, self.widths[0], "conv1", bias=False)
        x = self._group(x, "group1", self.widths[1], 1)
        return keras.Model(images, self._group(x, "group2", self.widths[2], 2), name="features")

    def attention_head(self, features_shape, quantized):
        """A third group that keeps the size, and two convolutions, each normalised."""
        features = keras.Input(features_shape)
        x = self._group(features, "group3", self.widths[3], 1)
        x = self.blocks.norm(x, "norm1")  # without ReLU in the released code
        x = self.blocks.convolution(x, self.classes, "conv2", size=1, bias=False)
        x = self.blocks.norm_relu(x, "norm2")
        x = self.blocks.convolution(x, 1, "conv3", bias=False)
        return keras.Model(features, self.blocks.norm(x, "norm3"), name="head")

    def encoder(self, features_shape):
        """Modulated features -> one vector (B, 64 * k * width)."""
        features = keras.Input(features_shape)
        x = self._group(features, "group3", self.widths[3], 2)
        x = self.blocks.norm_relu(x, "norm")
        x = keras.layers.GlobalAveragePooling2D(data_format="channels_last", name="pool")(x)
        return keras.Model(features, x, name="encoder")

    def decoder(self, code_size, plain):
        """A ReLU, which a plain network has had already, and a dense layer."""
        code = x = keras.Input((code_size,))
        if not plain:
            x = keras.layers.ReLU(name="relu")(x)
        return keras.Model(code, self.blocks.logits(x, self.classes), name="decoder")

    def _group(self, x, name, channels, strides):
        for number in range(1, self.count + 1):
            x = self._block(x, f"{name}_block{number}", channels, strides if number == 1 else 1)
        return x

    def _block(self, x, name, channels, strides):
        """Normalisation before convolution: (norm, ReLU, 3x3) twice, beside a shortcut."""
        same = x.shape[-1] == channels and strides == 1
        activated = self.blocks.norm_relu(x, f"{name}_norm1")
        y = self.blocks.convolution(activated, channels, f"{name}_conv1", strides=strides, bias=False)
        y = self.blocks.norm_relu(y, f"{name}_norm2")
        if self.dropout:
            y = Dropout(self.dropout, seed=self.blocks.seed(), name=f"{name}_dropout")(y)
        y = self.blocks.convolution(y, channels, f"{name}_conv2", bias=False)
        if not same:
            # The 1x1 shortcut reads what was normalised already; its stride alone makes sizes meet.
            x = self.blocks.convolution(activated, channels, f"{name}_shortcut", size=1, strides=strides, bias=False)
        return keras.layers.Add(name=f"{name}_add")([x, y])


class WideResNet50(Backbone):
    """ResNet-50 (He et al., 2016) with bottlenecks of twice the width, "WideResNet-50-2", as in torchvision."""

    title = "WideResNet-50-2"
    halvings = 5

    def features(self):
        """Images (B, H, W, channels) -> features (B, H/16, W/16, 1024 * width): up to the third stage."""
        images = keras.Input(self.input_shape)
        x = self.blocks.convolution(images, self.blocks.channels(64), "conv1", size=7, strides=2, bias=False)
        x = self.blocks.norm_relu(x, "norm1")
        # Zeros do as padding of a maximum over what a ReLU left.
        x = keras.layers.ZeroPadding2D(1, data_format="channels_last", name="pool1_padding")(x)
        x = keras.layers.MaxPooling2D(3, 2, data_format="channels_last", name="pool1")(x)
        for stage, (planes, count) in enumerate(((64, 3), (128, 4), (256, 6)), start=1):
            x = self._stage(x, f"stage{stage}", planes, count, 1 if stage == 1 else 2)
        return keras.Model(images, x, name="features")

    def attention_head(self, features_shape, quantized):
        """Three bottlenecks of the fourth stage that keep the size, and a 3x3 convolution."""
        features = keras.Input(features_shape)
        x = self._stage(features, "stage4", 512, 3, 1)
        return keras.Model(features, self.blocks.convolution(x, 1, "scores", linear=True), name="head")

    def encoder(self, features_shape):
        """Modulated features -> one vector (B, 2048 * width)."""
        features = keras.Input(features_shape)
        x = self._stage(features, "stage4", 512, 3, 2)
        x = keras.layers.GlobalAveragePooling2D(data_format="channels_last", name="pool")(x)
        return keras.Model(features, x, name="encoder")

    def decoder(self, code_size, plain):
        """As in the other networks; a plain one has a dense layer alone."""
        if not plain:
            return super().decoder(code_size, plain)
        code = keras.Input((code_size,))
        return keras.Model(code, self.blocks.logits(code, self.classes), name="decoder")

    def _stage(self, x, name, planes, count, strides):
        for number in range(1, count + 1):
            x = self._bottleneck(x, f"{name}_block{number}", planes, strides if number == 1 else 1, project=number == 1)
        return x

    def _bottleneck(self, x, name, planes, strides, project):
        inner, outer = self.blocks.channels(2 * planes), self.blocks.channels(4 * planes)
        y = self.blocks.convolution(x, inner, f"{name}_conv1", size=1, bias=False)
        y = self.blocks.norm_relu(y, f"{name}_norm1")
        y = self.blocks.convolution(y, inner, f"{name}_conv2", strides=strides, bias=False)
        y = self.blocks.norm_relu(y, f"{name}_norm2")
        y = self.blocks.convolution(y, outer, f"{name}_conv3", size=1, bias=False)
        y = self.blocks.norm(y, f"{name}_norm3")
        if project:
            x = self.blocks.convolution(x, outer, f"{name}_shortcut", size=1, strides=strides, bias=False)
            x = self.blocks.norm(x, f"{name}_shortcut_norm")
        return keras.layers.ReLU(name=f"{name}_relu")(keras.layers.Add(name=f"{name}_add")([x, y]))
