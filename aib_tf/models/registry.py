"""Models by name."""

import dataclasses
import difflib

import keras
import numpy as np

from aib_tf.layers import AnchorQuantizer, GaussianBottleneck, VariationalSpatialAttention
from aib_tf.losses import check_kl_form
from aib_tf.models.aib import AIBClassifier
from aib_tf.models.vgg import VGG
from aib_tf.ops.nearest_anchor import MAX_ANCHORS
from aib_tf.validation import check_count, check_seed, check_weight


@dataclasses.dataclass(frozen=True)
class _Entry:
    backbone: type
    attention: bool
    quantizer: bool


_ENTRIES = {
    "vgg": _Entry(VGG, attention=False, quantizer=False),
    "vgg_aib": _Entry(VGG, attention=True, quantizer=False),
    "vgg_aib_qt": _Entry(VGG, attention=True, quantizer=True),
}


def names():
    """Names that `build` knows.

    Returns:
        Sorted tuple of strings.
    """
    return tuple(sorted(_ENTRIES))


def build(name, input_shape, classes, **overrides):
    """Builds a model by name.

    Args:
        name: "vgg" (the plain backbone), "vgg_aib" (attention and bottleneck) or "vgg_aib_qt" (quantized attention).
        input_shape: (H, W, channels) of the images.
        classes: number of classes, at least 2.
        **overrides: what differs from the paper's network. A plain backbone takes those of them that it has a use
            for, and ignores the rest, so that one set serves for a comparison.

            - latent_dim (256): K, latent dimensions.
            - num_anchors (20): Q, anchors of the quantizer.
            - width (1.0): factor for all numbers of channels.
            - beta (0.01), kl ("closed_form"), kl_weight (1.0): see `GaussianBottleneck`.
            - codebook_weight (0.4), commitment_weight (0.1): see `AnchorQuantizer`.
            - seed (None): integer seed of the initial weights and of the noise.

    Returns:
        A built `AIBClassifier`, not compiled.

    Raises:
        ValueError: for an unknown name, an impossible value, or images too small for the backbone.
        TypeError: for an unknown override.

    Example:
        >>> model = aib_tf.models.build("vgg_aib_qt", (32, 32, 3), classes=10, width=0.25)
        >>> model.compile("adam", loss=aib_tf.losses.CrossEntropyBits(), metrics=["accuracy"])
    """
    if name not in _ENTRIES:
        raise ValueError(f"There is no model of that name; there are {', '.join(names())}. Received: name={name!r}")
    entry = _ENTRIES[name]
    options = _Overrides.of(overrides)
    input_shape = _image_shape(input_shape)
    check_count("classes", classes, minimum=2)
    seeds = _Seeds(options.seed)
    backbone = entry.backbone(input_shape, classes, options.latent_dim, options.width, lambda: _kernel(seeds.next()))
    features = backbone.features()
    encoder = backbone.encoder(features.output_shape[1:])
    attention = quantizer = bottleneck = None
    if entry.attention:
        attention = VariationalSpatialAttention(seed=seeds.next(), name="attention")
        bottleneck = GaussianBottleneck(
            options.latent_dim,
            beta=options.beta,
            kl=options.kl,
            kl_weight=options.kl_weight,
            seed=seeds.next(),
            kernel_initializer=_kernel(seeds.next()),
            name="bottleneck",
        )
    if entry.quantizer:
        quantizer = AnchorQuantizer(
            options.num_anchors, options.codebook_weight, options.commitment_weight, name="quantizer"
        )
    decoder = backbone.decoder(options.latent_dim if bottleneck else encoder.output_shape[-1])
    return AIBClassifier(features, encoder, decoder, attention, quantizer, bottleneck, name=name)


@dataclasses.dataclass(frozen=True)
class _Overrides:
    latent_dim: int = 256
    num_anchors: int = 20
    width: float = 1.0
    beta: float = 0.01
    kl: str = "closed_form"
    kl_weight: float = 1.0
    codebook_weight: float = 0.4
    commitment_weight: float = 0.1
    seed: int | None = None

    def __post_init__(self):
        check_count("latent_dim", self.latent_dim)
        check_count("num_anchors", self.num_anchors, maximum=MAX_ANCHORS)
        check_weight("width", self.width, positive=True)
        for name in ("beta", "kl_weight", "codebook_weight", "commitment_weight"):
            check_weight(name, getattr(self, name))
        check_kl_form(self.kl)
        check_seed(self.seed)

    @classmethod
    def of(cls, overrides):
        known = [field.name for field in dataclasses.fields(cls)]
        for name in overrides:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise TypeError(
                    f"The overrides of a model are {', '.join(known)}.{hint} Received: {name}={overrides[name]!r}"
                )
        return cls(**overrides)


class _Seeds:
    """A different seed for each layer, all from one; None stays None."""

    def __init__(self, seed):
        self._sequence = None if seed is None else np.random.default_rng(seed)

    def next(self):
        return None if self._sequence is None else int(self._sequence.integers(2**31 - 1))


def _kernel(seed):
    """Xavier uniform with gain sqrt(2), as in the released VGG code."""
    return keras.initializers.VarianceScaling(scale=2.0, mode="fan_avg", distribution="uniform", seed=seed)


def _image_shape(input_shape):
    if not isinstance(input_shape, (tuple, list)) or len(input_shape) != 3:
        raise ValueError(f"`input_shape` must be (height, width, channels). Received: input_shape={input_shape!r}")
    return tuple(check_count("input_shape", size) for size in input_shape)
