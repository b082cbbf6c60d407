"""The VGG of "Learn To Pay Attention": a classifier that sees its local features only through attention."""

import math

import keras
from keras import ops

from aib_tf.layers.pay_attention import PayAttention
from aib_tf.models.blocks import logits_dtype
from aib_tf.models.supervision import SupervisedAttention
from aib_tf.validation import check_choice

COMBINATIONS = ("concat", "independent")
POSITIONS = ("before", "after")

# Channels and convolutions of the five blocks before the global vector, and the blocks whose features are attended to.
_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
_ATTENDED = (3, 4, 5)


@keras.saving.register_keras_serializable(package="aib_tf")
class PayAttentionClassifier(SupervisedAttention, keras.Model):
    """Classifies images from what attention pools out of their local features, at one depth or several.

        L_1, ..., L_S, g = features(images)        (B, h_s, w_s, C_s) each, and (B, D)
        g_s    = attentions[s](L_s, g)             (B, D)
        logits = classifier([g_1, ..., g_S])                                   combine="concat"
        logits = ln(mean_s softmax(classifiers[s](g_s)))                       combine="independent"

    Independent classifiers have their probabilities averaged. The logarithm of a probability is a logit of it: its
    softmax is the averaged probabilities again, and `aib_tf.losses.CrossEntropyBits()` is right for both combinations.

    With "pc" compatibility and softmax the output does not depend on g (see `PayAttention`), and the layers that only
    g comes from, behind the last local features, keep the weights they started with, unless those are decayed.

    Args:
        features: model from images (B, H, W, channels) to a list: the local features from the first depth to the
            last, and the global vector.
        attentions: a `PayAttention` for each depth.
        classifiers: layers from pooled features to class scores: one for "concat", one a depth for "independent".
        combine: "concat" or "independent".
        **kwargs: `name`, `dtype` as for every Keras model.

    Call arguments:
        images: (B, H, W, channels) float tensor, normalised as in training; after `supervise_attention` also a pair of
            images and maps.
        training: bool.

    Returns:
        (B, classes) logits.

    Attributes:
        attention_names: the entries of `explain` that are attention maps (B, h, w).
        classes: the number of classes.

    Raises:
        TypeError: if one of `attentions` is no `PayAttention`.
        ValueError: for an unknown `combine`, or numbers of parts that do not belong together.

    Reference:
        - Jetley et al., "Learn To Pay Attention", ICLR 2018, section 3.
    """

    def __init__(self, features, attentions, classifiers, combine="concat", **kwargs):
        super().__init__(**kwargs)
        check_choice("combine", combine, COMBINATIONS)
        for attention in attentions:
            if not isinstance(attention, PayAttention):
                raise TypeError(f"`attentions` must be PayAttention layers. Received: attentions={attentions!r}")
        if not attentions or len(features.outputs) != len(attentions) + 1:
            raise ValueError(
                "`features` must return the local features for each of `attentions`, and the global vector. Received: "
                f"features with {len(features.outputs)} outputs, attentions of length {len(attentions)}"
            )
        expected = 1 if combine == "concat" else len(attentions)
        if len(classifiers) != expected:
            raise ValueError(
                f"combine={combine!r} with {len(attentions)} depths takes classifiers of length {expected}. "
                f"Received: classifiers of length {len(classifiers)}"
            )
        self.features = features
        self.attentions = list(attentions)
        self.classifiers = list(classifiers)
        self.combine = combine
        # All shapes are known, so the variables exist at once: summary, counting and loading need no first call.
        self.build(self.features.input_shape)

    @property
    def attention_names(self):
        """The entries of `explain` that are attention maps (B, h, w): attention1, attention2 ..."""
        return tuple(f"attention{number}" for number in range(1, len(self.attentions) + 1))

    def build(self, input_shape):
        """Builds the attentions and the classifiers."""
        *local_shapes, query_shape = self.features.output_shape
        parts = [
            (attention, (shape, query_shape)) for attention, shape in zip(self.attentions, local_shapes, strict=True)
        ]
        depths = len(self.attentions) if self.combine == "concat" else 1
        parts += [(classifier, ((None, depths * query_shape[-1]),)) for classifier in self.classifiers]
        for layer, shapes in parts:
            # A part that comes out of a saved model, or out of another one, is built already.
            if not layer.built:
                layer.build(*shapes)

    @property
    def classes(self):
        """The number of classes."""
        depths = len(self.attentions) if self.combine == "concat" else 1
        return self.classifiers[0].compute_output_shape((None, depths * self.features.output_shape[-1][-1]))[-1]

    def call(self, images, training=None):
        """Returns the (B, classes) logits."""
        images, maps = self._images_and_maps(images, training)
        *local, query = self.features(images, training=training)
        pooled = [layer(features, query) for layer, features in zip(self.attentions[:-1], local[:-1], strict=True)]
        if maps is None:
            pooled.append(self.attentions[-1](local[-1], query))
        else:
            deepest, attention = self.attentions[-1](local[-1], query, return_attention=True)
            pooled.append(deepest)
            self._add_attention_loss(attention, maps)
        return self._classify(pooled)

    def explain(self, images, samples=0):
        """Classifies, and returns what the decision went through.

        The computation is the one of inference, and can be traced by `tf.function`.

        Args:
            images: (B, H, W, channels) float tensor or array, normalised as in training.
            samples: 0; this attention is deterministic.

        Returns:
            Dict of float tensors:

            - logits, probabilities: (B, classes).
            - scores1, scores2 ...: compatibility scores (B, h, w), numbered from the first depth that is attended to.
            - attention1, attention2 ...: attention maps (B, h, w); each sums to 1 where softmax normalises it.

        Raises:
            ValueError: if `samples` is not 0.
        """
        if samples != 0:
            raise ValueError(
                f"This attention is deterministic: there is nothing to sample. Received: samples={samples}"
            )
        explanation = {}
        *local, query = self.features(ops.convert_to_tensor(images), training=False)
        pooled = []
        for number, (attention, maps) in enumerate(zip(self.attentions, local, strict=True), start=1):
            vector, explanation[f"scores{number}"], explanation[f"attention{number}"] = attention.attend(maps, query)
            pooled.append(ops.cast(vector, attention.compute_dtype))
        explanation["logits"] = self._classify(pooled)
        explanation["probabilities"] = ops.softmax(explanation["logits"])
        return explanation

    def get_config(self):
        """Returns the configs of the parts."""
        return {
            "name": self.name,
            "dtype": keras.saving.serialize_keras_object(self.dtype_policy),
            "features": keras.saving.serialize_keras_object(self.features),
            "attentions": [keras.saving.serialize_keras_object(layer) for layer in self.attentions],
            "classifiers": [keras.saving.serialize_keras_object(layer) for layer in self.classifiers],
            "combine": self.combine,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Makes the model that `get_config` describes."""
        config = dict(config)
        for name in ("features", "attentions", "classifiers", "dtype"):
            if isinstance(config.get(name), (dict, list)):
                config[name] = keras.saving.deserialize_keras_object(config[name], custom_objects=custom_objects)
        return cls(**config)

    def _classify(self, pooled):
        """Pooled features of the depths, (B, D) each -> (B, classes) logits."""
        if self.combine == "concat":
            return self.classifiers[0](ops.concatenate(pooled, axis=-1))
        logits = [classifier(vector) for classifier, vector in zip(self.classifiers, pooled, strict=True)]
        log_probabilities = ops.stack([ops.log_softmax(scores) for scores in logits])
        return ops.logsumexp(log_probabilities, axis=0) - math.log(len(logits))


def build_pay_attention(
    depths,
    input_shape,
    classes,
    blocks,
    attention="pc",
    combine="concat",
    position="before",
    normalize="softmax",
    name=None,
):
    """Builds (VGG-att2) or (VGG-att3) of the paper.

        (3x3 convolution, batch normalisation, ReLU): 2 x 64, 2 x 128, 3 x 256 = L1, pool, 3 x 512 = L2, pool,
        3 x 512 = L3, pool, 2 x (512, pool), and a convolution as large as what is left, 1x1 for 32x32 pixels: g

    Args:
        depths: 3 for attention to L1, L2 and L3, 2 for L2 and L3.
        input_shape: (H, W, channels) of the images, H and W at least 32.
        classes: number of classes.
        blocks: the `Blocks` to build with; the width is theirs.
        attention: "pc" or "dp", see `PayAttention`.
        combine: "concat" or "independent", see `PayAttentionClassifier`.
        position: "before" for local features before their pooling, "after" for those after it.
        normalize: "softmax" or "sigmoid", see `PayAttention`.
        name: name of the model.

    Returns:
        A built `PayAttentionClassifier`, not compiled.

    Raises:
        ValueError: for another number of depths, an unknown choice, or images that are too small.
    """
    check_choice("depths", depths, (2, 3))
    check_choice("combine", combine, COMBINATIONS)
    check_choice("position", position, POSITIONS)
    features = _features(_ATTENDED[-depths:], input_shape, blocks, position)
    numbers = [block - _ATTENDED[0] + 1 for block in _ATTENDED[-depths:]]
    attentions = [
        PayAttention(
            attention,
            normalize,
            kernel_initializer=blocks.linear_initializer(),
            projection_initializer=blocks.linear_initializer(),
            name=f"attention{number}",
        )
        for number in numbers
    ]
    classifiers = [
        keras.layers.Dense(
            classes,
            kernel_initializer=keras.initializers.GlorotUniform(seed=blocks.seed()),
            dtype=logits_dtype(),
            name=classifier,
        )
        for classifier in (["logits"] if combine == "concat" else [f"logits{number}" for number in numbers])
    ]
    return PayAttentionClassifier(features, attentions, classifiers, combine, name=name)


def _features(attended, input_shape, blocks, position):
    """Images -> the features of the blocks in `attended`, before or after their pooling, and the global vector."""
    height, width, _ = input_shape
    if min(height, width) < 32:
        raise ValueError(
            f"VGG halves the image 5 times and needs 32x32 pixels or more. Received: input_shape={tuple(input_shape)}"
        )
    images = x = keras.Input(input_shape)
    local = []
    for block, (channels, count) in enumerate(_BLOCKS, start=1):
        before = x = blocks.convolutions(x, f"block{block}", channels, count)
        if block >= _ATTENDED[0]:
            x = blocks.pool(x, f"block{block}_pool")
        if block in attended:
            local.append(before if position == "before" else x)
    for number in (1, 2):
        x = blocks.convolution(x, blocks.channels(512), f"block6_conv{number}")
        x = blocks.pool(blocks.norm_relu(x, f"block6_norm{number}"), f"block6_pool{number}")
    # As large as what is left of the image: one vector, whatever the size.
    x = keras.layers.Conv2D(
        blocks.channels(512),
        x.shape[1:3],
        data_format="channels_last",
        kernel_initializer=blocks.linear_initializer(),
        name="global",
    )(x)
    query = keras.layers.Flatten(data_format="channels_last", name="flatten")(x)
    return keras.Model(images, [*local, query], name="features")


def pytorch_layers(model):
    """The names that the layers of `build_pay_attention` have in the PyTorch reimplementation.

    That is github.com/SaoYan/LearnToPayAttention, which has three depths and one classifier. Where two depths are
    attended to, they keep their numbers: attn2, attn3. The classifiers of combine="independent" are not in it; here
    they are named by their depth: classify1, classify2, classify3.

    Args:
        model: a `PayAttentionClassifier` of `build_pay_attention`.

    Returns:
        List of (prefix of the names in the state dict, Keras layer), in PyTorch's order, of all layers with weights.
    """
    names = []
    for block, (_, count) in enumerate((*_BLOCKS, (512, 2)), start=1):
        # Convolution, normalisation and ReLU, and in the last block a pooling, which has no weights but a number.
        stride = 4 if block == 6 else 3
        for number in range(1, count + 1):
            for offset, kind in enumerate(("conv", "norm")):
                layer = model.features.get_layer(f"block{block}_{kind}{number}")
                names.append((f"conv_block{block}.op.{stride * (number - 1) + offset}", layer))
    names.append(("dense", model.features.get_layer("global")))
    numbers = range(len(_ATTENDED) - len(model.attentions) + 1, len(_ATTENDED) + 1)
    # Only the first depth has fewer channels than the global vector.
    names += [("projector.op", layer.projection) for layer in model.attentions if layer.projection is not None]
    names += [
        (f"attn{number}.op", layer.scores)
        for number, layer in zip(numbers, model.attentions, strict=True)
        if layer.scores is not None
    ]
    if model.combine == "concat":
        return [*names, ("classify", model.classifiers[0])]
    names += [(f"classify{number}", layer) for number, layer in zip(numbers, model.classifiers, strict=True)]
    return names
