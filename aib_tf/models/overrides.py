"""What differs from a paper's network: the overrides of `build` and `attach_attention`."""

import dataclasses
import difflib

import numpy as np

from aib_tf.layers import AnchorQuantizer, GaussianBottleneck, VariationalSpatialAttention
from aib_tf.layers.pay_attention import COMPATIBILITIES, NORMALIZATIONS
from aib_tf.losses import check_kl_form
from aib_tf.models.pay_attention import COMBINATIONS, POSITIONS
from aib_tf.ops.nearest_anchor import MAX_ANCHORS
from aib_tf.validation import check_choice, check_count, check_rate, check_seed, check_weight

INITIALIZERS = ("default", "released")


@dataclasses.dataclass(frozen=True)
class Overrides:
    """The overrides of `build`, which documents them."""

    latent_dim: int | None = None
    num_anchors: int = 20
    width: float = 1.0
    dropout: float = 0.0
    initializers: str = "default"
    beta: float = 0.01
    kl: str = "closed_form"
    kl_weight: float = 1.0
    codebook_weight: float = 0.4
    commitment_weight: float = 0.1
    attention: str = "pc"
    combine: str = "concat"
    position: str = "before"
    normalize: str = "softmax"
    synchronized_batch_norm: bool = False
    seed: int | None = None

    def __post_init__(self):
        if self.latent_dim is not None:
            check_count("latent_dim", self.latent_dim)
        check_count("num_anchors", self.num_anchors, maximum=MAX_ANCHORS)
        check_weight("width", self.width, positive=True)
        for name in ("beta", "kl_weight", "codebook_weight", "commitment_weight"):
            check_weight(name, getattr(self, name))
        check_rate("dropout", self.dropout)
        check_choice("initializers", self.initializers, INITIALIZERS)
        check_kl_form(self.kl)
        check_choice("attention", self.attention, COMPATIBILITIES)
        check_choice("combine", self.combine, COMBINATIONS)
        check_choice("position", self.position, POSITIONS)
        check_choice("normalize", self.normalize, NORMALIZATIONS)
        check_seed(self.seed)

    @classmethod
    def of(cls, overrides, known=None):
        """Makes them from a dict; TypeError for one that is not in `known`, by default all."""
        known = known or [field.name for field in dataclasses.fields(cls)]
        for name in overrides:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise TypeError(
                    f"The overrides of a model are {', '.join(known)}.{hint} Received: {name}={overrides[name]!r}"
                )
        return cls(**overrides)

    def variational_parts(self, latent_dim, quantized, seeds, blocks, head):
        """Makes what distinguishes an AIB model from a plain one.

        Args:
            latent_dim: K.
            quantized: whether there is a quantizer.
            seeds: the model's `Seeds`.
            blocks: the model's `Blocks`.
            head: called without arguments, makes the attention head, or None for the layer's own.

        Returns:
            Dict with the arguments attention, bottleneck and quantizer of `AIBClassifier`.
        """
        # The order in which seeds are taken is part of what makes a run repeatable.
        attention_seed = seeds.next()
        attention = VariationalSpatialAttention(head(), seed=attention_seed, name="attention")
        bottleneck = GaussianBottleneck(
            latent_dim,
            beta=self.beta,
            kl=self.kl,
            kl_weight=self.kl_weight,
            seed=seeds.next(),
            kernel_initializer=blocks.linear_initializer(),
            name="bottleneck",
        )
        quantizer = None
        if quantized:
            quantizer = AnchorQuantizer(
                self.num_anchors, self.codebook_weight, self.commitment_weight, name="quantizer"
            )
        return {"attention": attention, "quantizer": quantizer, "bottleneck": bottleneck}


class Seeds:
    """A different seed for each layer, all from one; None stays None."""

    def __init__(self, seed):
        self._sequence = None if seed is None else np.random.default_rng(seed)

    def next(self):
        return None if self._sequence is None else int(self._sequence.integers(2**31 - 1))
