"""The classifier with an information bottleneck, around any features, encoder and decoder."""

import keras
from keras import ops

from aib_tf.layers import AnchorQuantizer, GaussianBottleneck, VariationalSpatialAttention
from aib_tf.losses import kl_divergence
from aib_tf.models.supervision import SupervisedAttention
from aib_tf.validation import check_count

_PARTS = ("features", "encoder", "decoder", "attention", "quantizer", "bottleneck")


@keras.saving.register_keras_serializable(package="aib_tf")
class AIBClassifier(SupervisedAttention, keras.Model):
    """Classifies images through spatial attention and an information bottleneck.

        F  = features(images)                    (B, h, w, C)
        A  = attention(F), then quantizer(A)     (B, h, w, 1)
        F' = F + F * A
        Z  = bottleneck(encoder(F'))             (B, K)
        logits = decoder(Z)                      (B, classes)

    Attention, quantizer and bottleneck are optional: the plain, the AIB and the AIB-qt variant of a network are this
    one class. The layers add their own loss terms, in bits; compile with `aib_tf.losses.CrossEntropyBits()` to
    minimise the objective of the paper. In training one attention map and one latent are drawn for each image; at
    inference the means are used, so that predictions are deterministic.

    Args:
        features: model from images (B, H, W, channels) to features (B, h, w, C).
        encoder: model from modulated features to a vector (B, D).
        decoder: model from the latent (B, K), or from the encoder's vector where there is no bottleneck, to logits.
        attention: a `VariationalSpatialAttention` or None.
        quantizer: an `AnchorQuantizer` or None; needs `attention`.
        bottleneck: a `GaussianBottleneck` or None.
        **kwargs: `name`, `dtype` as for every Keras model.

    Call arguments:
        images: (B, H, W, channels) float tensor, normalised as in training; after `supervise_attention` also a pair of
            images and maps.
        training: bool.

    Returns:
        (B, classes) logits.

    Raises:
        TypeError: if a part is of the wrong class.
        ValueError: if there is a quantizer without attention.

    Reference:
        - Lai et al., "Information Bottleneck Approach to Spatial Attention Learning", IJCAI 2021, section 3.
    """

    def __init__(self, features, encoder, decoder, attention=None, quantizer=None, bottleneck=None, **kwargs):
        super().__init__(**kwargs)
        for name, part, kind in (
            ("attention", attention, VariationalSpatialAttention),
            ("quantizer", quantizer, AnchorQuantizer),
            ("bottleneck", bottleneck, GaussianBottleneck),
        ):
            if part is not None and not isinstance(part, kind):
                raise TypeError(f"`{name}` must be a {kind.__name__} or None. Received: {name}={part!r}")
        if quantizer is not None and attention is None:
            raise ValueError("A quantizer needs an attention to quantize. Received: attention=None")
        self.features = features
        self.encoder = encoder
        self.decoder = decoder
        self.attention = attention
        self.quantizer = quantizer
        self.bottleneck = bottleneck
        # All shapes are known, so the variables exist at once: summary, counting and loading need no first call.
        self.build(self.features.input_shape)

    def build(self, input_shape):
        """Builds the layers between the three networks."""
        features_shape = self.features.output_shape
        for layer, shape in (
            (self.attention, features_shape),
            (self.quantizer, (*features_shape[:-1], 1)),
            (self.bottleneck, self.encoder.output_shape),
        ):
            # A part that comes out of a saved model, or out of another one, is built already.
            if layer is not None and not layer.built:
                layer.build(shape)

    def call(self, images, training=None):
        """Returns the (B, classes) logits."""
        images, maps = self._images_and_maps(images, training)
        features = self.features(images, training=training)
        if self.attention is not None:
            if maps is None:
                attention = self.attention(features, training=training)
            else:
                attention, mean = self.attention(features, training=training, return_mean=True)
                self._add_attention_loss(mean, maps)
            if self.quantizer is not None:
                attention = self.quantizer(attention)
            features = _modulate(features, attention)
        code = self.encoder(features, training=training)
        if self.bottleneck is not None:
            code = self.bottleneck(code, training=training)
        return self.decoder(code, training=training)

    @property
    def classes(self):
        """The number of classes."""
        return self.decoder.output_shape[-1]

    @property
    def attention_names(self):
        """The entries of `explain` that are attention maps (B, h, w): attention_mean, or none."""
        return () if self.attention is None else ("attention_mean",)

    def explain(self, images, samples=0):
        """Classifies, and returns what the decision went through.

        With samples = n > 0, n attention maps are drawn, and n latents for each of them; logits, not probabilities,
        are averaged over the n * n (section 4 of the paper). samples = 0 uses the means. The computation is the one
        of inference: no loss is added and no metric changed. It can be traced by `tf.function`.

        Args:
            images: (B, H, W, channels) float tensor or array, normalised as in training.
            samples: number n of samples, 0 for the means.

        Returns:
            Dict of float tensors, without the entries of parts that the model does not have:

            - logits, probabilities: (B, classes).
            - attention_mean, attention_stddev: (B, h, w).
            - attention: the maps before quantization, (n, B, h, w), n = 1 for the means.
            - attention_quantized: (n, B, h, w).
            - latent_mean, latent_stddev: (B, K) for the means, (n, B, K) for samples.
            - kl: (B,), closed form, in nats, averaged over the samples.
            - codebook_loss, commitment_loss: scalars, mean squared error.

        Raises:
            ValueError: if `samples` is not an integer from 0 up.
        """
        check_count("samples", samples, minimum=0)
        draws = max(samples, 1)
        explanation = {}
        features = self.features(ops.convert_to_tensor(images), training=False)
        if self.attention is not None:
            mean, stddev = self.attention.distribution(features)
            attention = self.attention.sample(mean, stddev, samples) if samples else mean[None]
            explanation["attention_mean"] = mean[..., 0]
            explanation["attention_stddev"] = stddev[..., 0]
            explanation["attention"] = attention[..., 0]
            # From here on the samples stand in the batch: sample * B + image.
            attention = ops.cast(_fold(attention), self.attention.compute_dtype)
            if self.quantizer is not None:
                nearest = self.quantizer.nearest(attention)
                attention = nearest.quantized
                explanation["attention_quantized"] = _unfold(attention, draws)[..., 0]
                explanation["codebook_loss"] = nearest.codebook_loss
                explanation["commitment_loss"] = nearest.commitment_loss
            features = _modulate(_repeat(features, draws), attention)
        else:
            features = _repeat(features, draws)
        code = self.encoder(features, training=False)
        if self.bottleneck is not None:
            mean, stddev = self.bottleneck.distribution(code)
            explanation["latent_mean"] = _unfold(mean, draws) if samples else mean
            explanation["latent_stddev"] = _unfold(stddev, draws) if samples else stddev
            explanation["kl"] = ops.mean(_unfold(kl_divergence(mean, stddev), draws), axis=0)
            code = _fold(self.bottleneck.sample(mean, stddev, samples)) if samples else mean
            code = ops.cast(code, self.bottleneck.compute_dtype)
        logits = self.decoder(code, training=False)
        combinations = draws if self.bottleneck is None else draws * draws
        logits = ops.mean(_unfold(logits, combinations), axis=0)
        explanation["logits"] = logits
        explanation["probabilities"] = ops.softmax(logits)
        return explanation

    def get_config(self):
        """Returns the configs of the parts."""
        parts = {name: getattr(self, name) for name in _PARTS}
        return {
            "name": self.name,
            "dtype": keras.saving.serialize_keras_object(self.dtype_policy),
            **{name: part and keras.saving.serialize_keras_object(part) for name, part in parts.items()},
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Makes the model that `get_config` describes."""
        config = dict(config)
        for name in (*_PARTS, "dtype"):
            if isinstance(config.get(name), dict):
                config[name] = keras.saving.deserialize_keras_object(config[name], custom_objects=custom_objects)
        return cls(**config)


def _modulate(features, attention):
    """F + F * A: attention strengthens features and never erases them (Lai et al., 2021)."""
    # A backbone may have another dtype policy than the attention.
    return features + features * ops.cast(attention, features.dtype)


def _repeat(x, times):
    """Repeats a batch, (B, ...) -> (times * B, ...)."""
    if times == 1:
        return x
    # Tiling a batch of unknown size loses the sizes that are known, which a Flatten behind it needs.
    return ops.reshape(ops.tile(x, (times, *(1 for _ in x.shape[1:]))), (-1, *ops.shape(x)[1:]))


def _fold(x):
    """(n, B, ...) -> (n * B, ...)."""
    return ops.reshape(x, (-1, *ops.shape(x)[2:]))


def _unfold(x, times):
    """(times * B, ...) -> (times, B, ...)."""
    return ops.reshape(x, (times, -1, *ops.shape(x)[1:]))
