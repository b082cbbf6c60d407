"""What `build` asks of a backbone, and what most of them have in common."""

import keras


class Backbone:
    """The networks around the attention: what comes before it, its head, what comes after, and the classifier.

    Args:
        input_shape: (H, W, channels) of the images.
        classes: number of classes.
        latent_dim: K, units of the decoder's hidden layer.
        blocks: the `Blocks` to build with.
        dropout: rate of dropout, for the networks that have it.
        released_head: whether the attention head starts as in the released code.

    Attributes:
        title: what errors call the network.
        halvings: how often it halves an image before the last layer that needs a pixel.

    Raises:
        ValueError: for images that are too small.
    """

    title: str
    halvings: int

    def __init__(self, input_shape, classes, latent_dim, blocks, dropout=0.0, released_head=False):
        smallest = 2**self.halvings
        if min(input_shape[:2]) < smallest:
            raise ValueError(
                f"{self.title} halves the image {self.halvings} times and needs {smallest}x{smallest} pixels or more. "
                f"Received: input_shape={tuple(input_shape)}"
            )
        self.input_shape = tuple(input_shape)
        self.classes = classes
        self.latent_dim = latent_dim
        self.blocks = blocks
        self.dropout = dropout
        self.released_head = released_head

    def features(self):
        """Model from images (B, H, W, channels) to the features (B, h, w, C) that attention reads."""
        raise NotImplementedError

    def attention_head(self, features_shape, quantized):
        """Layer from features to raw scores (B, h, w, 1), or None for that of `VariationalSpatialAttention`."""
        if not self.released_head:
            return None
        return keras.layers.Conv2D(
            1,
            3,
            padding="same",
            data_format="channels_last",
            kernel_initializer=self.blocks.linear_initializer(),
            name="scores",
        )

    def encoder(self, features_shape):
        """Model from modulated features to a vector (B, D)."""
        raise NotImplementedError

    def decoder(self, code_size, plain):
        """Model from the latent, or from the encoder's vector in a plain network, to logits (B, classes)."""
        return self.blocks.decoder(code_size, self.latent_dim, self.classes)
