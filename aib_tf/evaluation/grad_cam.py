"""Grad-CAM: where a class gets its evidence from, for any convolutional Keras model."""

import difflib

import keras
import numpy as np
import tensorflow as tf

from aib_tf.evaluation.networks import logits_of, observed
from aib_tf.evaluation.subject import UnavailableError
from aib_tf.models.aib import AIBClassifier
from aib_tf.models.pay_attention import PayAttentionClassifier


class GradCAM:
    """Maps of the evidence for a class, from the gradient of its logit with respect to feature maps.

        alpha_k = mean over positions (i, j) of d y_c / d A_k(i, j)          eq. 1
        map     = ReLU(sum_k alpha_k A_k)                                    eq. 2

    A (B, h, w, K) is the output of one layer and y_c the logit of the class, before the softmax. Everything is computed
    in inference mode: of a variational model by its means, and through a quantizer by its straight-through gradient,
    since the true one is zero almost everywhere. A map is 0 or more, and all 0 where nothing speaks for the class.

    The layer, unless it is named, is the one whose output the attention of a model of this library reads (of several,
    the deepest), which is the end of `features` in the plain variants as well, so that the maps have the resolution of
    the attention. Of any other functional or sequential model it is the last layer whose output is (B, h, w, K) with
    more than one position. Images and feature maps have their channels last.

    Args:
        model: a Keras model from images (B, H, W, C) to logits (B, classes). It is not changed, and its weights are
            read at each call.
        layer: name of a layer, None for the one above. A layer of a nested model may be named alone where no other one
            has its name, and by its path, such as "features/block3_pool", always. Of a layer that is at work several
            times, the last output is meant.
        probabilities: whether the model returns probabilities; y_c is then the logarithm of the probability. That is
            the logit less the logarithm of the sum of all exponentials, so that evidence against the other classes
            counts as evidence for this one.

    Call arguments:
        images: (B, H, W, C) floats, as the model takes them.
        classes: (B,) integers, or one for all images; None for the class that is predicted.

    Returns:
        (B, h, w) float32 tensor, h and w being those of the layer.

    Raises:
        TypeError: The model is no Keras model.
        ValueError: There is no such layer, it gives no feature maps, or a class is not one of the model.
        UnavailableError: Keras does not run on TensorFlow, or no layer of the model gives feature maps.

    Example:
        >>> maps = GradCAM(model)(images)
        >>> maps.shape
        TensorShape([64, 16, 16])

    Reference:
        - Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV
          2017, section 3.
    """

    def __init__(self, model, layer: str | None = None, probabilities: bool = False):
        if not isinstance(model, keras.Model):
            raise TypeError(f"Grad-CAM needs a Keras model. Received: model={type(model).__name__}")
        if keras.config.backend() != "tensorflow":
            raise UnavailableError(
                f"Grad-CAM needs the gradients of TensorFlow. Received: Keras backend={keras.config.backend()!r}"
            )
        self.model = model
        self._layer = _default_layer(model) if layer is None else _named_layer(model, layer)
        self.layer = self._layer.name
        self._probabilities = probabilities
        self._compiled = tf.function(self._maps)

    def __call__(self, images, classes=None):
        """Returns the (B, h, w) maps."""
        images = tf.convert_to_tensor(images)
        if not images.dtype.is_floating or images.shape.rank != 4:
            raise ValueError(
                "Images must be floats of shape (B, H, W, C). "
                f"Received: dtype={images.dtype.name}, shape={tuple(images.shape)}"
            )
        # Any batch size is one trace: the last batch of a data set is most often smaller than the others.
        trace = self._compiled.get_concrete_function(
            tf.TensorSpec((None, *images.shape[1:]), images.dtype), tf.TensorSpec((None,), tf.int32)
        )
        if classes is None:
            classes = np.full(len(images), -1)
        else:
            classes = self._check_classes(np.asarray(classes), len(images), trace.structured_outputs[1].shape[-1])
        return trace(images, tf.convert_to_tensor(classes, tf.int32))[0]

    def _check_classes(self, classes, images, known):
        if classes.dtype.kind not in "iu" or classes.shape not in ((), (images,)):
            raise ValueError(
                f"Classes must be one integer, or integers of shape ({images},), one for each image. "
                f"Received: shape={classes.shape}, dtype={classes.dtype}"
            )
        bad = np.extract((classes < 0) | (classes >= known), classes)
        if bad.size:
            raise ValueError(f"Classes must lie in 0..{known - 1}, those of the model. Received: class={bad[0]}")
        return np.broadcast_to(classes, images)

    def _maps(self, images, classes):
        """Maps, and the logits that they explain; class -1 stands for the predicted one."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:

            def watch(output):
                if tf.is_tensor(output):
                    # A gradient needs only what comes after the layer.
                    output = tf.identity(output)
                    tape.watch(output)
                return output

            with observed(self._layer, watch) as calls:
                logits = tf.cast(logits_of(self.model, images), tf.float32)
            if self._probabilities:
                # The smallest normal number keeps the logarithm finite.
                logits = tf.math.log(tf.maximum(logits, np.finfo(np.float32).tiny))
            chosen = tf.where(classes < 0, tf.argmax(logits, axis=-1, output_type=tf.int32), classes)
            # The logit of an image depends on no other image: the gradient of the sum holds that of each.
            evidence = tf.reduce_sum(tf.gather(logits, chosen, axis=1, batch_dims=1))
        if not calls:
            raise ValueError(f"The model does not call this layer. Received: layer={self.layer!r}")
        features = calls[-1].output
        if not tf.is_tensor(features) or features.shape.rank != 4:
            shape = tuple(features.shape) if tf.is_tensor(features) else type(features).__name__
            raise ValueError(
                "Grad-CAM needs a layer whose output is (batch, height, width, channels). "
                f"Received: layer={self.layer!r} with output {shape}"
            )
        gradient = tape.gradient(evidence, features, unconnected_gradients="zero")
        weights = tf.reduce_mean(tf.cast(gradient, tf.float32), axis=(1, 2))
        return tf.nn.relu(tf.einsum("bhwk,bk->bhw", tf.cast(features, tf.float32), weights)), logits


def _default_layer(model):
    if isinstance(model, AIBClassifier):
        return model.features
    if isinstance(model, PayAttentionClassifier):
        # Not `features` as a whole: the global vector comes from these local features, too.
        *_, local, _ = model.features.outputs
        return _maker(local)
    found = _last_feature_maps(model)
    if found is None:
        raise UnavailableError("the model has no layer whose output is feature maps (batch, height, width, channels)")
    return found


def _maker(tensor):
    """The layer that made a symbolic tensor of a functional model."""
    return tensor._keras_history.operation


def _last_feature_maps(model):
    for layer in reversed(model.layers):
        if isinstance(layer, keras.layers.InputLayer):
            continue
        output = getattr(layer, "output", None) if layer._inbound_nodes else None
        if isinstance(output, keras.KerasTensor) and len(output.shape) == 4 and output.shape[1:3] != (1, 1):
            return layer
        # A model that ends in a vector may have its feature maps inside.
        found = _last_feature_maps(layer) if isinstance(layer, keras.Model) else None
        if found is not None:
            return found
    return None


def _named_layer(model, name):
    paths = dict(_paths(model))
    if name in paths:
        return paths[name]
    found = {id(layer): path for path, layer in paths.items() if layer.name == name}
    if len(found) == 1:
        return paths[next(iter(found.values()))]
    if found:
        raise ValueError(
            f"Several layers have this name; name one by its path, {' or '.join(found.values())}. "
            f"Received: layer={name!r}"
        )
    names = list(dict.fromkeys([*(layer.name for layer in paths.values()), *paths]))
    near = difflib.get_close_matches(str(name), names, n=5, cutoff=0.4)
    hint = f"near names are {', '.join(near)}" if near else f"the last ones are {', '.join(names[-5:])}"
    raise ValueError(f"{model.name!r} has no such layer; {hint}. Received: layer={name!r}")


def _paths(layer, path=""):
    """Pairs of a path of names and a layer, for all layers inside of one."""
    for inner in layer._flatten_layers(include_self=False, recursive=False):
        own = f"{path}{inner.name}"
        yield own, inner
        yield from _paths(inner, f"{own}/")
