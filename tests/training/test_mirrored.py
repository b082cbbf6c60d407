"""Several devices in one process: what one device computes, two compute together."""

import json
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import aib_tf
from aib_tf import training
from aib_tf.models.blocks import BatchNormalization, Dropout
from aib_tf.ops.replicas import SeedGenerator
from aib_tf.training import cluster, distribution

SMALL = {"width": 0.05, "latent_dim": 8, "num_anchors": 5}


@pytest.fixture(scope="module")
def mirrored():
    """That of all tests in this process: the collective operations of a second one meet its keys."""
    return distribution.strategy("mirrored")


class StepLosses(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.values = []

    def on_train_batch_end(self, batch, logs=None):
        self.values.append(float(logs["loss"]))


@pytest.fixture
def set_dtype():
    """Sets Keras's default dtype for one test."""

    def set_dtype(dtype):
        keras.config.set_floatx(dtype)
        keras.config.set_dtype_policy(dtype)

    yield set_dtype
    set_dtype("float32")


def without_noise(strategy, name, optimizer, **overrides):
    """A model whose attention and latent are their means in training, too."""
    with strategy.scope():
        model = aib_tf.models.build(name, (32, 32, 3), 10, seed=0, synchronized_batch_norm=True, **overrides)
        model.compile(optimizer(), loss=aib_tf.losses.CrossEntropyBits(), jit_compile=False)
    for layer in model._flatten_layers():
        if hasattr(layer, "sample"):
            layer.sample = lambda mean, stddev, samples=None: mean + 0.0 * stddev
    return model


@pytest.mark.parametrize(
    ("name", "optimizer", "overrides", "dtype", "tolerance"),
    [
        # Rounding grows from step to step in a network as narrow as this, so that it is compared in float64.
        ("vgg_aib_qt", lambda: training.SGD(0.01, l2=5e-4), SMALL, "float64", 1e-9),
        ("vgg_att2", lambda: training.SGD(0.01), {"width": 0.05}, "float64", 1e-9),
        ("wrn_10_1_aib", lambda: training.SGD(1e-3), {"latent_dim": 32}, "float32", 1e-5),
    ],
)
def test_ten_steps_on_two_replicas_are_those_of_one_device(
    mirrored, set_dtype, name, optimizer, overrides, dtype, tolerance
):
    set_dtype(dtype)
    random = np.random.default_rng(0)
    images = random.normal(size=(10, 16, 32, 32, 3)).astype(dtype)
    labels = random.integers(10, size=(10, 16))
    alone = without_noise(tf.distribute.get_strategy(), name, optimizer, **overrides)
    both = without_noise(mirrored, name, optimizer, **overrides)
    both.set_weights(alone.get_weights())
    start = [np.asarray(variable) for variable in alone.trainable_variables]
    losses = []
    for model in (alone, both):
        losses.append(StepLosses())
        batches = tf.data.Dataset.from_tensor_slices((images, labels))
        model.fit(batches, epochs=1, shuffle=False, verbose=0, callbacks=[losses[-1]])
    # Where the rates are large, the metric of the loss is kept in float32.
    np.testing.assert_allclose(losses[1].values, losses[0].values, rtol=max(tolerance, 1e-6))
    moved = 0.0
    for variable, one, two in zip(alone.weights, alone.get_weights(), both.get_weights(), strict=True):
        np.testing.assert_allclose(two, one, rtol=tolerance, atol=tolerance, err_msg=variable.path)
    for old, variable in zip(start, alone.trainable_variables, strict=True):
        moved = max(moved, np.abs(np.asarray(variable) - old).max())
    assert moved > 1e-3


def per_replica(strategy, function):
    """What a function returns in each replica, as arrays."""
    results = strategy.experimental_local_results(tf.function(lambda: strategy.run(function))())
    return [np.asarray(result) for result in results]


def test_noise_differs_between_replicas_and_repeats_for_a_seed(mirrored):
    draws = []
    for _ in range(2):
        with mirrored.scope():
            generator, dropout = SeedGenerator(3), Dropout(0.5, seed=4)

        def noise(generator=generator, dropout=dropout):
            return keras.random.normal((8,), seed=generator), dropout(tf.ones((64,)), training=True)

        results = mirrored.experimental_local_results(tf.function(lambda noise=noise: mirrored.run(noise))())
        draws.append([[np.asarray(value) for value in replica] for replica in zip(*_columns(results), strict=True)])
        states = mirrored.experimental_local_results(generator.state.value)
        np.testing.assert_array_equal(states[0], states[1])
    for first, second in draws:
        assert not np.intersect1d(first[0], second[0]).size
        assert not np.array_equal(first[1], second[1])
    for one, other in zip(draws[0], draws[1], strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])
    # The first replica draws what a single device draws.
    alone = SeedGenerator(3)
    np.testing.assert_array_equal(draws[0][0][0], keras.random.normal((8,), seed=alone))
    np.testing.assert_array_equal(alone.next(), keras.random.SeedGenerator(3).next() + np.array([0, 1]))


def _columns(results):
    return zip(*results, strict=True) if isinstance(results[0], (tuple, list)) else results


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16"])
def test_synchronised_normalisation_is_that_of_the_whole_batch_though_shares_differ(mirrored, dtype):
    values = np.random.default_rng(0).normal(3.0, 2.0, size=(5, 4, 4, 6)).astype("float32")
    alone = BatchNormalization(dtype=dtype)
    expected = alone(values, training=True)
    with mirrored.scope():
        layer = BatchNormalization(synchronized=True, dtype=dtype)
        layer.build(values.shape)

    def normalise():
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        return layer(tf.cond(replica == 0, lambda: values[:2], lambda: values[2:]), training=True)

    actual = np.concatenate(per_replica(mirrored, normalise))
    tolerance = 2e-3 if dtype == "mixed_float16" else 1e-5
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(layer.moving_mean.value.numpy(), alone.moving_mean, rtol=1e-4)
    np.testing.assert_allclose(layer.moving_variance.value.numpy(), alone.moving_variance, rtol=1e-4)


def test_a_run_on_two_devices_profiles_stops_and_goes_on_with_one(mirrored, tiny, tmp_path, monkeypatch):
    # 96 training images in batches of 20: the last one has 16. 40 for validation: 20 for each device.
    flags = {"batch_size": 20, "strategy": "mirrored", "profile": True, "learning_rate_scaling": "linear"}
    run = training.Run(tmp_path / "run")
    save = training.callbacks.Recorder.on_epoch_end

    def stop_after_the_first(self, epoch, logs=None):
        save(self, epoch, logs)
        variables = self.model.features.layers[2].non_trainable_variables
        for variable in variables:
            first, second = mirrored.experimental_local_results(variable.value)
            np.testing.assert_array_equal(first, second)
        assert variables
        raise training.TrainingInterrupted("enough")

    monkeypatch.setattr(training.callbacks.Recorder, "on_epoch_end", stop_after_the_first)
    with pytest.raises(training.TrainingInterrupted):
        training.fit(tiny(**flags), run.path, verbose=0)
    monkeypatch.setattr(training.callbacks.Recorder, "on_epoch_end", save)
    assert list(run.tensorboard_folder.glob("plugins/profile/*/*.xplane.pb"))
    history = run.read_history()
    assert json.loads(run.config_file.read_text())["replicas"] == 2
    with pytest.raises(training.RunMismatchError, match=r"2 devices.*learning_rate_scaling=linear"):
        training.fit(tiny(**flags | {"strategy": "one_device"}), run.path, verbose=0)
    model = run.load_best()
    measured = training.measure(model, run.config, "validation")["accuracy"]["top_1"].value
    assert measured == pytest.approx(history["val_accuracy"][0])


def test_a_run_of_two_devices_is_continued_by_one(mirrored, tiny, tmp_path):
    flags = {"batch_size": 24, "strategy": "mirrored", "synchronized_batch_norm": True, "epochs": 1}
    training.fit(tiny(**flags), tmp_path / "run", verbose=0)
    run = training.Run(tmp_path / "run")
    first = run.read_history()
    record = json.loads(run.config_file.read_text())
    record["config"]["optimization"]["epochs"] = 2
    run.config_file.write_text(json.dumps(record))
    run.metrics_file.unlink()
    history = training.fit(tiny(**flags | {"strategy": "one_device", "epochs": 2}), run.path, verbose=0)
    assert history["epoch"] == [1, 2]
    assert history["loss"][0] == first["loss"][0]
    assert np.isfinite(history["loss"]).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch_size": 15}, "must be a multiple of 2, such as 14 or 16. Received: batch_size=15"),
        (
            {"steps_per_execution": 2},
            "Use steps_per_execution=1, or strategy=one_device. Received: steps_per_execution=2",
        ),
        (
            {"jit_compile": "true"},
            "Use jit_compile=auto, or strategy=one_device. Received: jit_compile=true on 2 devices",
        ),
    ],
)
def test_what_several_devices_cannot_do_is_refused_before_anything_is_written(mirrored, tiny, tmp_path, flags, message):
    with pytest.raises(ValueError) as error:
        training.fit(tiny(strategy="mirrored", **flags), tmp_path / "run", verbose=0)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_steps_of_an_execution_have_to_divide_the_epoch(tiny, tmp_path):
    with pytest.raises(
        ValueError, match=r"6 steps, of which `steps_per_execution` must be a divisor, such as 3. Received"
    ):
        training.fit(tiny(steps_per_execution=4), tmp_path / "run", verbose=0)


def test_steps_of_an_execution_change_nothing_but_how_often_callbacks_are_called(tiny, tmp_path):
    histories = [
        training.fit(tiny(steps_per_execution=steps, beta_warmup_epochs=0.0), tmp_path / str(steps), verbose=0)
        for steps in (1, 3)
    ]
    for name in histories[0]:
        if name != "seconds":
            np.testing.assert_allclose(histories[1][name], histories[0][name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_strategy_without_its_devices_is_refused(monkeypatch):
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [f"one {kind}"])
    with pytest.raises(training.ClusterError, match=r"finds 1 CPU. Use --strategy=one_device"):
        distribution.strategy("mirrored")
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(training.ClusterError, match=r"scripts/launch\.py"):
        distribution.strategy("multi_worker")
    with pytest.raises(ValueError, match="Received: strategy='two'"):
        distribution.strategy("two")
    assert distribution.strategy("auto").num_replicas_in_sync == 1


@pytest.fixture
def two_workers(monkeypatch):
    """A cluster whose other worker is there for nobody but this test."""
    workers = cluster.Cluster(("localhost:2222", "localhost:2223"), 0)
    monkeypatch.setattr(cluster, "meet", lambda workers, facts: None)
    monkeypatch.setattr(distribution, "_made", {})
    monkeypatch.setenv("TF_CONFIG", workers.tf_config())
    return workers


@pytest.mark.parametrize("gpus", [0, 1, 4])
def test_each_worker_trains_with_all_its_gpus(two_workers, monkeypatch, gpus):
    made = []
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: [f"GPU:{number}" for number in range(gpus)])
    monkeypatch.setattr(
        tf.distribute, "MultiWorkerMirroredStrategy", lambda cluster_resolver: made.append(cluster_resolver)
    )
    distribution.strategy("auto")
    (resolver,) = made
    # What TensorFlow asks its resolver for; without an answer it takes one CPU.
    assert resolver.num_accelerators() == ({"GPU": gpus} if gpus else {})
    assert resolver.cluster_spec().as_dict() == {"worker": list(two_workers.addresses)}
    assert (resolver.task_type, resolver.task_id) == ("worker", 0)


def test_a_worker_that_ends_after_the_meeting_is_not_waited_for_without_end(two_workers, monkeypatch, caplog):
    gone = threading.Event()
    codes = []
    monkeypatch.setattr(distribution, "_START_SECONDS", 0.01)
    monkeypatch.setattr(distribution.os, "_exit", lambda code: (codes.append(code), gone.set()))
    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", lambda cluster_resolver: gone.wait(60))
    distribution.strategy("multi_worker")
    assert codes == [75]
    assert "One of them ended after all had met" in caplog.text
