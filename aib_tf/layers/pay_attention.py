"""Attention to local features by their compatibility with a global vector ("Learn To Pay Attention")."""

import keras
from keras import ops

from aib_tf.layers.freezing import freeze_inner_layers
from aib_tf.layers.gaussian import statistics_dtype
from aib_tf.validation import check_choice

COMPATIBILITIES = ("pc", "dp")
NORMALIZATIONS = ("softmax", "sigmoid")


@keras.saving.register_keras_serializable(package="aib_tf")
class PayAttention(keras.layers.Layer):
    """Pools a feature map by the compatibility of its positions with a query, such as the network's global vector.

        L   = P^T local                           (only where the numbers of channels differ; L = local elsewhere)
        c_i = <u, L_i + query>                    with attention="pc" (parametrised), u learned
        c_i = <L_i, query>                        with attention="dp" (dot product)
        a   = softmax(c) over the positions,      output = sum_i a_i L_i
        a   = sigmoid(c),                         output = mean_i a_i L_i

    The two lines for a stand for normalize="softmax" and normalize="sigmoid". P and u are 1x1 convolutions without
    bias. Everything is computed in float32 under mixed precision, and only the output is cast.

    With "pc" and "softmax", <u, query> is the same at all positions, so that the softmax cancels it: the scores depend
    on the query, the attention and the output do not, and no gradient reaches it. This is so by the published formula.

    Args:
        attention: "pc" or "dp", the compatibility.
        normalize: "softmax" or "sigmoid".
        kernel_initializer: initializer of u, shape (1, 1, D, 1).
        projection_initializer: initializer of P, shape (1, 1, C, D).
        **kwargs: `name`, `dtype`, `trainable` as for every Keras layer.

    Call arguments:
        local: (B, H, W, C) float tensor of local features.
        query: (B, D) float tensor, g in the paper.
        return_attention: whether to return the attention, too, for a loss of it.

    Returns:
        (B, D) tensor in the layer's compute dtype, g_a in the paper; with `return_attention` a pair of it and the
        attention (B, H, W), float32 (float64 under a float64 policy).

    Raises:
        ValueError: for an unknown `attention` or `normalize`, or for inputs that are not maps and vectors.

    Example:
        >>> local = keras.random.normal((8, 16, 16, 64))
        >>> query = keras.random.normal((8, 128))
        >>> layer = aib_tf.layers.PayAttention(attention="dp")
        >>> layer(local, query).shape
        (8, 128)
        >>> pooled, scores, attention = layer.attend(local, query)
        >>> attention.shape
        (8, 16, 16)

    Reference:
        - Jetley et al., "Learn To Pay Attention", ICLR 2018, section 3.
    """

    def __init__(
        self,
        attention="pc",
        normalize="softmax",
        kernel_initializer="glorot_uniform",
        projection_initializer="glorot_uniform",
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_choice("attention", attention, COMPATIBILITIES)
        check_choice("normalize", normalize, NORMALIZATIONS)
        self.attention = attention
        self.normalize = normalize
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.projection_initializer = keras.initializers.get(projection_initializer)
        # Both hold the kernels of 1x1 convolutions and are never called: `attend` multiplies in a cheaper order.
        self.projection = self.scores = None

    def build(self, local_shape, query_shape):
        """Makes the kernels for local features (B, H, W, C) and queries (B, D)."""
        if len(local_shape) != 4 or local_shape[-1] is None:
            raise ValueError(
                "PayAttention expects local features (batch, height, width, channels) with a known number of channels. "
                f"Received: local.shape={tuple(local_shape)}"
            )
        if len(query_shape) != 2 or query_shape[-1] is None:
            raise ValueError(
                "PayAttention expects a query (batch, features) with a known number of features; flatten or pool "
                f"first. Received: query.shape={tuple(query_shape)}"
            )
        channels, size = local_shape[-1], query_shape[-1]
        if channels != size:
            self.projection = self._pointwise(size, self.projection_initializer, "projection")
            self.projection.build((None, None, None, channels))
        if self.attention == "pc":
            self.scores = self._pointwise(1, self.kernel_initializer, "scores")
            self.scores.build((None, None, None, size))
        freeze_inner_layers(self)

    def call(self, local, query, return_attention=False):
        """Returns the (B, D) pooled features, or a pair of them and the attention."""
        pooled, _, attention = self.attend(local, query)
        pooled = ops.cast(pooled, self.compute_dtype)
        return (pooled, attention) if return_attention else pooled

    def attend(self, local, query):
        """Pools, and returns by which scores and which attention.

        Args:
            local: (B, H, W, C) float tensor.
            query: (B, D) float tensor.

        Returns:
            The pooled features (B, D), the scores c (B, H, W) and the attention a (B, H, W), all in float32 (float64
            under a float64 policy).
        """
        if not self.built:
            self.build(local.shape, query.shape)
        local, query = (ops.cast(x, statistics_dtype(self)) for x in (local, query))
        # Scores and pooling are linear in L, so that P need not be applied at each position: <u, P^T l> = <P u, l>
        # and sum a (P^T l) = P^T (sum a l). Neither L nor L + query, (B, H, W, D) both, is ever made.
        projection = None if self.projection is None else self._kernel(self.projection)
        if self.attention == "pc":
            direction = self._kernel(self.scores)[:, 0]
            key = direction if projection is None else ops.matmul(projection, direction)
            scores = ops.einsum("bhwc,c->bhw", local, key) + ops.matmul(query, direction)[:, None, None]
        else:
            key = query if projection is None else ops.matmul(query, ops.transpose(projection))
            scores = ops.einsum("bhwc,bc->bhw", local, key)
        attention, weights = self._normalize(scores)
        pooled = ops.einsum("bhw,bhwc->bc", weights, local)
        return pooled if projection is None else ops.matmul(pooled, projection), scores, attention

    def compute_output_shape(self, local_shape, query_shape):
        """Returns (B, D)."""
        return (local_shape[0], query_shape[-1])

    def compute_output_spec(self, local, query, return_attention=False):
        """Returns shapes and dtypes of what `call` returns."""
        pooled = keras.KerasTensor(self.compute_output_shape(local.shape, query.shape), dtype=self.compute_dtype)
        attention = keras.KerasTensor(local.shape[:-1], dtype=statistics_dtype(self))
        return (pooled, attention) if return_attention else pooled

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "attention": self.attention,
            "normalize": self.normalize,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "projection_initializer": keras.initializers.serialize(self.projection_initializer),
        }

    def _normalize(self, scores):
        """Scores -> attention, and the weights of the positions in the pooled sum."""
        batch, height, width = ops.shape(scores)
        if self.normalize == "softmax":
            attention = ops.softmax(ops.reshape(scores, (batch, height * width)))
            attention = ops.reshape(attention, (batch, height, width))
            return attention, attention
        attention = ops.sigmoid(scores)
        return attention, attention / ops.cast(height * width, attention.dtype)

    def _pointwise(self, filters, initializer, name):
        return keras.layers.Conv2D(
            filters,
            1,
            use_bias=False,
            data_format="channels_last",
            kernel_initializer=initializer,
            dtype=self.dtype_policy,
            name=name,
        )

    def _kernel(self, convolution):
        """The (inputs, outputs) matrix of a 1x1 convolution, rounded as its call would: `attend` is no layer call."""
        return ops.cast(ops.cast(convolution.kernel, self.compute_dtype)[0, 0], statistics_dtype(self))
