import json

import pytest

from aib_tf import config
from aib_tf.config import Config


def test_config_survives_json():
    original = Config.from_flat({"decay_at": (60, 120), "schedule": "steps", "seed": 3, "width": 0.5})
    assert Config.from_dict(json.loads(json.dumps(original.to_dict()))) == original


def test_every_setting_has_a_help_text_and_a_flag_of_its_own():
    flags = [flag for _, flag, _ in config.settings()]
    assert len(flags) == len(set(flags))
    for _, flag, field in config.settings():
        assert field.metadata["help"].endswith("."), flag


def test_flatten_is_the_inverse_of_from_flat():
    original = Config.from_flat({"model": "vgg", "dataset": "cifar10", "epochs": 9})
    assert Config.from_flat(config.flatten(original)) == original


def test_the_paper_s_formula_resolves_to_the_documented_defaults():
    flat = config.flatten(Config().resolved())
    assert flat["kl"] == "closed_form"
    assert flat["kl_weight"] == 1.0
    assert flat["anchor_learning_rate_ratio"] == 1e-4
    assert flat["anchor_weight_decay"] is False
    assert flat["select_on"] == "validation"
    assert flat["beta_warmup_epochs"] == 1.0
    assert flat["samples"] == 0
    assert flat["seed"] == 0


def test_reference_sets_what_the_released_code_does_and_draws_a_seed():
    reference = Config.from_flat({"objective": "reference"})
    flat = config.flatten(reference.resolved())
    assert (flat["kl"], flat["kl_weight"], flat["select_on"], flat["samples"]) == ("reference", 0.5, "test", 4)
    assert flat["anchor_weight_decay"] is True
    assert flat["beta_warmup_epochs"] == 0.0
    assert len({config.flatten(reference.resolved())["seed"] for _ in range(4)}) > 1


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("vgg_aib_qt", (0.5, 4, 1e-4, True)),
        ("wrn_28_10_aib_qt", (1.0, 4, 1e-4, True)),
        ("vgg16_cub_aib_qt", (1.0, 12, 0.0, False)),  # whose anchors stay where they begin
        ("wrn_50_2_cub_aib_qt", (1.0, 12, 0.0, False)),
        ("vgg_att3", (0.5, 0, 1e-4, True)),  # which has nothing to sample
    ],
)
def test_reference_is_that_of_the_network(model, expected):
    flat = config.flatten(Config.from_flat({"objective": "reference", "model": model}).resolved())
    names = ("kl_weight", "samples", "anchor_learning_rate_ratio", "anchor_weight_decay")
    assert tuple(flat[name] for name in names) == expected
    assert flat["initializers"] == "released"


def test_a_value_that_was_given_wins_over_the_objective():
    flat = config.flatten(Config.from_flat({"objective": "reference", "kl": "closed_form", "seed": 5}).resolved())
    assert (flat["kl"], flat["kl_weight"], flat["seed"]) == ("closed_form", 0.5, 5)


def test_differences_name_flags_and_values_and_leave_out_where_the_data_lies():
    old, new = Config.from_flat({"epochs": 3, "data_dir": "a"}), Config.from_flat({"epochs": 4, "data_dir": "b"})
    assert config.differences(old, new) == ["epochs: 3 -> 4"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "from 1 up. Received: epochs=0"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"learning_rate": 0.0}, "more than 0. Received: learning_rate=0.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"width": 0.0}, "width=0.0"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"kl": "exact"}, "closed_form, reference. Received: kl='exact'"),
        ({"objective": "formula"}, "paper, reference. Received: objective='formula'"),
        ({"attention_supervision": "mse"}, "none, kl, cc, cosine. Received: attention_supervision='mse'"),
        ({"attention_supervision_weight": -1.0}, "attention_supervision_weight=-1.0"),
        ({"dropout": 1.0}, "from 0 to below 1. Received: dropout=1.0"),
        ({"ema_momentum": 1.0}, "ema_momentum=1.0"),
        ({"adam_beta_1": -0.5}, "adam_beta_1=-0.5"),
        ({"initializers": "theirs"}, "default, released. Received: initializers='theirs'"),
        ({"attention": "cosine"}, "pc, dp. Received: attention='cosine'"),
        ({"combine": "sum"}, "combine='sum'"),
        ({"position": "between"}, "position='between'"),
        ({"normalize": "none"}, "normalize='none'"),
        ({"optimizer": "lion"}, "adam, sgd. Received: optimizer='lion'"),
        ({"schedule": "steps"}, "decay_every"),
        ({"schedule": "cosine", "decay_every": 5}, "decay_every=5"),
        ({"warmup_learning_rates": (0.1,)}, "warmup_learning_rates"),
        ({"learning_rate_warmup_epochs": 1, "schedule": "constant"}, "goes with schedule=cosine"),
        ({"learning_rate_warmup_epochs": 2, "epochs": 2}, "less than `epochs`"),
        ({"precision": "int8"}, "precision='int8'"),
        ({"select_on": "train"}, "select_on='train'"),
        ({"seed": -1}, "seed=-1"),
        ({"samples": -1}, "samples=-1"),
        ({"num_anchors": 70_000}, "num_anchors=70000"),
        ({"wdith": 1.0}, "There is no such setting; there are model, width"),
    ],
)
def test_impossible_values_are_named_with_what_is_allowed(values, message):
    with pytest.raises(ValueError) as error:
        Config.from_flat(values)
    assert message in str(error.value)
