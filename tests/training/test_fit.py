"""`fit`: the run folder, and what happens when something is wrong."""

import json
import logging
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf

import aib_tf
from aib_tf import training


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
    """A finished run of two epochs; read only."""
    config = aib_tf.config.Config.from_flat(
        {
            "dataset": "cluttered_digits/train96_validation40_test40_seed0",
            "data_dir": data_dir,
            "width": 0.05,
            "latent_dim": 8,
            "num_anchors": 5,
            "batch_size": 16,
            "epochs": 2,
            "beta_warmup_epochs": 1.0,
        }
    )
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, config, training.fit(config, folder, verbose=0)


def test_run_folder_holds_what_the_readme_promises(finished):
    folder, _, history = finished
    run = training.Run(folder)
    record = json.loads(run.config_file.read_text())
    assert record["config"]["objective"]["kl"] == "closed_form"
    assert record["seed"] == 0
    assert record["versions"]["tensorflow"] == tf.__version__
    assert record["command"]
    assert len(run.checkpoints.paths()) == 2
    assert run.attention_file.read_bytes().startswith(b"\x89PNG")
    assert run.curves_file.read_bytes().startswith(b"\x89PNG")
    assert run.read_history() == history
    metrics = json.loads(run.metrics_file.read_text())
    assert set(metrics["suites"]) == {"accuracy", "bottleneck", "localisation"}
    assert metrics["split"] == "test"
    names = set(history)
    for name in ("accuracy", "cross_entropy_bits", "rate_bits", "label_information_bits", "loss", "anchors_in_use"):
        assert {name, f"val_{name}"} <= names
    assert {"codebook_loss", "commitment_loss", "anchor_perplexity", "learning_rate", "epoch", "seconds"} <= names
    assert history["epoch"] == [1, 2]


def test_best_model_is_the_one_that_was_measured(finished):
    folder, _, history = finished
    run = training.Run(folder)
    assert run.best["value"] == max(history["val_accuracy"])
    model = run.load_best()
    results = training.measure(model, run.config, "validation")
    assert results["accuracy"]["top_1"].value == pytest.approx(run.best["value"])
    measured = json.loads(run.metrics_file.read_text())["suites"]["accuracy"]["metrics"]["top_1"]["value"]
    assert training.measure(model, run.config)["accuracy"]["top_1"].value == measured


def test_tensorboard_logs_hold_scalars_anchors_and_pictures(finished):
    folder, _, _ = finished
    tags = {}
    for file in training.Run(folder).tensorboard_folder.glob("events*"):
        for record in tf.compat.v1.io.tf_record_iterator(str(file)):
            event = tf.compat.v1.Event.FromString(record)
            for value in event.summary.value:
                tags.setdefault(value.tag, []).append(event.step)
    for tag in ("accuracy/train", "accuracy/validation", "rate_bits/train", "anchors", "attention"):
        assert tags[tag] == [1, 2], tag
    assert "curves_and_information_plane" in tags


def test_a_finished_run_is_left_as_it_is(finished):
    folder, config, history = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    assert training.fit(config, folder, verbose=0) == history
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before


def test_another_config_is_refused_with_the_differences(finished, tiny):
    folder, _, _ = finished
    with pytest.raises(training.RunMismatchError, match=r"beta: 0.01 -> 0.5") as error:
        training.fit(tiny(beta=0.5), folder, verbose=0)
    assert "epochs" not in str(error.value)


def test_a_seed_left_out_is_the_default_seed_and_not_the_one_of_the_folder(tiny, tmp_path):
    run = training.Run(tmp_path / "run")
    run.create(tiny(seed=1).resolved())
    with pytest.raises(training.RunMismatchError, match="seed: 1 -> 0"):
        run.resolve(tiny())
    drawn = tiny(objective="reference").resolved()
    other = training.Run(tmp_path / "other")
    other.create(drawn)
    assert other.resolve(tiny(objective="reference")) == drawn


def test_history_has_the_learning_rate_that_an_epoch_was_trained_with(finished):
    _, config, history = finished
    schedule = training.learning_rate_schedule(config.resolved().optimization, 6)
    np.testing.assert_allclose(history["learning_rate"], [schedule(5), schedule(11)], rtol=1e-6)


def test_a_folder_with_other_files_is_refused_and_left_alone(tiny, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(training.RunMismatchError, match=r"thesis\.tex"):
        training.fit(tiny(), tmp_path, verbose=0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": "vgg_abi"}, "WideResNets of other sizes. Received: name='vgg_abi'"),
        ({"dataset": "mnist"}, "cifar10"),
    ],
)
def test_unknown_names_are_refused_before_anything_is_written(tiny, tmp_path, flags, message):
    with pytest.raises(ValueError) as error:
        training.fit(tiny(**flags), tmp_path / "run", verbose=0)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_two_processes_do_not_train_in_one_folder(tiny, tmp_path):
    with (
        training.Run(tmp_path / "run").locked(),
        pytest.raises(training.RunMismatchError, match="Another process is training"),
    ):
        training.fit(tiny(), tmp_path / "run", verbose=0)


def test_nan_stops_training_names_the_step_and_keeps_the_last_good_checkpoint(tiny, tmp_path):
    # The second epoch's learning rate throws the weights to infinity.
    config = tiny(schedule="constant", learning_rate=1e30, warmup_learning_rates=(1e-3,), optimizer="sgd", epochs=3)
    with pytest.raises(training.NonFiniteLossError, match=r"NaN or infinite in training, at step \d+") as error:
        training.fit(config, tmp_path / "run", verbose=0)
    step = int(str(error.value).split("at step ")[1].split(".")[0])
    assert 6 < step <= 12
    run = training.Run(tmp_path / "run")
    assert [path.name for path in run.checkpoints.paths()] == ["step-00000006.npz"]
    assert all(np.isfinite(variable).all() for variable in run.load_best().variables)


def test_a_plain_model_trains_and_has_no_attention_to_draw(tiny, tmp_path):
    history = training.fit(tiny(model="vgg", epochs=1), tmp_path / "run", verbose=0)
    run = training.Run(tmp_path / "run")
    assert "rate_bits" not in history
    assert not run.attention_file.exists()
    assert "skipped" in json.loads(run.metrics_file.read_text())["suites"]["bottleneck"]


class TestCheckpoints:
    """Damage to the files training continues from."""

    @pytest.fixture
    def copied(self, finished, tmp_path):
        """A copy of the finished run, its checkpoints being of epochs 1 and 2, that has yet to be measured."""
        folder, config, _ = finished
        copy = tmp_path / "run"
        shutil.copytree(folder, copy)
        (copy / "metrics.json").unlink()
        return copy, config

    @staticmethod
    def damage(path, how):
        content = path.read_bytes()
        if how == "cut short":
            path.write_bytes(content[: len(content) // 2])
        elif how == "empty":
            path.write_bytes(b"")
        else:
            middle = len(content) // 2
            path.write_bytes(
                content[:middle] + bytes(byte ^ 255 for byte in content[middle : middle + 64]) + content[middle + 64 :]
            )

    @pytest.mark.parametrize("how", ["cut short", "empty", "flipped bits"])
    def test_a_damaged_one_is_set_aside_and_the_one_before_is_used(self, copied, how, caplog):
        folder, config = copied
        newest = training.Run(folder).checkpoints.paths()[-1]
        self.damage(newest, how)
        with caplog.at_level(logging.WARNING, "aib_tf"):
            history = training.fit(config, folder, verbose=0)
        assert f"{newest} is damaged" in caplog.text
        assert "the one before it is used" in caplog.text
        assert newest.with_name(newest.name + ".damaged").exists()
        assert history["epoch"] == [1, 2]
        assert newest in training.Run(folder).checkpoints.paths()  # epoch 2 was trained again

    def test_one_of_another_model_is_not_loaded_in_part(self, finished, tiny):
        folder, _, _ = finished
        checkpoint = training.Run(folder).checkpoints.paths()[-1]
        arrays, _ = training.checkpoints._read(checkpoint)
        model = aib_tf.models.build("vgg_aib_qt", (32, 32, 1), 10, width=0.06, latent_dim=8, num_anchors=5)
        model.compile(training.Adam(keras.optimizers.schedules.CosineDecay(1e-3, 10)))
        model.optimizer.build(model.trainable_variables)
        with pytest.raises(ValueError, match=r"are not those of this model|has shape"):
            training.checkpoints._matching(arrays, training.checkpoints._variables(model))

    def test_half_written_files_of_a_killed_process_are_removed(self, copied):
        folder, config = copied
        leftover = folder / "checkpoints" / ".0123456789ab.tmp.step-00000013.npz"
        leftover.write_bytes(b"half")
        training.fit(config, folder, verbose=0)
        assert not leftover.exists()

    def test_a_damaged_best_model_is_named(self, copied):
        folder, config = copied
        self.damage(folder / "best.keras", "cut short")
        with pytest.raises(training.RunMismatchError, match=r"best\.keras is damaged.*Delete it"):
            training.Run(folder).load_best()
        (folder / "best.keras").unlink()
        training.fit(config, folder, verbose=0)
        assert training.Run(folder).load_best().name == "vgg_aib_qt"

    @pytest.mark.parametrize("content", ["", "{}", "null"])
    def test_a_damaged_record_of_the_best_model_is_made_again_from_the_history(self, copied, content, finished):
        folder, config = copied
        expected = training.Run(finished[0]).best
        (folder / "best.json").write_text(content)
        training.fit(config, folder, verbose=0)
        assert json.loads((folder / "metrics.json").read_text())["best"] == expected

    def test_a_missing_history_is_written_again_from_the_checkpoint(self, copied, finished):
        folder, config = copied
        (folder / "history.csv").unlink()
        assert training.fit(config, folder, verbose=0) == finished[2]

    def test_a_finished_run_without_checkpoints_is_not_trained_again(self, finished, tmp_path):
        folder, config, history = finished
        copy = tmp_path / "run"
        shutil.copytree(folder, copy)
        shutil.rmtree(copy / "checkpoints")
        assert training.fit(config, copy, verbose=0) == history
        assert not (copy / "checkpoints").exists()


@pytest.mark.parametrize("content", ["", "epoch;loss\n1;0.5\n", "epoch,loss\n1\n", "epoch,loss\n1,0.5,2\n"])
def test_a_history_that_was_changed_is_named(content, tmp_path):
    run = training.Run(tmp_path)
    run.history_file.write_text(content)
    with pytest.raises(training.RunMismatchError, match=r"history\.csv cannot be read .*delete it and repeat"):
        run.read_history()


def test_beta_warmup_rises_to_one_and_stays():
    model = aib_tf.models.build("vgg_aib", (32, 32, 1), 4, width=0.02, latent_dim=4, seed=0)
    model.compile("sgd", loss=aib_tf.losses.CrossEntropyBits())
    factors = []
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: factors.append(float(model.bottleneck.warmup))
    )
    images, labels = np.zeros((12, 32, 32, 1), "float32"), np.zeros(12)
    warmup = training.BetaWarmup(steps=4)
    model.fit(images, labels, batch_size=2, epochs=1, callbacks=[warmup, watch], verbose=0)
    np.testing.assert_allclose(factors, [0.25, 0.5, 0.75, 1, 1, 1])
    assert float(model.optimizer.iterations) == 6


def test_precision_and_xla_flags_reach_the_model(tiny, tmp_path):
    config = tiny(precision="mixed_bfloat16", jit_compile="true", epochs=1)
    training.fit(config, tmp_path / "run", verbose=0)
    model = training.Run(tmp_path / "run").load_best()
    assert model.features.get_layer("block1_conv1").compute_dtype == "bfloat16"
    assert model.jit_compile is True
    assert keras.config.dtype_policy().name == "float32"
