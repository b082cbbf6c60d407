"""Keras's `fit`, `evaluate` and `predict` on several workers, and what the workers tell one another: real processes."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from aib_tf.training import SGD, Adam, ClusterError, collectives, distribution, keras_multi_worker
from tests.training import keras_multi_worker_program as program
from tests.training.workers import Workers

WORKERS = 2
NAMES = [*program.VARIANTS, "aib"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder that the pair of workers left."""
    folder = tmp_path_factory.mktemp("pair")
    with Workers(["-m", program.__name__, folder], WORKERS) as workers:
        for code, output in workers.wait():
            assert code == 0, output
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """What each worker found."""
    return [json.loads((folder / f"results-{index}.json").read_text()) for index in range(WORKERS)]


def variables(folder, name, index, group):
    with np.load(folder / f"{name}-{index}.npz") as file:
        return {key: file[key] for key in file.files if key.startswith(f"{group}/")}


def test_plain_keras_fails_on_several_workers(results):
    for result in results:
        assert "plain_keras_fails_with" in result, (
            "Keras has mended this: remove aib_tf/training/keras_multi_worker.py, but for the mend of loss scaling."
        )


def test_keras_is_mended_once_however_often_it_is_asked_for(results):
    assert [result["mended"] for result in results] == [True] * WORKERS
    assert [result["mended_once"] for result in results] == [True] * WORKERS


@pytest.mark.parametrize("group", ["trainable", "optimizer"])
@pytest.mark.parametrize("name", NAMES)
def test_every_worker_ends_with_the_same_weights_bit_for_bit(name, group, folder):
    first, second = (variables(folder, name, index, group) for index in range(WORKERS))
    assert first.keys() == second.keys()
    assert first
    for key, value in first.items():
        assert np.isfinite(value).all(), key
        np.testing.assert_array_equal(second[key], value, err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_training_moves_the_weights(name, folder):
    optimizer = {"adam": Adam, "aib": Adam}.get(name, SGD)()
    model = program.aib_model(optimizer) if name == "aib" else program.small_model(optimizer)
    after = variables(folder, name, 0, "trainable").values()
    moved = [not np.array_equal(np.asarray(a), b) for a, b in zip(model.trainable_variables, after, strict=True)]
    assert all(moved)


@pytest.mark.parametrize("name", NAMES)
def test_every_worker_sees_the_same_logs(name, results):
    assert results[0][name] == results[1][name]
    assert all(np.isfinite(values).all() for values in results[0][name]["history"].values())


def test_logs_are_there_for_every_step_and_every_metric(results):
    for name in program.VARIANTS:
        steps = results[0][name]["steps"]
        assert len(steps) == program.STEPS * program.EPOCHS
        assert all(row.keys() == {"loss", "accuracy", "label_information_bits", "squares"} for row in steps)
        history = results[0][name]["history"]
        assert {"val_loss", "val_accuracy", "val_label_information_bits", "val_squares"} <= history.keys()


@pytest.mark.parametrize("name", ["small", "aib"])
def test_evaluation_and_prediction_are_those_of_one_process(name, folder, results):
    with np.load(folder / f"{name}-evaluated-0.npz") as file:
        weights = [file[f"arr_{number}"] for number in range(len(file.files) - 1)]
        predictions = [file["predictions"]]
    with np.load(folder / f"{name}-evaluated-1.npz") as file:
        predictions.append(file["predictions"])
    model = program.aib_model(SGD()) if name == "aib" else program.small_model(SGD())
    model.set_weights(weights)
    images, labels = program.evaluation_data()
    expected = model.evaluate(images, labels, batch_size=program.BATCH, verbose=0, return_dict=True)
    for result in results:
        measured = result[f"{name}_evaluation"]
        assert measured.keys() == expected.keys()
        for metric, value in expected.items():
            assert measured[metric] == pytest.approx(value, rel=1e-6, abs=1e-6), metric
    alone = model.predict(images, batch_size=program.BATCH, verbose=0)
    for both in predictions:
        np.testing.assert_allclose(both, alone, rtol=1e-5, atol=1e-5)


def test_what_a_worker_does_not_share_is_its_normalization_averages(folder):
    for name in NAMES:
        first, second = (variables(folder, name, index, "non_trainable") for index in range(WORKERS))
        different = {key for key, value in first.items() if not np.array_equal(value, second[key])}
        assert different == {key for key in first if key.endswith(("moving_mean", "moving_variance"))}, name


def test_gradients_that_overflow_on_one_worker_skip_the_step_on_all(results):
    for result in results:
        assert result["overflow"] == {"kernel": np.zeros((4, 3)).tolist(), "steps": 0, "scale": 0.25}


def test_gradients_that_overflow_on_one_device_skip_the_step_on_all():
    keras_multi_worker.apply()
    with distribution.strategy("mirrored").scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, kernel_initializer="zeros")])
        model.compile(keras.optimizers.LossScaleOptimizer(SGD(0.05)), loss="mean_squared_error")
    images = np.ones((8, 4), "float32")
    images[4:] = 3e38  # those of the second device
    model.fit(images, np.ones((8, 3), "float32"), batch_size=8, shuffle=False, verbose=0)
    assert not np.asarray(model.layers[0].kernel).any()
    assert float(np.asarray(model.optimizer.dynamic_scale)) == model.optimizer.initial_scale / 2


def test_the_chief_saves_a_model_without_the_others(folder):
    model = keras.saving.load_model(folder / "chief.keras")
    with np.load(folder / "aib-evaluated-0.npz") as file:
        weights = [file[f"arr_{number}"] for number in range(len(file.files) - 1)]
    for loaded, value in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(loaded, value)


def test_the_logs_of_a_step_cost_one_collective_and_keep_what_is_not_a_number(results):
    for result in results:
        assert result["log_collectives"] == ["CollectiveReduceV2"]
        assert np.isnan(result["logs"]["nan"])
        assert result["logs"]["vector"] == [0.5, 2.0]
        assert result["logs"]["half"] == 0.5
        assert result["log_dtypes"] == {"nan": "float32", "vector": "float32", "half": "float16"}


def test_the_chief_sends_arrays_of_every_dtype_bit_for_bit(results):
    expected = [program.describe(array) for array in program.exchanged_arrays()]
    for result in results:
        assert result["received"] == expected
        assert result["received_nothing"] == []


def test_every_worker_gets_the_texts_of_all_in_order(results):
    for index, result in enumerate(results):
        assert (result["index"], result["count"]) == (index, WORKERS)
        assert result["texts"] == program.exchanged_texts()
        assert result["empty_texts"] == [""] * WORKERS


@pytest.mark.parametrize("name", ["one_device", "mirrored"])
def test_one_process_gets_back_what_it_sends(name):
    strategy = distribution.strategy(name)
    arrays = [np.arange(3), np.float32(1.5)]
    received = collectives.broadcast(strategy, arrays)
    assert [program.describe(array) for array in received] == [program.describe(np.asarray(array)) for array in arrays]
    assert collectives.gather_texts(strategy, "text") == ["text"]
    assert (collectives.worker_index(strategy), collectives.worker_count(strategy)) == (0, 1)


@pytest.mark.parametrize("arrays", [None, [np.array([object()])]])
def test_the_chief_is_told_what_cannot_be_sent(arrays):
    with pytest.raises(ValueError, match="Received: arrays"):
        collectives.broadcast(tf.distribute.get_strategy(), arrays)


def test_a_keras_that_is_written_otherwise_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(keras, "__version__", "3.99.0")
    monkeypatch.delattr(keras.optimizers.LossScaleOptimizer, "check_finite")
    with pytest.raises(ClusterError, match=r'"keras>=3.10,<=3.15.\*".*Received: keras.__version__=\'3.99.0\''):
        keras_multi_worker.apply()


def test_a_newer_keras_that_is_written_alike_is_mended_with_a_word_of_caution(monkeypatch, caplog):
    monkeypatch.setattr(keras, "__version__", "3.99.0")
    monkeypatch.setattr("aib_tf.training.keras_multi_worker._logger.propagate", True)
    keras_multi_worker.apply()
    assert "was not tried with Keras 3.99.0" in caplog.text
