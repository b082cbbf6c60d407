"""CBAM, the convolutional block attention module: deterministic attention over channels and places."""

import keras
from keras import ops

# Hidden units of the channel attention: the channels divided by this, but not fewer than the other, since in
# narrow networks all of a few were dead from the start.
_REDUCTION = 16
_FEWEST_HIDDEN = 8

_WINDOW = 7  # pixels that the attention over places reads, in each direction


def attend(x, blocks, name):
    """Scales features by an attention over their channels, and then by one over their places.

        M_c = sigmoid(MLP(mean over places of F) + MLP(max over places of F))              (B, 1, 1, C)
        F'  = F * M_c
        M_s = sigmoid(norm(conv7x7([mean over channels of F', max over channels of F'])))  (B, H, W, 1)
        F'' = F' * M_s

    Args:
        x: (B, H, W, C) Keras tensor, the features F.
        blocks: the network's `Blocks`.
        name: what names of layers begin with. M_c and M_s are the outputs of `<name>_channel_attention` and
            `<name>_spatial_attention`.

    Returns:
        (B, H, W, C) Keras tensor, F''.

    Reference:
        - Woo et al., "CBAM: Convolutional Block Attention Module", ECCV 2018, equations 1 to 3; the normalisation is
          that of its authors' code.
    """
    channels = x.shape[-1]
    hidden = blocks.dense_layer(max(channels // _REDUCTION, _FEWEST_HIDDEN), f"{name}_channel_hidden", "relu")
    score = blocks.dense_layer(channels, f"{name}_channel_score")
    scores = [score(hidden(pooled(x, axis=(1, 2), keepdims=True))) for pooled in (ops.mean, ops.max)]
    scores = keras.layers.Add(name=f"{name}_channel_sum")(scores)
    x = x * keras.layers.Activation("sigmoid", name=f"{name}_channel_attention")(scores)
    pooled = keras.layers.Concatenate(name=f"{name}_spatial_pooled")(
        [ops.mean(x, axis=-1, keepdims=True), ops.max(x, axis=-1, keepdims=True)]
    )
    scores = blocks.convolution(pooled, 1, f"{name}_spatial_score", size=_WINDOW, bias=False, linear=True)
    scores = blocks.norm(scores, f"{name}_spatial_norm")
    return x * keras.layers.Activation("sigmoid", name=f"{name}_spatial_attention")(scores)
