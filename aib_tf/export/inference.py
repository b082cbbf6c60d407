"""What an exported model computes: the frozen pieces of a classifier, and how the signatures put them together."""

import tensorflow as tf
from keras import ops

from aib_tf.data.geometry import RANDOM_ALGORITHM
from aib_tf.export.freezing import freeze
from aib_tf.losses import kl_divergence, nats_to_bits
from aib_tf.models import AIBClassifier, PayAttentionClassifier
from aib_tf.ops import nearest_anchor, pure

MAX_SAMPLES = 1_000

# Images and samples that go through the encoder at once: as many as keep the cores busy, few enough for the memory.
_CHUNK = 64


def inference_of(model, preprocessing, dtype="float32", fast_convolutions=True, jit_compile=False, compiled_op=False):
    """The computation of a classifier at inference, from raw pixels.

    Args:
        model: an `AIBClassifier` or a `PayAttentionClassifier`.
        preprocessing: the `Preprocessing` of its images.
        dtype: "float32" or "bfloat16", see `freeze`.
        fast_convolutions: see `freeze`.
        jit_compile: whether XLA compiles the pieces.
        compiled_op: whether a quantizer uses the compiled op, where it does at training.

    Returns:
        An object with `classify(pixels)`, `explain(pixels)` and, if something in the model is drawn,
        `predict_mc(pixels, samples, seed)`, else None there; functions of float32 pixels (B, H, W, channels) to be
        called in a `tf.function`.
    """
    pieces = _Pieces(preprocessing, dtype, fast_convolutions, jit_compile)
    if isinstance(model, PayAttentionClassifier):
        return _PayAttentionInference(model, pieces)
    return _VariationalInference(model, pieces, compiled_op)


def check_classifier(model):
    """Raises TypeError if a model is of no class that can be exported."""
    if not isinstance(model, (AIBClassifier, PayAttentionClassifier)):
        raise TypeError(
            "An exported model is an AIBClassifier or a PayAttentionClassifier, such as those of aib_tf.models.build "
            f"and attach_attention. Received: model={model!r}"
        )


class _Pieces:
    """Freezes functions with the options of one export."""

    def __init__(self, preprocessing, dtype, fast_convolutions, jit_compile):
        self.pixels = tf.TensorSpec((None, *preprocessing.image_shape))
        self._scale, self._offset = preprocessing.scale, preprocessing.offset
        self._options = {"dtype": dtype, "fast_convolutions": fast_convolutions}
        self.jit_compile = jit_compile

    def freeze(self, function, *specs):
        """The frozen function, as a `ConcreteFunction`."""
        frozen = freeze(function, specs, **self._options)
        return tf.function(frozen, jit_compile=True).get_concrete_function(*specs) if self.jit_compile else frozen

    def normalize(self, pixels):
        return pixels * self._scale + self._offset


class _VariationalInference:
    """Of an `AIBClassifier`, whose attention, quantizer and bottleneck are optional."""

    def __init__(self, model, pieces, compiled_op):
        self._has_attention = model.attention is not None
        self._has_quantizer = model.quantizer is not None
        self._has_bottleneck = model.bottleneck is not None
        if not (self._has_attention or self._has_bottleneck):
            self.predict_mc = None

        def perceive(pixels):
            features = model.features(pieces.normalize(pixels), training=False)
            if not self._has_attention:
                return (features,)
            mean, stddev = model.attention.distribution(features)
            return features, tf.cast(mean, tf.float32), tf.cast(stddev, tf.float32)

        def quantize(attention):
            attention = tf.cast(attention, model.attention.compute_dtype)
            anchors = ops.convert_to_tensor(model.quantizer.anchors)
            quantized, index = (
                nearest_anchor(attention, anchors)[:2] if compiled_op else pure.quantize(attention, anchors)
            )
            return tf.cast(quantized, tf.float32), index

        def encode(features, *attention):
            for factor in attention:
                features += features * tf.cast(factor, features.dtype)
            code = model.encoder(features, training=False)
            if not self._has_bottleneck:
                return (tf.cast(code, tf.float32),)
            return tuple(tf.cast(statistic, tf.float32) for statistic in model.bottleneck.distribution(code))

        def decode(code):
            return tf.cast(model.decoder(code, training=False), tf.float32)

        self._perceive = pieces.freeze(perceive, pieces.pixels)
        # As they are for these images: the model may take any size, and have been loaded under another dtype policy.
        features, *attention = (tf.TensorSpec.from_tensor(tensor) for tensor in self._perceive.structured_outputs)
        attention = attention[:1]
        self._quantize = pieces.freeze(quantize, *attention) if self._has_quantizer else None
        self._encode = pieces.freeze(encode, features, *attention)
        self._decode = pieces.freeze(decode, tf.TensorSpec((None, *model.decoder.input_shape[1:])))
        self._map_shape = features.shape[1:3] if self._has_attention else (0, 0)
        self._static_chunk = pieces.jit_compile
        self._code_size = model.decoder.input_shape[-1] if self._has_bottleneck else 0
        self._classes = model.decoder.output_shape[-1]

    def classify(self, pixels):
        """Returns the (B, classes) logits of the means."""
        return self.explain(pixels)["logits"]

    def explain(self, pixels):
        """Returns logits, attention maps (B, h, w), anchor indices and the rate (B,) in bits, of the parts there are.

        Nothing is drawn: attention and latent are their means. What a signature leaves out is not computed.
        """
        features, *attention = self._perceive(pixels)
        explanation = {}
        modulation = []
        if self._has_attention:
            mean, _ = attention
            explanation["attention"] = mean[..., 0]
            modulation = [mean]
        if self._has_quantizer:
            quantized, index = self._quantize(mean)
            explanation["attention_quantized"], explanation["anchor_index"] = quantized[..., 0], index[..., 0]
            modulation = [quantized]
        code, *stddev = self._encode(features, *modulation)
        if self._has_bottleneck:
            explanation["rate_bits"] = nats_to_bits(kl_divergence(code, *stddev))
        explanation["logits"] = self._decode(code)
        return explanation

    def predict_mc(self, pixels, samples, seed):
        """Monte Carlo prediction: averages over draws of attention map and latent together.

            p_s = softmax(logits of draw s),  mean = 1/n sum_s p_s
            H(mean) = I + 1/n sum_s H(p_s)          entropy of the prediction = mutual information + expected entropy

        The noise of draw s is a pure function of the image's seed and of s. It is the same for all images of one seed,
        so that an answer does not depend on what else is in the batch, or on the number of draws made at once.

        Args:
            pixels: float32 (B, H, W, channels), 0..255.
            samples: int32 (B,), the number n of draws for each image.
            seed: int32 (B,).

        Returns:
            Dict of float32 tensors: probabilities (the mean) and probabilities_stddev, (B, classes), the standard
            deviation over the n draws (divided by n); entropy_bits and mutual_information_bits, (B,).

        Reference:
            - Depeweg et al., "Decomposition of Uncertainty in Bayesian Deep Learning for Efficient and Risk-sensitive
              Learning", ICML 2018, for the two entropies.
        """
        features, *attention = self._perceive(pixels)
        batch = tf.shape(features)[0]
        largest = tf.reduce_max(samples)
        chunk = tf.maximum(_CHUNK // batch, 1)
        if not self._static_chunk:  # XLA would compile anew for each number of samples
            chunk = tf.minimum(chunk, largest)

        def repeated(x):
            return tf.repeat(x, chunk, axis=0)

        def unfolded(x):
            return tf.reshape(x, tf.concat([[batch, chunk], tf.shape(x)[1:]], axis=0))

        def draw(first):
            """The probabilities (B, chunk, classes) of the draws first, first + 1 ..."""
            numbers = tf.range(first, first + chunk)
            seeds = tf.stack([repeated(seed), tf.tile(numbers, [batch])], axis=-1)
            map_noise, code_noise = self._noise(seeds)
            modulation = []
            if self._has_attention:
                mean, stddev = map(repeated, attention)
                modulation = [mean + stddev * map_noise]
            if self._has_quantizer:
                modulation = [self._quantize(*modulation)[0]]
            code, *stddev = self._encode(repeated(features), *modulation)
            if self._has_bottleneck:
                code += stddev[0] * code_noise
            probabilities = tf.nn.softmax(self._decode(code))
            counted = numbers[None] < samples[:, None]
            return tf.where(counted[..., None], unfolded(probabilities), 0.0)

        def accumulate(first, total, squares, entropies):
            # Sums of squares and their cancellation need more than float32.
            probabilities = tf.cast(draw(first), tf.float64)
            return (
                first + chunk,
                total + tf.reduce_sum(probabilities, axis=1),
                squares + tf.reduce_sum(tf.square(probabilities), axis=1),
                entropies + tf.reduce_sum(_entropy_bits(probabilities), axis=1),
            )

        zeros = tf.zeros((batch, self._classes), tf.float64)
        _, total, squares, entropies = tf.while_loop(
            lambda first, *_: first < largest, accumulate, (0, zeros, zeros, zeros[:, 0]), parallel_iterations=1
        )
        count = tf.cast(samples, tf.float64)
        mean = total / count[:, None]
        variance = tf.maximum(squares / count[:, None] - tf.square(mean), 0.0)
        entropy = _entropy_bits(mean)
        prediction = {
            "probabilities": mean,
            "probabilities_stddev": tf.sqrt(variance),
            "entropy_bits": entropy,
            # It is not negative; its rounding error is.
            "mutual_information_bits": tf.maximum(entropy - entropies / count, 0.0),
        }
        return {name: tf.cast(value, tf.float32) for name, value in prediction.items()}

    def _noise(self, seeds):
        """Standard normal noise for maps (N, h, w, 1) and codes (N, K), each row from its own two integers."""
        height, width = self._map_shape
        size = height * width + self._code_size

        def row(seed):
            return tf.random.stateless_normal((size,), seed, alg=RANDOM_ALGORITHM)

        noise = tf.map_fn(row, seeds, fn_output_signature=tf.TensorSpec((size,), tf.float32))
        return tf.reshape(noise[:, : height * width], (-1, height, width, 1)), noise[:, height * width :]


class _PayAttentionInference:
    """Of a `PayAttentionClassifier`: nothing in it is drawn."""

    predict_mc = None

    def __init__(self, model, pieces):
        def explain(pixels):
            explanation = model.explain(pieces.normalize(pixels))
            maps = {name: tf.cast(explanation[name], tf.float32) for name in model.attention_names}
            return {"logits": tf.cast(explanation["logits"], tf.float32), **maps}

        self._explain = pieces.freeze(explain, pieces.pixels)

    def classify(self, pixels):
        """Returns the (B, classes) logits."""
        return self._explain(pixels)["logits"]

    def explain(self, pixels):
        """Returns logits and the attention maps (B, h, w)."""
        return dict(self._explain(pixels))


def _entropy_bits(probabilities):
    """Entropy over the last axis, in bits; 0 where all probabilities are 0."""
    return nats_to_bits(-tf.reduce_sum(tf.math.xlogy(probabilities, probabilities), axis=-1))
