"""Gaussian bottleneck: a variational latent that is charged for what it tells about the image."""

import keras
from keras import ops

from aib_tf.layers.freezing import freeze_inner_layers
from aib_tf.layers.gaussian import loss_dtype, reparameterize, statistics_dtype, stddev_from_scores
from aib_tf.layers.reporting import keeps_metrics
from aib_tf.losses import check_kl_form, kl_divergence, nats_to_bits
from aib_tf.metrics import Mean
from aib_tf.ops.replicas import SeedGenerator, mark_own
from aib_tf.validation import check_count, check_seed, check_weight


@keras.saving.register_keras_serializable(package="aib_tf")
class GaussianBottleneck(keras.layers.Layer):
    """Turns a feature vector into a Gaussian latent, and adds its rate to the loss.

        (mu, r) = split(dense(x)),  sigma = softplus(r - 5),  Z = mu + sigma * e,  e ~ N(0, 1)
        loss    = beta * warmup * kl_weight * KL(N(mu, sigma^2) || N(0, 1)) / ln 2       (bits, mean over the batch)

    The KL is summed over the latent dimensions. It bounds the information that Z holds about the image from above.
    In training Z is drawn; at inference it is the mean unless `sample=True`. Everything from the split on is computed
    in float32 under mixed precision, and sigma is at least 1e-6.

    The metric `rate_bits` is the mean closed-form KL in bits, without its weights, whatever `kl` is; of two bottlenecks
    in one model Keras shows one, since metrics of one name share a place in its logs. (There is none on the
    JAX backend, where Keras does not keep metrics that a layer updates in its call.)

    With sigma near 0.007 at the start, the KL starts above 1,000 nats for 256 dimensions. `warmup`, a non-trainable
    scalar weight that starts at 1, scales the loss term, so that a callback can raise it from 0
    (`aib_tf.training.BetaWarmup`).

    Args:
        latent_dim: K, the number of latent dimensions.
        beta: weight of the rate in the loss, 0 or more.
        kl: "closed_form", or "reference" for what the authors' code evaluates (`aib_tf.losses.kl_divergence`).
        kl_weight: a second factor of the rate, as in the released code: 0.5 in its VGG, 1 elsewhere.
        seed: integer seed of the noise, or None for a random one.
        kernel_initializer: initializer of the dense kernel.
        **kwargs: `name`, `dtype`, `trainable` as for every Keras layer.

    Call arguments:
        inputs: (B, D) float tensor.
        training: bool; the default of `sample`.
        sample: True draws Z, False returns its mean, None draws in training only.

    Returns:
        (B, K) latent in the layer's compute dtype.

    Raises:
        ValueError: for a latent_dim below 1, a negative weight, an unknown `kl`, or inputs that are not (B, D).

    Example:
        >>> bottleneck = aib_tf.layers.GaussianBottleneck(32, beta=0.01, seed=0)
        >>> bottleneck(keras.random.normal((8, 128))).shape
        (8, 32)
        >>> len(bottleneck.losses)
        1

    Reference:
        - Lai et al., "Information Bottleneck Approach to Spatial Attention Learning", IJCAI 2021, section 3.
        - Alemi et al., "Deep Variational Information Bottleneck", ICLR 2017, equation 17.
    """

    def __init__(
        self,
        latent_dim,
        beta=0.01,
        kl="closed_form",
        kl_weight=1.0,
        seed=None,
        kernel_initializer="glorot_uniform",
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_kl_form(kl)
        self.latent_dim = check_count("latent_dim", latent_dim)
        self.beta = check_weight("beta", beta)
        self.kl = kl
        self.kl_weight = check_weight("kl_weight", kl_weight)
        self.seed = check_seed(seed)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.seed_generator = SeedGenerator(self.seed)
        self._dense = keras.layers.Dense(
            2 * self.latent_dim, kernel_initializer=self.kernel_initializer, dtype=self.dtype_policy, name="statistics"
        )
        self._rate = Mean(name="rate_bits", dtype="float32") if keeps_metrics() else None
        freeze_inner_layers(self)

    def build(self, input_shape):
        """Builds the dense layer for inputs (B, D)."""
        if len(input_shape) != 2 or input_shape[-1] is None:
            raise ValueError(
                "GaussianBottleneck expects a batch of vectors (batch, features); flatten or pool first. "
                f"Received: inputs.shape={tuple(input_shape)}"
            )
        self._dense.build(input_shape)
        self.warmup = self.add_weight(
            name="warmup", shape=(), initializer="ones", dtype=loss_dtype(), trainable=False, autocast=False
        )

    def call(self, inputs, training=None, sample=None):
        """Returns the (B, K) latent and adds the loss term."""
        mean, stddev = self.distribution(inputs)
        images = ops.cast(ops.shape(mean)[0], mean.dtype)
        rate = _batch_mean_bits(kl_divergence(mean, stddev), images)
        if self._rate is not None:
            self._rate.update_state(rate, sample_weight=images)
        charged = rate
        if self.kl != "closed_form":
            charged = _batch_mean_bits(kl_divergence(mean, stddev, self.kl), images)
        self.add_loss(mark_own(self.beta * self.kl_weight * self.warmup * ops.cast(charged, loss_dtype())))
        if sample is None:
            sample = training
        latent = self.sample(mean, stddev) if sample else mean
        return ops.cast(latent, self.compute_dtype)

    def distribution(self, inputs):
        """Computes the Gaussian over latents.

        Args:
            inputs: (B, D) float tensor.

        Returns:
            mean and stddev, (B, K) each, float32 (float64 under a float64 policy).
        """
        mean, scores = ops.split(ops.cast(self._dense(inputs), statistics_dtype(self)), 2, axis=-1)
        return mean, stddev_from_scores(scores)

    def sample(self, mean, stddev, samples=None):
        """Draws latents from the Gaussian that `distribution` returned.

        Args:
            mean: (B, K) float tensor.
            stddev: (B, K) float tensor.
            samples: None for one latent per image, or a number n for a leading axis of n.

        Returns:
            (B, K), or (n, B, K).
        """
        return reparameterize(mean, stddev, samples, self.seed_generator)

    def compute_output_shape(self, input_shape):
        """Returns (B, K)."""
        return (input_shape[0], self.latent_dim)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "latent_dim": self.latent_dim,
            "beta": self.beta,
            "kl": self.kl,
            "kl_weight": self.kl_weight,
            "seed": self.seed,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }


def _batch_mean_bits(nats, images):
    """Mean over the batch, in bits; 0 for an empty batch, which tf.distribute can hand to a replica."""
    return nats_to_bits(ops.sum(nats) / ops.maximum(images, 1))
