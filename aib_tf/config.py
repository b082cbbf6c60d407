"""What a training run is made of, as frozen dataclasses that are validated when made.

The fields are the flags of `scripts/train.py`; their help stands here, once. `Config.to_dict` and `Config.from_dict`
carry a run through a JSON file.
"""

import dataclasses
import secrets

from aib_tf.layers.pay_attention import COMPATIBILITIES, NORMALIZATIONS
from aib_tf.losses import ATTENTION_LOSSES, check_attention_loss, check_kl_form
from aib_tf.models.overrides import INITIALIZERS
from aib_tf.models.pay_attention import COMBINATIONS, POSITIONS
from aib_tf.models.registry import look_up
from aib_tf.ops.nearest_anchor import MAX_ANCHORS
from aib_tf.validation import check_choice, check_count, check_rate, check_weight

OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("constant", "cosine", "steps")
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16", "float64")
JIT_COMPILE = ("auto", "true", "false")
BAD_EXAMPLES = ("error", "skip")
SELECT_ON = ("validation", "test")
STRATEGIES = ("auto", "one_device", "mirrored", "multi_worker")
# By what the learning rate is multiplied on n devices.
LEARNING_RATE_SCALINGS = {"none": lambda n: 1.0, "linear": lambda n: float(n), "sqrt": lambda n: n**0.5}

# What `objective` sets unless a flag says otherwise: the formula of the paper, or what the released code computes.
OBJECTIVES = {
    "paper": {
        "kl": "closed_form",
        "kl_weight": 1.0,
        "beta_warmup_epochs": 1.0,
        "anchor_learning_rate_ratio": 1e-4,
        "anchor_weight_decay": False,
        "initializers": "default",
        "select_on": "validation",
        "samples": 0,
        "seed": 0,
    },
    "reference": {
        "kl": "reference",
        "kl_weight": 0.5,
        "beta_warmup_epochs": 0.0,
        "anchor_learning_rate_ratio": 1e-4,
        "anchor_weight_decay": True,
        "initializers": "released",
        "select_on": "test",
        "samples": 4,
        "seed": None,  # drawn
    },
}
# Where the released code of other networks than its VGG for small images differs.
_REFERENCE_OF = {
    "wrn_": {"kl_weight": 1.0},
    "vgg_att": {"samples": 0},
    # Its anchors stay at linspace.
    "vgg16_cub": {"kl_weight": 1.0, "samples": 12, "anchor_learning_rate_ratio": 0.0, "anchor_weight_decay": False},
    "wrn_50_2_cub": {"kl_weight": 1.0, "samples": 12, "anchor_learning_rate_ratio": 0.0, "anchor_weight_decay": False},
}


def _setting(default, text, flag=None):
    """A field with its help text, and the name of its flag where that is not the field's own."""
    return dataclasses.field(default=default, metadata={"help": text, "flag": flag})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which network, and how large."""

    name: str = _setting("vgg_aib_qt", "Name of the model.", flag="model")
    width: float = _setting(1.0, "Factor for all numbers of channels; 1 is the network of the paper.")
    latent_dim: int | None = _setting(
        None,
        "K, dimensions of the latent; by default the released code's: 512 in a WideResNet for small images, else 256.",
    )
    num_anchors: int = _setting(20, "Q, anchors of the quantizer.")
    dropout: float = _setting(0.0, "Rate of dropout between the convolutions of a WideResNet's blocks.")
    initializers: str | None = _setting(
        None, f"How weights start, one of {', '.join(INITIALIZERS)} (a VGG's attention head and normalisation differ)."
    )
    weights: str | None = _setting(
        None, "ImageNet weights for the backbone of a CUB model: imagenet fetches torchvision's, or a path to the file."
    )
    attention: str = _setting("pc", f"Compatibility of vgg_att2 and vgg_att3, one of {', '.join(COMPATIBILITIES)}.")
    combine: str = _setting("concat", f"How their depths are combined, one of {', '.join(COMBINATIONS)}.")
    position: str = _setting("before", f"Whether they attend before or after pooling, one of {', '.join(POSITIONS)}.")
    normalize: str = _setting("softmax", f"How their scores are normalised, one of {', '.join(NORMALIZATIONS)}.")
    synchronized_batch_norm: bool = _setting(
        False, "On several devices: normalise by the statistics of the whole batch, not of each device's share."
    )

    def __post_init__(self):
        check_weight("width", self.width, positive=True)
        if self.latent_dim is not None:
            check_count("latent_dim", self.latent_dim)
        check_count("num_anchors", self.num_anchors, maximum=MAX_ANCHORS)
        check_rate("dropout", self.dropout)
        if self.initializers is not None:
            check_choice("initializers", self.initializers, INITIALIZERS)
        check_choice("attention", self.attention, COMPATIBILITIES)
        check_choice("combine", self.combine, COMBINATIONS)
        check_choice("position", self.position, POSITIONS)
        check_choice("normalize", self.normalize, NORMALIZATIONS)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The loss: CE + beta * KL + codebook + commitment, all in bits, and what attention is trained towards, if any."""

    objective: str = _setting(
        "paper",
        "paper (its formula) or reference (what the released code computes): the default of kl, kl_weight, "
        "beta_warmup_epochs, anchor_learning_rate_ratio, anchor_weight_decay, initializers, select_on, samples, seed.",
    )
    beta: float = _setting(0.01, "Weight of the rate.")
    beta_warmup_epochs: float | None = _setting(None, "Epochs in which the weight of the rate grows linearly from 0.")
    kl: str | None = _setting(None, "closed_form or reference.")
    kl_weight: float | None = _setting(None, "A second factor of the rate.")
    codebook_weight: float = _setting(0.4, "Weight of the codebook loss.")
    commitment_weight: float = _setting(0.1, "Weight of the commitment loss.")
    attention_supervision: str = _setting(
        "none",
        "Loss that trains attention towards the masks of the objects, or else their boxes, one of none, "
        f"{', '.join(ATTENTION_LOSSES)}.",
    )
    attention_supervision_weight: float = _setting(1.0, "Weight of that loss; 0 measures it alone.")

    def __post_init__(self):
        check_choice("objective", self.objective, OBJECTIVES)
        for name in ("beta", "codebook_weight", "commitment_weight", "attention_supervision_weight"):
            check_weight(name, getattr(self, name))
        check_attention_loss("attention_supervision", self.attention_supervision, ("none",))
        if self.beta_warmup_epochs is not None:
            check_weight("beta_warmup_epochs", self.beta_warmup_epochs)
        if self.kl is not None:
            check_kl_form(self.kl)
        if self.kl_weight is not None:
            check_weight("kl_weight", self.kl_weight)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are fed."""

    name: str = _setting(
        "cluttered_digits",
        "Name of the data set; image_folder/FOLDER is a folder of pictures in data_dir.",
        flag="dataset",
    )
    data_dir: str | None = _setting(None, "Folder of prepared data sets; by default that of TensorFlow Datasets.")
    bad_examples: str = _setting(
        "error",
        f"One of {', '.join(BAD_EXAMPLES)}: stop at an example that cannot be decoded, or has another label, size or "
        "number of channels than the data set; or leave it out and say how many there were.",
    )
    batch_size: int = _setting(32, "Images in a training step, on all devices together.")
    augment: bool = _setting(True, "Crop and flip training images at random, as far as the data set allows.")

    def __post_init__(self):
        check_choice("bad_examples", self.bad_examples, BAD_EXAMPLES)
        check_count("batch_size", self.batch_size)


@dataclasses.dataclass(frozen=True)
class OptimizationConfig:
    """Optimizer, learning rate and length."""

    optimizer: str = _setting("adam", f"One of {', '.join(OPTIMIZERS)}; sgd has momentum 0.9.")
    learning_rate: float = _setting(1e-3, "Learning rate at its highest.")
    learning_rate_scaling: str = _setting(
        "none",
        f"What the learning rates are multiplied by on n devices, one of {', '.join(LEARNING_RATE_SCALINGS)}: 1, n or "
        "the root of n.",
    )
    schedule: str = _setting("cosine", f"One of {', '.join(SCHEDULES)}: cosine falls to 0; steps obeys decay_*.")
    decay_factor: float = _setting(0.5, "With schedule=steps: what the learning rate is multiplied by.")
    decay_every: int = _setting(0, "With schedule=steps: after each so many epochs.")
    decay_at: tuple[int, ...] = _setting((), "With schedule=steps: after these numbers of epochs.")
    learning_rate_warmup_epochs: float = _setting(
        0.0, "With schedule=cosine: epochs in which the learning rate grows linearly to its highest."
    )
    warmup_learning_rates: tuple[float, ...] = _setting((), "Learning rates of the first epochs, one each.")
    weight_decay: float = _setting(0.0, "L2 penalty, added to the gradient as PyTorch does.")
    decoupled_weight_decay: bool = _setting(
        False, "Shrink the weights by weight_decay times the learning rate apart from the gradient, as in AdamW."
    )
    adam_beta_1: float = _setting(0.9, "With optimizer=adam: decay rate of the mean of the gradients.")
    ema_momentum: float = _setting(
        0.0, "Momentum of a moving average of the weights, which then is what is evaluated and kept; 0 for none."
    )
    anchor_learning_rate_ratio: float | None = _setting(None, "Learning rate of the anchors, relative to the others'.")
    anchor_weight_decay: bool | None = _setting(None, "Whether weight_decay applies to the anchors.")
    epochs: int = _setting(4, "Passes over the training images.")

    def __post_init__(self):
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("learning_rate_scaling", self.learning_rate_scaling, LEARNING_RATE_SCALINGS)
        check_count("epochs", self.epochs)
        check_count("decay_every", self.decay_every, minimum=0)
        check_weight("learning_rate", self.learning_rate, positive=True)
        check_weight("decay_factor", self.decay_factor, positive=True)
        check_weight("weight_decay", self.weight_decay)
        check_rate("adam_beta_1", self.adam_beta_1)
        check_rate("ema_momentum", self.ema_momentum)
        for epoch in self.decay_at:
            check_count("decay_at", epoch)
        for rate in self.warmup_learning_rates:
            check_weight("warmup_learning_rates", rate, positive=True)
        if self.anchor_learning_rate_ratio is not None:
            check_weight("anchor_learning_rate_ratio", self.anchor_learning_rate_ratio)
        check_weight("learning_rate_warmup_epochs", self.learning_rate_warmup_epochs)
        if self.learning_rate_warmup_epochs and (
            self.schedule != "cosine" or self.learning_rate_warmup_epochs >= self.epochs
        ):
            raise ValueError(
                "`learning_rate_warmup_epochs` goes with schedule=cosine, and must be less than `epochs`; other "
                "schedules have warmup_learning_rates. Received: "
                f"learning_rate_warmup_epochs={self.learning_rate_warmup_epochs}, schedule={self.schedule}, "
                f"epochs={self.epochs}"
            )
        if self.warmup_learning_rates and self.schedule == "cosine":
            raise ValueError(
                "`warmup_learning_rates` goes with schedule=constant or schedule=steps; with cosine, use "
                "learning_rate_warmup_epochs. "
                f"Received: warmup_learning_rates={self.warmup_learning_rates}, schedule=cosine"
            )
        decays = bool(self.decay_at) + bool(self.decay_every)
        if decays != (self.schedule == "steps"):
            raise ValueError(
                "`decay_every` or `decay_at`, one of them, goes with schedule=steps and with no other. Received: "
                f"schedule={self.schedule}, decay_every={self.decay_every}, decay_at={self.decay_at}"
            )


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """Where and how a run is computed. None of it is part of what the run is: it may change when a run is continued."""

    strategy: str = _setting(
        "auto",
        f"One of {', '.join(STRATEGIES)}: on the first device, on all GPUs of this machine, or on all machines that "
        "TF_CONFIG, Slurm or Kubernetes name; auto takes what is there.",
    )
    steps_per_execution: int = _setting(
        1, "Training steps that TensorFlow takes at a time, before anything is logged, saved or stopped."
    )
    checkpoints_kept: int = _setting(2, "Checkpoints that are kept; older ones are removed.")
    checkpoint_minutes: float = _setting(10.0, "Minutes between checkpoints within an epoch.")
    profile: bool = _setting(False, "Write a trace of some training steps for TensorBoard's profiler.")

    def __post_init__(self):
        check_choice("strategy", self.strategy, STRATEGIES)
        check_count("steps_per_execution", self.steps_per_execution)
        check_count("checkpoints_kept", self.checkpoints_kept)
        check_weight("checkpoint_minutes", self.checkpoint_minutes)


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run.

    A field that is None is as `objective.objective` says; `resolved()` fills it in.

    Raises:
        ValueError: for an impossible value, which is named together with what is allowed.
    """

    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig = DataConfig()
    optimization: OptimizationConfig = OptimizationConfig()
    execution: ExecutionConfig = ExecutionConfig()
    seed: int | None = _setting(None, "Seed of the initial weights, the noise and the order of the images.")
    deterministic: bool = _setting(False, "Bit for bit the same run each time; slower on a GPU.")
    precision: str = _setting("float32", f"Keras dtype policy, one of {', '.join(PRECISIONS)}.")
    jit_compile: str = _setting("auto", f"XLA, one of {', '.join(JIT_COMPILE)}.")
    select_on: str | None = _setting(
        None,
        "Split that chooses the best checkpoint: validation, or test, which then trains on the validation images too.",
    )
    samples: int | None = _setting(
        None, "Attention maps and latents drawn for each image when the trained model is measured; 0 takes the means."
    )

    def __post_init__(self):
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("jit_compile", self.jit_compile, JIT_COMPILE)
        if self.select_on is not None:
            check_choice("select_on", self.select_on, SELECT_ON)
        if self.seed is not None:
            check_count("seed", self.seed, minimum=0, maximum=2**31 - 1)
        if self.samples is not None:
            check_count("samples", self.samples, minimum=0)

    def resolved(self):
        """Returns a `Config` in which every value is set; a seed that is left to chance is drawn.

        Raises:
            ValueError: if there is no model of that name.
        """
        values = dict(OBJECTIVES[self.objective.objective])
        if self.objective.objective == "reference":
            for prefix, others in _REFERENCE_OF.items():
                if self.model.name.startswith(prefix):
                    values |= others
        seed = values["seed"] if values["seed"] is not None else secrets.randbelow(2**31)
        flat = flatten(self)
        defaults = {**values, "seed": seed, "latent_dim": look_up(self.model.name)[1].latent_dim}
        return self.from_flat(
            {name: defaults[name] if value is None and name in defaults else value for name, value in flat.items()}
        )

    def to_dict(self):
        """Returns nested dicts of JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values):
        """Makes a `Config` from what `to_dict` returned, possibly read back from JSON.

        Raises:
            ValueError: for a name that no field has, or an impossible value.
        """
        arguments = {}
        for name, value in values.items():
            section = _SECTIONS.get(name)
            arguments[name] = _make(section, value) if section else value
        return _make(cls, arguments)

    @classmethod
    def from_flat(cls, values):
        """Makes a `Config` from a dict of flag names; what is missing keeps its default."""
        arguments = {name: {} for name in _SECTIONS}
        places = {flag: (section, field.name) for section, flag, field in settings()}
        for flag, value in values.items():
            if flag not in places:
                raise ValueError(f"There is no such setting; there are {', '.join(places)}. Received: {flag}={value!r}")
            section, name = places[flag]
            (arguments[section] if section else arguments)[name] = value
        return cls.from_dict(arguments)


_SECTIONS = {
    "model": ModelConfig,
    "objective": ObjectiveConfig,
    "data": DataConfig,
    "optimization": OptimizationConfig,
    "execution": ExecutionConfig,
}
# What may differ when a run is continued: where the data lies, whether the examples that stopped it are left out, and
# how it is computed.
_NOT_PART_OF_A_RUN = ("data_dir", "bad_examples", *(field.name for field in dataclasses.fields(ExecutionConfig)))


def settings():
    """Yields (section or None, flag name, dataclass field) of every setting of a `Config`."""
    for section, kind in _SECTIONS.items():
        for field in dataclasses.fields(kind):
            yield section, field.metadata["flag"] or field.name, field
    for field in dataclasses.fields(Config):
        if field.name not in _SECTIONS:
            yield None, field.metadata["flag"] or field.name, field


def flatten(config):
    """Returns a dict flag name -> value of a `Config`."""
    return {
        flag: getattr(getattr(config, section) if section else config, field.name)
        for section, flag, field in settings()
    }


def differences(old, new, ignore=_NOT_PART_OF_A_RUN):
    """Compares two configs.

    Args:
        old: a `Config`.
        new: a `Config`.
        ignore: flags that may differ: by default where the data lies, and how a run is computed.

    Returns:
        List of "flag: old -> new", empty when they agree.
    """
    old, new = flatten(old), flatten(new)
    return [f"{flag}: {old[flag]} -> {new[flag]}" for flag in old if flag not in ignore and old[flag] != new[flag]]


def _make(kind, values):
    known = {field.name for field in dataclasses.fields(kind)}
    for name in values:
        if name not in known:
            raise ValueError(f"{kind.__name__} has {', '.join(sorted(known))}. Received: {name}={values[name]!r}")
    # JSON has no tuples.
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
