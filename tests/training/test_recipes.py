"""What the papers' recipes ask of `fit` beside the default task."""

import json

import keras
import numpy as np
import pytest

import aib_tf
from aib_tf import convert, data, training
from aib_tf.training.callbacks import averaged_weights
from tests.training.conftest import TINY


def weights(model):
    return [np.array(variable) for variable in model.trainable_variables]


@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_averaged_weights_are_put_in_place_for_a_while(precision):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    finally:
        keras.config.set_dtype_policy(policy)
    model.compile(training.SGD(0.5, use_ema=True, ema_momentum=0.5), loss="mse", jit_compile=False)
    seen = []
    for step in range(4):
        model.train_on_batch(np.eye(3, dtype="float32"), np.full((3, 2), step, "float32"))
        seen.append(weights(model))
    expected = seen[0]
    for later in seen[1:]:
        expected = [0.5 * old + 0.5 * new for old, new in zip(expected, later, strict=True)]
    with pytest.raises(RuntimeError, match="in the middle"), averaged_weights(model):
        for actual, value in zip(weights(model), expected, strict=True):
            np.testing.assert_allclose(actual, value, rtol=1e-5)
        raise RuntimeError("in the middle")
    for actual, value in zip(weights(model), seen[-1], strict=True):
        np.testing.assert_array_equal(actual, value)


def test_moving_average_is_what_is_validated_kept_and_measured(tiny, tmp_path):
    config = tiny(ema_momentum=0.9, optimizer="sgd", learning_rate=0.05, schedule="constant", epochs=1)
    training.fit(config, tmp_path / "run", verbose=0)
    run = training.Run(tmp_path / "run")
    best = run.load_best()
    results = training.measure(best, run.config, "validation")
    assert results["accuracy"]["top_1"].value == pytest.approx(run.best["value"])
    kept = weights(best)
    best.optimizer.finalize_variable_values(best.trainable_variables)
    for average, value in zip(weights(best), kept, strict=True):
        np.testing.assert_array_equal(value, average)
    # The checkpoint holds what training goes on with: the weights themselves.
    with np.load(run.checkpoints.paths()[-1]) as arrays:
        (kernel,) = (arrays[name] for name in arrays.files if name.startswith("model/0/"))
    assert best.variables[0] is best.trainable_variables[0]
    assert not np.array_equal(kernel, kept[0])


def test_select_on_test_trains_on_the_validation_images_too(tiny, tmp_path):
    history = training.fit(tiny(select_on="test", epochs=1), tmp_path / "run", verbose=0)
    run = training.Run(tmp_path / "run")
    model = run.load_best()
    images = data.num_examples(TINY, "train+validation", tiny().data.data_dir)
    assert int(model.optimizer.iterations) == -(-images // 16) == 9
    measured = training.measure(model, run.config, "test")["accuracy"]["top_1"].value
    assert history["val_accuracy"][0] == pytest.approx(measured)


def test_pay_attention_trains_is_drawn_and_is_localised(tiny, tmp_path):
    training.fit(tiny(model="vgg_att2", attention="dp", combine="independent", epochs=1), tmp_path / "run", verbose=0)
    run = training.Run(tmp_path / "run")
    assert run.attention_file.read_bytes().startswith(b"\x89PNG")
    suites = json.loads(run.metrics_file.read_text())["suites"]
    assert 0 <= suites["localisation"]["metrics"]["pointing_box_attention"]["value"] <= 1
    assert "bottleneck" in suites["bottleneck"]["skipped"]


def test_a_backbone_starts_with_the_weights_of_a_file(tiny, tmp_path):
    source = aib_tf.models.build("vgg16_cub", (32, 32, 1), 10, width=0.05, seed=7)
    state = convert.to_pytorch(source)
    convert.write_checkpoint(tmp_path / "imagenet.pth", state)
    config = tiny(model="vgg16_cub_aib", weights=str(tmp_path / "imagenet.pth"), learning_rate=1e-12, epochs=1)
    training.fit(config, tmp_path / "run", verbose=0)
    trained = convert.to_pytorch(training.Run(tmp_path / "run").load_best())
    for name in ("features.0.weight", "features.28.bias"):
        np.testing.assert_allclose(trained[name], state[name], atol=1e-6)


def test_weights_that_do_not_fit_are_refused_before_training(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no_such\.pth"):
        training.fit(tiny(model="vgg16_cub", weights=str(tmp_path / "no_such.pth")), tmp_path / "run", verbose=0)
    with pytest.raises(ValueError, match=r"vgg16_cub, wrn_50_2_cub\. Received: model\.name='vgg_aib_qt'"):
        training.fit(tiny(weights="imagenet"), tmp_path / "other", verbose=0)
    assert not list(tmp_path.iterdir())
