"""Checkpoints: written beside training, kept by policy; and what a run asks of its disk."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

from aib_tf import files, training
from aib_tf.training import checkpoints as module
from aib_tf.training import distribution
from aib_tf.training.checkpoints import Checkpoints, Progress, assign_metrics, metric_values, size_of

NEVER_SECONDS = 120  # only something that hangs waits so long


@pytest.fixture(scope="module")
def model():
    return small_model()


def small_model(width=3, dtype="bfloat16"):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Input((4,)),
            keras.layers.Dense(width, name="first"),
            keras.layers.BatchNormalization(name="normalization"),
            keras.layers.GaussianNoise(0.1, seed=1, name="noise"),
            keras.layers.Dense(3, dtype=dtype, name="last"),
        ],
        name="small",
    )
    model.compile("adam", "mse", metrics=["mae"])
    model.optimizer.build(model.trainable_variables)
    return model


def names(checkpoints):
    return [path.name for path in checkpoints.paths()]


class HeldBack:
    """Stands in for `np.savez`, and holds the writing thread until `go` is set."""

    def __init__(self, monkeypatch):
        self.begun, self.go = threading.Semaphore(0), threading.Event()
        self.original = np.savez
        monkeypatch.setattr(np, "savez", self)

    def __call__(self, *args, **kwargs):
        self.begun.release()
        assert self.go.wait(NEVER_SECONDS)
        self.original(*args, **kwargs)


def test_a_checkpoint_holds_the_values_at_the_time_of_saving(model, tmp_path, monkeypatch):
    writer = HeldBack(monkeypatch)
    checkpoints = Checkpoints(tmp_path)
    progress = Progress(1, 2, [{"loss": 3.0}], {"mae/total": np.float32(4)})
    expected = checkpoints.values(model, progress)
    checkpoints.save(model, progress, step=7)
    assert writer.begun.acquire(timeout=NEVER_SECONDS)
    before = [np.array(variable) for variable in model.variables]
    for variable in model.variables:
        variable.assign(keras.ops.zeros_like(variable))
    progress.rows.append({"loss": 5.0})
    progress.epoch = 2
    writer.go.set()
    arrays, restored = checkpoints.read_newest()
    assert restored == Progress(1, 2, [{"loss": 3.0}], {"mae/total": np.float32(4)})
    assert list(arrays) == [name for name in expected if not name.startswith("metric/")]
    for name, value in arrays.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    checkpoints.apply(model, arrays)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value, err_msg=variable.path)


def test_one_write_at_a_time_and_readers_wait_for_it(model, tmp_path, monkeypatch):
    writer = HeldBack(monkeypatch)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(model, Progress(), step=1)
    assert writer.begun.acquire(timeout=NEVER_SECONDS)
    seen = []

    def save_and_look():
        checkpoints.save(model, Progress(), step=2)
        seen.extend(names(checkpoints))

    second = threading.Thread(target=save_and_look)
    second.start()
    assert not writer.begun.acquire(timeout=0.3)  # the second write has not begun
    assert list(tmp_path.glob("step-*")) == []
    writer.go.set()
    second.join(NEVER_SECONDS)
    assert seen == ["step-00000001.npz", "step-00000002.npz"]


@pytest.mark.parametrize("at", ["save", "wait", "paths", "restore"])
def test_a_full_disk_is_told_at_the_next_call_and_what_was_there_stays(model, tmp_path, monkeypatch, at):
    checkpoints = Checkpoints(tmp_path, kept=1)
    checkpoints.save(model, Progress(), step=1)
    checkpoints.wait()
    with monkeypatch.context() as patch:

        def full(file, **arrays):
            file.write(b"half")
            raise OSError(28, os.strerror(28))

        patch.setattr(np, "savez", full)
        checkpoints.save(model, Progress(), step=2)
        call = {
            "save": lambda: checkpoints.save(model, Progress(), step=3),
            "restore": lambda: checkpoints.restore(model),
        }
        with pytest.raises(OSError, match=r"No space left on device.*stay.*Received: path='.*step-00000002\.npz'"):
            call.get(at, getattr(checkpoints, at))()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.npz"]
    checkpoints.save(model, Progress(), step=3)  # room was made
    assert names(checkpoints) == ["step-00000003.npz"]


def test_only_whole_checkpoints_of_our_own_names_are_removed(model, tmp_path):
    others = [
        "step-00000001.npz.damaged",
        "step-00000001 (copy).npz",
        "step-1.npz",
        ".0123456789ab.tmp.step-00000001.npz",
    ]
    for name in others:
        files.write_text(tmp_path / name, "")
    checkpoints = Checkpoints(tmp_path, kept=3)
    for step in range(1, 6):
        checkpoints.save(model, Progress(), step)
    assert names(checkpoints) == ["step-00000003.npz", "step-00000004.npz", "step-00000005.npz"]
    assert {path.name for path in tmp_path.iterdir()} == {*others, *names(checkpoints)}
    for kept in (0, True, 1.5):
        with pytest.raises(ValueError, match=f"Received: kept={kept}"):
            Checkpoints(tmp_path, kept)


def test_the_newest_checkpoint_stays_though_an_epoch_has_fewer_steps_than_before(model, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(model, Progress(100), step=500)
    for epoch, step in ((101, 404), (102, 408)):
        checkpoints.save(model, Progress(epoch), step)
    assert names(checkpoints) == ["step-00000501.npz", "step-00000502.npz"]
    assert checkpoints.read_newest()[1].epoch == 102


def test_a_checkpoint_of_another_model_changes_nothing(model, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(small_model(width=5), Progress(), step=1)
    before = checkpoints.values(model, Progress())
    with pytest.raises(ValueError, match=r"has shape \(4, 5\), not \(4, 3\).*Received:"):
        checkpoints.restore(model)
    for name, value in checkpoints.values(model, Progress()).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_without_a_checkpoint_there_is_none_to_read(model, tmp_path):
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.read_newest() is None
    assert checkpoints.restore(model) == Progress()
    assert not (tmp_path / "none").exists()


def test_python_waits_for_a_write_before_it_exits(tmp_path):
    # Ctrl-C comes while the thread writes.
    program = """
import signal, sys, time
import numpy as np
from aib_tf.training.checkpoints import Checkpoints, Progress
original = np.savez
def slow(*args, **kwargs):
    print("writing", flush=True)
    time.sleep(1)
    original(*args, **kwargs)
np.savez = slow
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without it
Checkpoints(sys.argv[1]).write({"a": np.arange(1_000_000)}, Progress(epoch=3), step=9)
time.sleep(600)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=NEVER_SECONDS)
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000009.npz"]
    arrays, progress = Checkpoints(tmp_path).read_newest()
    np.testing.assert_array_equal(arrays["a"], np.arange(1_000_000))
    assert progress.epoch == 3


def test_two_replicas_get_their_state_and_their_metrics_back(tmp_path):
    strategy = distribution.strategy("mirrored")
    with strategy.scope():
        model = small_model(dtype="float32")
    generator = np.random.default_rng(0)
    images, labels = generator.random((20, 4), "float32"), generator.random((20, 3), "float32")
    model.fit(images, labels, batch_size=10, verbose=0)
    metrics = metric_values(model)
    assert metrics["loss/count"] == 20
    per_replica = [part.numpy() for part in module.metric_variables(model)["loss/count"].value.values]
    assert per_replica == [10, 10]  # a sum that each replica has a part of
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(model, Progress(metrics=metrics), step=2)
    expected = checkpoints.values(model, Progress())
    model.fit(images, labels, batch_size=10, verbose=0)
    progress = checkpoints.restore(model)
    model.reset_metrics()
    assign_metrics(model, progress.metrics)
    assert list(metric_values(model)) == list(metrics)
    for name, value in metric_values(model).items():
        np.testing.assert_allclose(value, metrics[name], rtol=1e-6, err_msg=name)
    for name, variable in module._variables(model).items():
        for part in variable.value.values:  # of each replica
            np.testing.assert_array_equal(part.numpy(), expected[name], err_msg=name)
    alone = small_model(dtype="float32")  # the state of two replicas serves one
    checkpoints.restore(alone)
    for name, value in checkpoints.values(alone, Progress()).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_the_size_of_a_checkpoint_is_foretold(tmp_path):
    model = small_model(width=1000)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(model, Progress(), step=1)
    (path,) = checkpoints.paths()
    assert 0.8 * size_of(model) < path.stat().st_size <= size_of(model)


class TestStorage:
    """What a run asks of its disk before it starts."""

    @pytest.fixture
    def room(self, monkeypatch):
        """Sets how many bytes are free."""

        def room(free):
            usage = shutil.disk_usage("/")._replace(free=int(free))
            monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)

        return room

    def test_room_is_needed_for_one_checkpoint_more_than_are_kept(self, model, tmp_path, room):
        size = size_of(model)
        needed = (4 + 1) * size + 2 * size + 0.5e6 * 20 + 10e6
        run = training.Run(tmp_path / "a" / "run", checkpoints_kept=4)
        room(needed)
        run.check_storage(model, epochs=20)
        assert list(run.path.iterdir()) == []
        shutil.rmtree(tmp_path / "a")
        room(needed - 1)
        with pytest.raises(OSError, match=r"has 20\.\d MB free, and the run needs 20\.\d MB.*Received: path=") as error:
            run.check_storage(model, epochs=20)
        assert "checkpoints_kept" in str(error.value)
        assert list(tmp_path.iterdir()) == []

    def test_what_is_there_already_counts(self, model, tmp_path, room):
        run = training.Run(tmp_path, checkpoints_kept=1)
        for step in (1, 2):
            run.checkpoints.save(model, Progress(), step)
        files.write_text(run.best_file, "")
        (there,) = (path.stat().st_size for path in run.checkpoints.paths())
        needed = 4 * size_of(model) - there + 10e6
        room(needed)
        run.check_storage(model, epochs=0)
        room(needed - 1)
        with pytest.raises(OSError, match="Make room"):
            run.check_storage(model, epochs=0)

    def test_a_folder_that_cannot_be_written_to_is_refused(self, model, tmp_path):
        files.write_text(tmp_path / "file", "")
        with pytest.raises(OSError, match=r"cannot be written to .*Received: path='.*file/run'"):
            training.Run(tmp_path / "file" / "run").check_storage(model, epochs=1)

    def test_a_bucket_needs_room_in_the_temporary_folder(self, model, room):
        run = training.Run("ram://room/run")
        room(2 * size_of(model))
        run.check_storage(model, epochs=1000)
        assert not list(run.path.iterdir())
        room(2 * size_of(model) - 1)
        with pytest.raises(OSError, match=r"TMPDIR.*Received: path='ram://room/run'"):
            run.check_storage(model, epochs=1000)


def test_a_run_in_a_bucket_is_interrupted_and_continued(tiny, monkeypatch, caplog):
    folder = "ram://bucket/runs/tiny"
    run = training.Run(folder)
    original = training.callbacks.Recorder.on_train_batch_end

    def stopping(recorder, batch, logs=None):
        if int(recorder.model.optimizer.iterations) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        original(recorder, batch, logs)

    with monkeypatch.context() as patch:
        patch.setattr(training.callbacks.Recorder, "on_train_batch_end", stopping)
        with pytest.raises(training.TrainingInterrupted, match="step 9"):
            training.fit(tiny(), folder, verbose=0)
    assert names(run.checkpoints) == ["step-00000006.npz", "step-00000009.npz"]
    damaged, _ = run.checkpoints.paths()[-1], files.write_bytes(run.checkpoints.paths()[-1], b"half")
    with caplog.at_level(logging.INFO, "aib_tf"):
        history = training.fit(tiny(), folder, verbose=0)
    assert f"{damaged} is damaged" in caplog.text
    assert "after epoch 1 of 2, batch 0 of 6" in caplog.text
    assert history["epoch"] == [1, 2]
    assert run.read_history() == history == training.fit(tiny(), folder, verbose=0)
    assert run.best["value"] == max(history["val_accuracy"])
    assert run.load_best().name == "vgg_aib_qt"
    assert {path.name for path in run.path.iterdir()} == {
        "attention.png",
        "best.json",
        "best.keras",
        "checkpoints",
        "config.json",
        "curves.png",
        "history.csv",
        "metrics.json",
        "tensorboard",
    }
    assert {path.name for path in run.checkpoints.folder.iterdir()} == {
        "step-00000006.npz",
        "step-00000009.npz.damaged",
        "step-00000012.npz",
    }
    for path in (run.attention_file, run.curves_file):
        assert path.read_bytes().startswith(b"\x89PNG")
    events = [str(path) for path in run.tensorboard_folder.iterdir()]
    assert sum(1 for _ in tf.data.TFRecordDataset(events)) > 20
    with pytest.raises(training.RunMismatchError, match=r"beta: 0.01 -> 0.5"):
        training.fit(tiny(beta=0.5), folder, verbose=0)
