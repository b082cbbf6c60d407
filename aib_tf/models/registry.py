"""Models by name."""

import dataclasses
import functools
import re
from collections.abc import Callable

import keras

from aib_tf.models.aib import AIBClassifier
from aib_tf.models.blocks import Blocks
from aib_tf.models.overrides import Overrides, Seeds
from aib_tf.models.pay_attention import build_pay_attention
from aib_tf.models.resnet import WideResNet, WideResNet50
from aib_tf.models.vgg import CBAMVGG, VGG, VGG16
from aib_tf.validation import check_count

_WIDE_RESNET = re.compile(r"wrn_([1-9][0-9]*)_([1-9][0-9]*)")
_VARIANTS = ("", "_aib", "_aib_qt")


def _xavier(seed):
    return keras.initializers.VarianceScaling(scale=2.0, mode="fan_avg", distribution="uniform", seed=seed)


def _he_fan_out(seed):
    return keras.initializers.VarianceScaling(scale=2.0, mode="fan_out", distribution="untruncated_normal", seed=seed)


def _pytorch_linear(seed):
    return keras.initializers.VarianceScaling(scale=1 / 3, mode="fan_in", distribution="uniform", seed=seed)


def _uniform_scale(seed):
    return keras.initializers.RandomUniform(0.0, 1.0, seed=seed)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A backbone as the AIB paper's code sets it up.

    Attributes:
        backbone: makes the `Backbone`.
        latent_dim: K unless an override says otherwise.
        kernel, linear: how kernels start; see `Blocks`.
        released_scale: how the scales of batch normalisation start in the released code; None: at one.
        variants: what may follow its name.
    """

    backbone: Callable
    latent_dim: int
    kernel: Callable
    linear: Callable | None = None
    released_scale: Callable | None = None
    variants: tuple[str, ...] = _VARIANTS


_ARCHITECTURES = {
    "vgg": Architecture(VGG, 256, _xavier, released_scale=_uniform_scale),
    "vgg_cbam": Architecture(CBAMVGG, 256, _xavier, released_scale=_uniform_scale, variants=("",)),
    "vgg16_cub": Architecture(VGG16, 256, _he_fan_out, _pytorch_linear),
    "wrn_50_2_cub": Architecture(WideResNet50, 256, _he_fan_out, _pytorch_linear),
}
# Learn To Pay Attention, by the number of depths that it attends to.
_PAY_ATTENTION = {"vgg_att2": 2, "vgg_att3": 3}
_WIDE_RESNET_ARCHITECTURE = Architecture(WideResNet, 512, _he_fan_out, _pytorch_linear)


def names():
    """Names that `build` knows.

    A WideResNet can have any depth 6 n + 4 and any widening factor, such as "wrn_16_4_aib"; the paper's is listed.

    Returns:
        Sorted tuple of strings.
    """
    known = {**_ARCHITECTURES, "wrn_28_10": _WIDE_RESNET_ARCHITECTURE}
    aib = [base + variant for base, architecture in known.items() for variant in architecture.variants]
    return tuple(sorted([*aib, *_PAY_ATTENTION]))


def build(name, input_shape, classes, **overrides):
    """Builds a model by name.

    Each backbone is there plain, as `_aib` with attention and bottleneck, and as `_aib_qt` with quantized attention:

    - vgg: for images of 32x32 pixels and more.
    - wrn_<depth>_<widening>, such as wrn_28_10: WideResNet, for the same.
    - vgg16_cub, wrn_50_2_cub: VGG-16 and WideResNet-50-2, for images of 224x224 pixels; other sizes work.

    vgg_att2 and vgg_att3 are the networks of "Learn To Pay Attention" with two and three depths. vgg_cbam is the plain
    vgg with CBAM (Woo et al., 2018), a deterministic attention, to compare with.

    Args:
        name: one of `names()`, or that of a WideResNet of another size.
        input_shape: (H, W, channels) of the images.
        classes: number of classes, at least 2.
        **overrides: what differs from the paper's network. A model takes those of them that it has a use for, and
            ignores the rest, so that one set serves for a comparison.

            - latent_dim (256; 512 in a WideResNet for small images): K, latent dimensions.
            - num_anchors (20): Q, anchors of the quantizer.
            - width (1.0): factor for all numbers of channels.
            - dropout (0.0): rate of dropout between the convolutions of a WideResNet's blocks; 0.3 in the recipe.
            - initializers ("default"): "released" starts the attention head of a VGG at random, and its batch
              normalisation with scales uniform in [0, 1], as the released code does.
            - beta (0.01), kl ("closed_form"), kl_weight (1.0): see `GaussianBottleneck`.
            - codebook_weight (0.4), commitment_weight (0.1): see `AnchorQuantizer`.
            - attention ("pc" or "dp"), combine ("concat" or "independent"), position ("before" or "after"), normalize
              ("softmax" or "sigmoid"), of vgg_att2 and vgg_att3: see `PayAttention` and `PayAttentionClassifier`;
              `position` says whether features are taken before or after the pooling of their block.
            - synchronized_batch_norm (False): under `tf.distribute`, batch normalisation by the statistics of the whole
              batch instead of each replica's share.
            - seed (None): integer seed of the initial weights and of the noise.

    Returns:
        A built `AIBClassifier`, or `PayAttentionClassifier`, not compiled.

    Raises:
        ValueError: for an unknown name, an impossible value, or images too small for the backbone.
        TypeError: for an unknown override.

    Example:
        >>> model = aib_tf.models.build("vgg_aib_qt", (32, 32, 3), classes=10, width=0.25)
        >>> model.compile("adam", loss=aib_tf.losses.CrossEntropyBits(), metrics=["accuracy"])
    """
    base, architecture, aib, quantized = look_up(name)
    options = Overrides.of(overrides)
    input_shape = _image_shape(input_shape)
    check_count("classes", classes, minimum=2)
    seeds = Seeds(options.seed)
    released = options.initializers == "released"
    blocks = Blocks(
        options.width,
        architecture.kernel,
        architecture.linear,
        architecture.released_scale if released else None,
        seeds.next,
        options.synchronized_batch_norm,
    )
    if base in _PAY_ATTENTION:
        return build_pay_attention(
            _PAY_ATTENTION[base],
            input_shape,
            classes,
            blocks,
            options.attention,
            options.combine,
            options.position,
            options.normalize,
            name=name,
        )
    latent_dim = options.latent_dim or architecture.latent_dim
    backbone = architecture.backbone(
        input_shape, classes, latent_dim, blocks, dropout=options.dropout, released_head=released
    )
    features = backbone.features()
    encoder = backbone.encoder(features.output_shape[1:])
    parts = {}
    if aib:
        head = functools.partial(backbone.attention_head, features.output_shape[1:], quantized)
        parts = options.variational_parts(latent_dim, quantized, seeds, blocks, head)
    decoder = backbone.decoder(latent_dim if aib else encoder.output_shape[-1], plain=not aib)
    return AIBClassifier(features, encoder, decoder, **parts, name=name)


def look_up(name):
    """Finds what a name stands for.

    Args:
        name: as for `build`.

    Returns:
        The name of the plain backbone, its `Architecture`, whether there are attention and bottleneck, and whether
        attention is quantized.

    Raises:
        ValueError: for an unknown name.
    """
    for variant in reversed(_VARIANTS if isinstance(name, str) else ()):
        base = name.removesuffix(variant)
        found = _WIDE_RESNET.fullmatch(base)
        if found:
            architecture = dataclasses.replace(
                _WIDE_RESNET_ARCHITECTURE, backbone=functools.partial(WideResNet, *map(int, found.groups()))
            )
        else:
            architecture = _ARCHITECTURES["vgg"] if name in _PAY_ATTENTION else _ARCHITECTURES.get(base)
        if architecture and base + variant == name and variant in architecture.variants:
            return base, architecture, bool(variant), variant == "_aib_qt"
    raise ValueError(
        f"There is no model of that name; there are {', '.join(names())}, and WideResNets of other sizes. "
        f"Received: name={name!r}"
    )


def _image_shape(input_shape):
    if not isinstance(input_shape, (tuple, list)) or len(input_shape) != 3:
        raise ValueError(f"`input_shape` must be (height, width, channels). Received: input_shape={input_shape!r}")
    return tuple(check_count("input_shape", size) for size in input_shape)
