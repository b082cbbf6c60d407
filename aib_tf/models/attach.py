"""Attention with a bottleneck on any functional Keras model."""

import difflib

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
            keras.applications with include_top=False. Give it the weights to start with ("imagenet", or a path), and
            the model images that are prepared for it.
        layer: name of the layer whose output (B, h, w, C) attention reads. No path may lead around it.
        classes: number of classes, at least 2.
        quantize: whether attention scores go to learnable anchors.
        head: layer from F to raw scores (B, h, w, 1); None for that of `VariationalSpatialAttention`.
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
    _check_cut(backbone, layer)
    copy = keras.models.clone_model(backbone)
    copy.set_weights(backbone.get_weights())
    cut = copy.get_layer(layer).output
    features = keras.Model(copy.inputs[0], cut, name="features")
    encoder = _encoder(copy, cut)
    seeds = Seeds(options.seed)
    blocks = Blocks(seed=seeds.next)
    latent_dim = options.latent_dim or 256
    parts = options.variational_parts(latent_dim, quantize, seeds, blocks, lambda: head)
    code = keras.Input((latent_dim,))
    hidden = blocks.dense(code, latent_dim, "hidden", activation="relu")
    decoder = keras.Model(code, blocks.logits(hidden, classes), name="decoder")
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
        x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
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


def _check_cut(backbone, name):
    """Raises ValueError unless everything that reaches the output goes through the layer."""
    names = [layer.name for layer in backbone.layers]
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=5, cutoff=0.4)
        hint = f"near names are {', '.join(near)}" if near else f"the last ones are {', '.join(names[-5:])}"
        raise ValueError(f"{backbone.name!r} has no such layer; {hint}. Received: layer={name!r}")
    cuts = _cuts(backbone)
    if name not in cuts:
        order = {other: position for position, other in enumerate(names)}
        near = sorted(sorted(cuts, key=lambda other: abs(order[other] - order[name]))[:5], key=order.get)
        raise ValueError(
            f"Paths lead around {name!r} to the output, or it gives no map (batch, height, width, channels): attention "
            f"there would not see all. Layers near it that would do: {', '.join(near) or 'none'}. "
            f"Received: layer={name!r}"
        )


def _cuts(backbone):
    """Names of the layers that give a map and that every path from the input to the output goes through."""
    order = {layer.name: position for position, layer in enumerate(backbone.layers)}
    last_reader = dict.fromkeys(order, -1)
    inputs = {layer.name for layer in backbone.layers if isinstance(layer, keras.layers.InputLayer)}
    if isinstance(backbone, keras.Sequential):
        names = list(order)
        last_reader = {name: position + 1 for position, name in enumerate(names)}
    else:
        for entry in backbone.get_config()["layers"]:
            for read in _read_by(entry["inbound_nodes"]):
                last_reader[read] = max(last_reader[read], order[entry["name"]])
    cuts = []
    open_until = -1
    for name, position in order.items():
        # Nothing that stands before this layer is read behind it.
        shape = getattr(backbone.get_layer(name).output, "shape", ())
        if open_until <= position and len(shape) == 4 and None not in shape[1:] and name not in inputs:
            cuts.append(name)
        open_until = max(open_until, last_reader[name])
    return cuts


def _read_by(nodes):
    """Names of the layers whose outputs a layer reads, out of the "inbound_nodes" of a functional model's config."""
    if isinstance(nodes, dict):
        if "keras_history" in nodes:
            yield nodes["keras_history"][0]
        else:
            for value in nodes.values():
                yield from _read_by(value)
    elif isinstance(nodes, (list, tuple)):
        for value in nodes:
            yield from _read_by(value)
