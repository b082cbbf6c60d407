"""Attention with a bottleneck on any functional Keras model."""

import difflib
from typing import NamedTuple

import keras

from aib_tf.models.aib import AIBClassifier
from aib_tf.models.blocks import Blocks
from aib_tf.models.overrides import Overrides, Seeds
from aib_tf.validation import check_count

_OVERRIDES = (
    "latent_dim",
    "num_anchors",
    "beta",
    "kl",
    "kl_weight",
    "codebook_weight",
    "commitment_weight",
    "seed",
)


def attach_attention(backbone, layer, classes, quantize=False, head=None, name=None, **overrides):
    """Puts variational attention and an information bottleneck into a functional model.

        F      = backbone up to `layer`           (B, h, w, C)
        A      = attention(F), quantized or not   (B, h, w, 1)
        Z      = bottleneck(pool(rest of the backbone(F + F * A)))
        logits = decoder(Z)                       (B, classes)

    The rest of the backbone may end in a map, which is then averaged over its positions, or in a vector. The result
    works on a copy: the backbone stays as it is, and its weights are where the copy starts.

    Args:
        backbone: functional or sequential model with one input (B, H, W, channels) and one output, such as those of
            keras.applications with include_top=False (with its classifier, the probabilities of its classes are what
            the bottleneck reads). Give it the weights to start with ("imagenet", or a path), and the model images that
            are prepared for it.
        layer: name of the layer whose output (B, h, w, C) attention reads. No path may lead around it.
        classes: number of classes, at least 2.
        quantize: whether attention scores go to learnable anchors.
        head: layer from F to raw scores (B, h, w, 1), which the model then shares with who gave it; None for that of
            `VariationalSpatialAttention`.
        name: name of the model; by default that of the backbone with "_attention".
        **overrides: latent_dim (256), num_anchors (20), beta, kl, kl_weight, codebook_weight, commitment_weight and
            seed, as for `build`.

    Returns:
        A built `AIBClassifier`, not compiled.

    Raises:
        TypeError: if the backbone is no functional model, or for an unknown override.
        ValueError: for a layer that does not exist (near names are listed), that gives no map, or that paths lead
            around (layers that would do are listed); for a backbone with several inputs or outputs.

    Example:
        >>> backbone = keras.applications.MobileNetV2((96, 96, 3), include_top=False, weights=None)
        >>> model = aib_tf.models.attach_attention(backbone, "block_13_expand_relu", classes=5)
        >>> model.attention_names
        ('attention_mean',)
    """
    options = Overrides.of(overrides, _OVERRIDES)
    check_count("classes", classes, minimum=2)
    _check_backbone(backbone)
    copy, calls = _copy(backbone)
    cut = _tensor_of(layer, backbone.name, _cuts(copy, calls), [call.operation.name for call in calls])
    features = keras.Model(copy.inputs[0], cut, name="features")
    encoder = _encoder(copy, cut)
    seeds = Seeds(options.seed)
    blocks = Blocks(seed=seeds.next)
    latent_dim = options.latent_dim or 256
    parts = options.variational_parts(latent_dim, quantize, seeds, blocks, lambda: head)
    decoder = blocks.decoder(latent_dim, latent_dim, classes)
    return AIBClassifier(features, encoder, decoder, **parts, name=name or f"{backbone.name}_attention")


def _encoder(backbone, cut):
    """What comes after the cut, as a model that ends in a vector."""
    output = backbone.outputs[0]
    if output is not cut:
        rest = keras.Model(cut, output, name="rest")
        features = keras.Input(cut.shape[1:])
        x = rest(features)
    else:
        features = x = keras.Input(cut.shape[1:])
    if len(output.shape) == 4:
        x = keras.layers.GlobalAveragePooling2D(data_format="channels_last", name="pool")(x)
    elif len(output.shape) != 2:
        raise ValueError(
            "The backbone must end in maps (batch, height, width, channels) or vectors (batch, features). "
            f"Received: backbone.output_shape={backbone.output_shape}"
        )
    return keras.Model(features, x, name="encoder")


def _check_backbone(backbone):
    if not isinstance(backbone, keras.Model) or not getattr(backbone, "inputs", None):
        raise TypeError(
            "`backbone` must be a functional or sequential Keras model whose input shape is known: its layers are "
            f"taken apart. Received: backbone={backbone!r}"
        )
    if len(backbone.inputs) != 1 or len(backbone.outputs) != 1:
        raise ValueError(
            f"`backbone` must have one input and one output. Received: {len(backbone.inputs)} inputs, "
            f"{len(backbone.outputs)} outputs"
        )


class _Call(NamedTuple):
    """A layer or operation at work in a functional model, with the tensors that it read and made."""

    operation: keras.Operation
    read: list
    output: object


def _copy(backbone):
    """Returns a copy of a functional model with the same weights, and its calls in order."""
    calls = []

    def call(operation, *arguments, **keywords):
        output = operation(*arguments, **keywords)
        calls.append(_Call(operation, _tensors((arguments, keywords)), output))
        return output

    # A subclass of a functional model may have a config of its own: its graph is what counts.
    plain = keras.Model(backbone.inputs[0], backbone.outputs[0], name=backbone.name)
    copy = keras.models.clone_model(plain, call_function=call)
    copy.set_weights(plain.get_weights())
    for layer in copy._flatten_layers():
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()  # set_weights alone leaves what it computes with
    return copy, calls


def _cuts(copy, calls):
    """Dict from the names of layers where the model can be cut to their outputs.

    There every path from the input to the output goes through the layer's map, and no layer is at work on both sides.
    """
    last_read = {id(tensor): position for position, call in enumerate(calls) for tensor in call.read}
    last_read[id(copy.outputs[0])] = len(calls)
    last_call = {id(call.operation): position for position, call in enumerate(calls)}
    open_until = last_read.get(id(copy.inputs[0]), -1)
    cuts = {}
    for position, call in enumerate(calls):
        open_until = max(open_until, last_call[id(call.operation)])
        is_map = (
            isinstance(call.operation, keras.layers.Layer)
            and isinstance(call.output, keras.KerasTensor)
            and len(call.output.shape) == 4
            and call.output.shape[-1] is not None
        )
        # Nothing that was made before is read behind it.
        if open_until <= position and is_map:
            cuts[call.operation.name] = call.output
        open_until = max([open_until, *(last_read.get(id(tensor), -1) for tensor in _tensors(call.output))])
    return cuts


def _tensor_of(layer, model, cuts, names):
    """Returns the output of the layer to cut at; ValueError, which names others, if it is not one of `cuts`."""
    if layer in cuts:
        return cuts[layer]
    if layer not in names:
        near = difflib.get_close_matches(str(layer), names, n=5, cutoff=0.4)
        hint = f"near names are {', '.join(near)}" if near else f"the last ones are {', '.join(names[-5:])}"
        raise ValueError(f"{model!r} has no such layer; {hint}. Received: layer={layer!r}")
    near = sorted(cuts, key=lambda other: abs(names.index(other) - names.index(layer)))[:5]
    near = ", ".join(sorted(near, key=names.index)) or "none"
    raise ValueError(
        f"Paths lead around {layer!r} to the output, it gives no map (batch, height, width, channels), or a layer is "
        f"at work before and behind it: attention there would not see all. Layers near it that would do: {near}. "
        f"Received: layer={layer!r}"
    )


def _tensors(structure):
    return [tensor for tensor in keras.tree.flatten(structure) if isinstance(tensor, keras.KerasTensor)]
