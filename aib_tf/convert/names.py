"""Which array of a PyTorch state dict belongs to which layer."""

import dataclasses
import re

import keras

from aib_tf.models import AIBClassifier, PayAttentionClassifier
from aib_tf.models.pay_attention import pytorch_layers


@dataclasses.dataclass(frozen=True)
class Entry:
    """A layer with weights, and its place in PyTorch.

    Attributes:
        names: prefixes of its arrays in the state dict. The released networks list some modules twice.
        layer: a convolution, dense layer, batch normalisation or `AnchorQuantizer`.
    """

    names: tuple[str, ...]
    layer: keras.layers.Layer


# What released checkpoints hold beside the network that computes: WideResNet-50-2 has a second third stage.
UNUSED = {"wrn_50_2_cub": ("tmp_layer.",)}


def architecture_of(model):
    """Tells by its layers which network of `aib_tf.models.build` a model is, whatever it is called now.

    Returns:
        "vgg", "vgg16_cub", "wide_resnet", "wrn_50_2_cub" or "pay_attention"; None for another model.
    """
    if isinstance(model, PayAttentionClassifier):
        return "pay_attention" if _has(model.features, "block6_conv2") else None
    if isinstance(model, AIBClassifier):
        if _has(model.features, "block1_channel_attention"):
            return None
        if _has(model.features, "block3_pool") and _has(model.encoder, "block7_conv1"):
            return "vgg"
        if _has(model.features, "block5_conv3") and _has(model.encoder, "channels_first"):
            return "vgg16_cub"
        if _has(model.features, "group2_block1_conv1"):
            return "wide_resnet"
        if _has(model.features, "stage3_block6_conv1"):
            return "wrn_50_2_cub"
    return None


def _has(network, name):
    return any(layer.name == name for layer in network.layers)


def entries(model):
    """Lists the layers of a model with their PyTorch names.

    Args:
        model: what `aib_tf.models.build` made, or a copy that was loaded.

    Returns:
        The architecture, as `architecture_of` calls it, and a list of `Entry`.

    Raises:
        ValueError: if the model is not of an architecture that exists in PyTorch.
    """
    base = architecture_of(model)
    if base is None:
        raise ValueError(
            "Only a network of `aib_tf.models.build` has names in PyTorch. "
            f"Received: model.name={getattr(model, 'name', model)!r}"
        )
    if base == "pay_attention":
        return base, [Entry((name,), layer) for name, layer in pytorch_layers(model)]
    table = {"vgg": _vgg, "vgg16_cub": _vgg16, "wide_resnet": _wide_resnet, "wrn_50_2_cub": _wide_resnet_50}[base]
    aib = model.bottleneck is not None
    found = []
    for part, name, *pytorch_names in table(model, aib):
        found.append(Entry(tuple(pytorch_names), getattr(model, part).get_layer(name)))
    if aib:
        found.append(Entry(("att_module_std.0",), model.attention._stddev_scores))
        found.append(Entry((_STATISTICS[base],), model.bottleneck._dense))
    if model.attention is not None and not isinstance(model.attention.head, keras.Model):
        found.append(Entry(("att_module_mu.0",), model.attention._scores))
    elif model.attention is not None:
        for name, *pytorch_names in _HEADS[base](model):
            found.append(Entry(tuple(pytorch_names), model.attention.head.get_layer(name)))
    if model.quantizer is not None:
        found.append(Entry(("emb",), model.quantizer))
    return base, found


# The dense layer that gives mean and deviation of the latent stands at the end of `encode`.
_STATISTICS = {"vgg": "encode.8", "vgg16_cub": "encode.2", "wide_resnet": "encode.5", "wrn_50_2_cub": "encode.3"}


def _vgg(model, aib):
    for part, prefix, block, count in (
        ("features", "features.0.op", "block1", 2),
        ("features", "features.1.op", "block2", 2),
        ("features", "features.2.op", "block3", 3),
        ("encoder", "encode.0.op", "block4", 3),
        ("encoder", "encode.2.op", "block5", 3),
    ):
        for number in range(count):
            yield part, f"{block}_conv{number + 1}", f"{prefix}.{3 * number}"
            yield part, f"{block}_norm{number + 1}", f"{prefix}.{3 * number + 1}"
    for block, place in (("block6", 0), ("block7", 4)):
        yield "encoder", f"{block}_conv1", f"encode.4.op.{place}"
        yield "encoder", f"{block}_norm1", f"encode.4.op.{place + 1}"
    yield "encoder", "global", "encode.5"
    yield from _hidden_decoder()


def _vgg16(model, aib):
    place = 0
    for block, count in enumerate((2, 2, 3, 3, 3), start=1):
        for number in range(1, count + 1):
            yield "features", f"block{block}_conv{number}", f"features.{place}"
            place += 2  # a ReLU between
        place += 1  # a pooling
    yield from _hidden_decoder()


def _wide_resnet(model, aib):
    yield "features", "conv1", "conv1"
    yield from (("features", *names) for names in _groups(model.features, "group1", "block1"))
    yield from (("features", *names) for names in _groups(model.features, "group2", "block2"))
    again = ("encode.0", "encode.1") if aib else (None, None)
    yield from (("encoder", *names) for names in _groups(model.encoder, "group3", "block3", again[0]))
    yield "encoder", "norm", *filter(None, ("bn1", again[1]))
    yield "decoder", "logits", "decode.1" if aib else "fc"


def _wide_resnet_head(model):
    yield from _groups(model.attention.head, "group3", "att_block3", "att_module_mu.0")
    yield "norm1", "bn_att", "att_module_mu.1"
    yield "conv2", "att_conv", "att_module_mu.2"
    yield "norm2", "bn_att2", "att_module_mu.3"
    yield "conv3", "att_conv3", "att_module_mu.5"
    yield "norm3", "bn_att3", "att_module_mu.6"


def _wide_resnet_50(model, aib):
    yield "features", "conv1", "conv1"
    yield "features", "norm1", "bn1"
    for stage in (1, 2, 3):
        yield from (("features", *names) for names in _stage(model.features, f"stage{stage}", f"layer{stage}"))
    again = ("encode.0",) if aib else ()
    yield from (("encoder", *names) for names in _stage(model.encoder, "stage4", "layer4", *again))
    if aib:
        yield from _hidden_decoder()
    else:
        yield "decoder", "logits", "fc"


def _wide_resnet_50_head(model):
    yield from _stage(model.attention.head, "stage4", "att_layer4", "att_module_mu.0")
    yield "scores", "att_module_mu.1"


def _vgg16_head(model):
    for number in (1, 2, 3):
        yield f"conv{number}", f"att_module_mu.{2 * number - 2}"
    yield "scores", "att_module_mu.6"


_HEADS = {"vgg16_cub": _vgg16_head, "wide_resnet": _wide_resnet_head, "wrn_50_2_cub": _wide_resnet_50_head}


def _hidden_decoder():
    yield "decoder", "hidden", "decode.0"
    yield "decoder", "logits", "decode.2"


def _groups(network, group, *prefixes):
    """The layers of a group of WideResNet blocks."""
    suffixes = {"norm1": "bn1", "conv1": "conv1", "norm2": "bn2", "conv2": "conv2", "shortcut": "convShortcut"}
    yield from _blocks(network, group, [f"{prefix}.layer" for prefix in prefixes if prefix], suffixes)


def _stage(network, stage, *prefixes):
    """The layers of a stage of bottlenecks."""
    suffixes = {f"{kind}{n}": f"{theirs}{n}" for n in (1, 2, 3) for kind, theirs in (("conv", "conv"), ("norm", "bn"))}
    suffixes |= {"shortcut": "downsample.0", "shortcut_norm": "downsample.1"}
    yield from _blocks(network, stage, prefixes, suffixes)


def _blocks(network, group, prefixes, suffixes):
    """Yields (layer name, PyTorch names) of the blocks of a group, for the layers that its blocks have."""
    names = {layer.name for layer in network.layers}
    block = 1
    while f"{group}_block{block}_conv1" in names:
        for ours, theirs in suffixes.items():
            name = f"{group}_block{block}_{ours}"
            if name in names:
                yield name, *(f"{prefix}.{block - 1}.{theirs}" for prefix in prefixes)
        block += 1


@dataclasses.dataclass(frozen=True)
class Likeness:
    """The model that a state dict seems to belong to, as arguments of `aib_tf.models.build`."""

    name: str
    channels: int
    classes: int
    overrides: dict

    def __str__(self):
        rest = "".join(f", {name}={value!r}" for name, value in self.overrides.items())
        return f'build("{self.name}", (height, width, {self.channels}), classes={self.classes}{rest})'


def looks_like(state):
    """Says which model a state dict seems to belong to, from its names and shapes.

    Args:
        state: dict of PyTorch names, without "module.", -> arrays.

    Returns:
        A `Likeness`, or None. What leaves no trace in the weights is not in it: dropout, and how vgg_att2 and vgg_att3
        normalise scores and whether they attend before or after pooling.
    """
    shapes = {name: tuple(getattr(array, "shape", ())) for name, array in state.items()}
    try:
        return _likeness(shapes)
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        return None  # half of a network that is known


def _likeness(shapes):
    variant = "_aib" * ("att_module_std.0.weight" in shapes) + "_qt" * ("emb.weight" in shapes)
    overrides = {}
    widths = (64, 128, 256, 512)
    if "conv_block1.op.0.weight" in shapes:
        # The projection is there for the first depth alone.
        name, variant = f"vgg_att{3 if 'projector.op.weight' in shapes else 2}", ""
        layers = [f"conv_block{number}.op.0" for number in (1, 2, 3, 4)]
        last = "classify" if "classify.weight" in shapes else "classify3"
        overrides = {
            "attention": "pc" if "attn3.op.weight" in shapes else "dp",
            "combine": "concat" if last == "classify" else "independent",
        }
    elif "features.0.op.0.weight" in shapes:
        name, base, last = "vgg", "vgg", "decode.2"
        layers = ["features.0.op.0", "features.1.op.0", "features.2.op.0", "encode.0.op.0"]
    elif "features.28.weight" in shapes:
        name, base, last = "vgg16_cub", "vgg16_cub", "decode.2"
        layers = ["features.0", "features.5", "features.10", "features.17"]
    elif "layer4.0.conv1.weight" in shapes:
        name, base, last = "wrn_50_2_cub", "wrn_50_2_cub", "decode.2" if variant else "fc"
        layers = ["conv1", *(f"layer{number}.0.conv1" for number in (1, 2, 3, 4)), "layer4.0.conv3"]
        widths = (64, 128, 256, 512, 1024, 2048)
    elif "block1.layer.0.conv1.weight" in shapes:
        blocks = sum(1 for key in shapes if re.fullmatch(r"block1\.layer\.\d+\.conv1\.weight", key))
        layers = ["conv1", *(f"block{number}.layer.0.conv1" for number in (1, 2, 3))]
        widening = _widening([shapes[f"{layer}.weight"][0] for layer in layers])
        widths = (16, 16 * widening, 32 * widening, 64 * widening)
        name, base, last = f"wrn_{6 * blocks + 4}_{widening}", "wide_resnet", "decode.1" if variant else "fc"
    else:
        return None
    width = _width([shapes[f"{layer}.weight"][0] for layer in layers], widths)
    if width != 1.0:
        overrides["width"] = width
    if variant:
        overrides["latent_dim"] = shapes[f"{_STATISTICS[base]}.weight"][0] // 2
    elif "decode.0.weight" in shapes:
        overrides["latent_dim"] = shapes["decode.0.weight"][0]
    if "emb.weight" in shapes:
        overrides["num_anchors"] = shapes["emb.weight"][1]
    return Likeness(name + variant, shapes[f"{layers[0]}.weight"][1], shapes[f"{last}.weight"][0], overrides)


def _width(found, full):
    """A width at which numbers of channels become those that were found; ValueError if there is none."""
    lowest = max([(count - 0.5) / whole for count, whole in zip(found, full, strict=True) if count > 1], default=0.0)
    highest = min((count + 0.5) / whole for count, whole in zip(found, full, strict=True))
    if lowest > highest:
        raise ValueError(f"No width makes {full} channels {found}")
    return 1.0 if lowest <= 1.0 <= highest else (lowest + highest) / 2


def _widening(found):
    """The widening factor of a WideResNet, of any width, nearest to what its first two layers say."""
    ratio = found[1] / found[0]
    for widening in sorted(range(1, int(2 * ratio) + 3), key=lambda factor: abs(factor - ratio)):
        try:
            _width(found, (16, 16 * widening, 32 * widening, 64 * widening))
        except ValueError:
            continue
        return widening
    raise ValueError(f"No WideResNet has {found} channels")
