"""Weights go from PyTorch's names and layouts to Keras and back, all of them or none."""

import hashlib
import logging

import keras
import numpy as np
import pytest

import aib_tf
from aib_tf import convert
from aib_tf.convert import names

MODELS = {
    "vgg": {},
    "vgg_aib": {},
    "vgg_aib_qt": {},
    "vgg_att2": {"attention": "dp", "combine": "independent"},
    "vgg_att3": {},
    "wrn_10_2": {"width": 0.25},
    "wrn_10_2_aib": {"width": 0.25},
    "wrn_10_2_aib_qt": {"width": 0.25},
    "vgg16_cub": {},
    "vgg16_cub_aib": {},
    "vgg16_cub_aib_qt": {},
    "wrn_50_2_cub": {},
    "wrn_50_2_cub_aib_qt": {},
}


def build(name, seed=0, **overrides):
    overrides = {"width": 0.0625, "latent_dim": 8, "num_anchors": 5, "seed": seed, **MODELS.get(name, {}), **overrides}
    return aib_tf.models.build(name, (32, 32, 3), 4, **overrides)


def randomized(model, seed=0):
    """Fills a model with numbers of which no two arrays are alike."""
    random = np.random.default_rng(seed)
    model.set_weights([random.uniform(0.5, 1.5, weight.shape).astype(weight.dtype) for weight in model.get_weights()])
    return model


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """A model with random weights, and its state dict."""
    model = randomized(build(request.param))
    return request.param, model, convert.to_pytorch(model)


def weights(model):
    return [np.array(value) for value in model.get_weights()]


def test_every_weight_crosses_over_and_back(pair):
    name, model, state = pair
    copy = convert.from_pytorch(state, randomized(build(name), seed=1))
    again = convert.to_pytorch(copy)
    assert list(again) == list(state)
    for key, array in state.items():
        np.testing.assert_array_equal(again[key], array, err_msg=key, strict=True)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    np.testing.assert_array_equal(copy.explain(images)["logits"], model.explain(images)["logits"])
    listed = {id(variable) for entry in names.entries(model)[1] for variable in entry.layer.variables}
    others = [variable.path for variable in model.variables if id(variable) not in listed]
    # The warm-up factor and the noise generators have no counterpart.
    assert all("warmup" in path or "seed_generator" in path for path in others), others


def test_what_the_state_dict_looks_like_is_the_model_that_it_came_from(pair):
    name, _, state = pair
    likely = convert.looks_like(state)
    assert (likely.name, likely.classes, likely.channels) == (name, 4, 3)
    copy = aib_tf.models.build(likely.name, (32, 32, 3), likely.classes, **likely.overrides)
    convert.from_pytorch(state, copy)


@pytest.mark.parametrize("width", [0.1, 0.3, 1 / 3, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("name", ["vgg_aib", "wrn_10_2_aib", "wrn_10_4", "vgg16_cub"])
def test_any_width_is_recognised(name, width):
    state = convert.to_pytorch(build(name, width=width))
    likely = convert.looks_like(state)
    if width == 1 or not name.startswith("wrn"):  # narrow WideResNets of several widening factors are the same
        assert likely.name == name
    convert.from_pytorch(state, aib_tf.models.build(likely.name, (32, 32, 3), 4, **likely.overrides))


@pytest.mark.parametrize("width", [0.05, 0.11])
def test_the_width_is_that_of_the_widest_layers_too(width):
    state = convert.to_pytorch(build("wrn_50_2_cub", width=width))
    likely = convert.looks_like(state)
    convert.from_pytorch(state, aib_tf.models.build(likely.name, (32, 32, 3), 4, **likely.overrides))


def test_half_of_a_network_looks_like_none_and_is_listed_all_the_same():
    state = convert.to_pytorch(build("vgg_aib"))
    del state["decode.2.weight"]
    state["features.0.op.0.weight"] = np.zeros(3, "float32")
    assert convert.looks_like(state) is None
    with pytest.raises(
        ValueError, match=r"missing \(1\): decode.2.weight; of another shape \(1\): features.0.op.0.weight"
    ):
        convert.from_pytorch(state, build("vgg_aib"))


def test_a_map_that_is_flattened_comes_in_pytorch_s_order():
    """At 64x96 pixels, VGG ends in a map of 2x3, which PyTorch flattens with channels first."""
    model = randomized(aib_tf.models.build("vgg_aib", (64, 96, 3), 4, width=0.0625, latent_dim=8))
    images = np.random.default_rng(0).normal(size=(2, 64, 96, 3)).astype("float32")
    features = model.features(images)
    mean, _ = model.attention.distribution(features)
    before = keras.Model(model.encoder.inputs[0], model.encoder.get_layer("global_relu").output)
    flat = np.asarray(before(features + features * mean)).transpose(0, 3, 1, 2).reshape(2, -1)
    state = convert.to_pytorch(model)
    statistics = flat @ state["encode.8.weight"].T + state["encode.8.bias"]
    np.testing.assert_allclose(model.explain(images)["latent_mean"], statistics[:, :8], rtol=1e-4)


def test_a_model_under_another_name_is_the_same_network():
    model = build("vgg_aib_qt")
    renamed = type(model).from_config({**model.get_config(), "name": "mine"})
    convert.from_pytorch(convert.to_pytorch(model), renamed)
    np.testing.assert_array_equal(weights(renamed)[0], weights(model)[0])


def test_what_is_neither_path_nor_dict_is_refused():
    with pytest.raises(TypeError, match=r"module.state_dict\(\).*Received: source=bytes"):
        convert.from_pytorch(b"x", build("vgg_aib"))


def test_a_module_that_is_listed_twice_may_be_given_once_but_not_with_two_values():
    model = randomized(build("wrn_10_2_aib"))
    state = convert.to_pytorch(model)
    once = {name: array for name, array in state.items() if not name.startswith(("att_module_mu", "encode.0"))}
    copy = convert.from_pytorch(once, build("wrn_10_2_aib"))
    np.testing.assert_array_equal(weights(copy)[0], weights(model)[0])
    state["encode.1.bias"] = state["encode.1.bias"] + 1
    with pytest.raises(ValueError, match=r"different values \(1\): encode.1.bias and bn1.bias"):
        convert.from_pytorch(state, copy)


def test_unused_modules_of_the_released_network_are_left_out_and_logged(caplog):
    model = build("wrn_50_2_cub_aib")
    state = convert.to_pytorch(model) | {"tmp_layer.0.conv1.weight": np.zeros((2, 2, 1, 1), "float32")}
    with caplog.at_level(logging.INFO, "aib_tf"):
        convert.from_pytorch(state, model)
    assert "1 arrays of tmp_layer.0.conv1.weight" in caplog.text


def faulty(state, kind):
    state = dict(state)
    if kind == "missing":
        del state["decode.2.bias"], state["features.0.op.1.running_var"]
    elif kind == "left over":
        state |= {"extra.weight": np.zeros(3, "float32")}
    elif kind == "of another type":
        state["emb.weight"] = np.full((1, 5), "a")
    else:
        state["encode.8.weight"] = state["encode.8.weight"].T[:3]
    return state


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("of another type", r"of another type \(1\): emb.weight <U1"),
        ("missing", r"missing \(2\): features.0.op.1.running_var, decode.2.bias"),
        ("left over", r"left over \(1\): extra.weight"),
        ("of another shape", r"of another shape \(1\): encode.8.weight \(3, 16\) instead of \(16, 32\)"),
    ],
)
def test_what_does_not_fit_is_listed_and_the_model_stays_as_it_was(kind, message):
    state = convert.to_pytorch(randomized(build("vgg_aib_qt")))
    model = build("vgg_aib_qt", seed=3)
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        convert.from_pytorch(faulty(state, kind), model)
    for now, then in zip(weights(model), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_a_checkpoint_of_another_model_is_recognised():
    state = convert.to_pytorch(build("vgg_aib_qt"))
    with pytest.raises(ValueError, match=r'look like those of aib_tf.models.build\("vgg_aib_qt", .* num_anchors=5\)'):
        convert.from_pytorch(state, build("wrn_10_2_aib"))
    with pytest.raises(ValueError, match=r"left over \(1\): emb.weight"):
        convert.from_pytorch(state, build("vgg_aib"))


def test_a_model_that_pytorch_does_not_have_is_refused():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)], name="mine")
    for call in (lambda: convert.from_pytorch({"a": np.zeros(3)}, model), lambda: convert.to_pytorch(model)):
        with pytest.raises(ValueError, match=r"Received: model\.name='mine'"):
            call()


def test_backbone_takes_the_weights_for_imagenet_and_nothing_else():
    plain = randomized(build("wrn_50_2_cub"))
    state = convert.to_pytorch(plain) | {"fc.weight": np.zeros((1000, 8), "float32")}
    model = build("wrn_50_2_cub_aib", seed=1)
    before = convert.to_pytorch(model)
    convert.load_backbone(state, model)
    after = convert.to_pytorch(model)
    for name, array in after.items():
        backbone = name.startswith(("conv1", "bn1", "layer", "encode.0"))
        expected = state[name.replace("encode.0", "layer4")] if backbone else before[name]
        np.testing.assert_array_equal(array, expected, err_msg=name)


def test_backbone_without_an_array_or_of_another_kind_is_refused():
    state = convert.to_pytorch(build("vgg16_cub"))
    del state["features.28.weight"]
    model = build("vgg16_cub_aib")
    before = weights(model)
    with pytest.raises(ValueError, match=r"missing \(1\): features.28.weight"):
        convert.load_backbone(state, model)
    np.testing.assert_array_equal(weights(model)[0], before[0])
    with pytest.raises(ValueError, match=r"vgg16_cub, wrn_50_2_cub\. Received: model\.name='vgg_aib'"):
        convert.load_backbone(state, build("vgg_aib"))


def test_imagenet_weights_are_fetched_once_and_checked(tmp_path, monkeypatch):
    """A file server on this machine stands in for torchvision's."""
    state = convert.to_pytorch(randomized(build("vgg16_cub")))
    convert.write_checkpoint(tmp_path / "server" / "plain.pth", state)
    content = (tmp_path / "server" / "plain.pth").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    served = tmp_path / "server" / f"vgg16-{digest[:8]}.pth"
    served.write_bytes(content)
    fake = {"vgg16_cub": convert.imagenet.ImageNetWeights(served.as_uri(), ("features.",))}
    monkeypatch.setattr(convert.imagenet, "IMAGENET", fake)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "cache"))
    model = build("vgg16_cub_aib", seed=1)
    path = convert.fetch_imagenet(model)
    convert.load_backbone(path, model)
    np.testing.assert_array_equal(convert.to_pytorch(model)["features.0.bias"], state["features.0.bias"])
    served.unlink()
    assert convert.fetch_imagenet(model) == path  # from the cache
    with open(path, "ab") as file:
        file.write(b"damage")
    with pytest.raises(OSError, match="SHA-256"):
        convert.fetch_imagenet(model)
    with pytest.raises(FileNotFoundError, match=r"could not be fetched.*Received: weights='imagenet'"):
        convert.fetch_imagenet(model)
