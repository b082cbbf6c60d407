"""The benchmark of scaling runs, refuses replicas that train something else, and reads traces and sums rightly."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import aib_tf

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def load(name, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)  # it imports its neighbour
    monkeypatch.setattr(sys, "path", [*sys.path])  # and puts this checkout in front
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def scaling(monkeypatch):
    return load("scaling", monkeypatch)


@pytest.fixture
def worker(monkeypatch):
    return load("scaling_worker", monkeypatch)


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores to pin to"
)
def test_one_core_two_replicas_and_two_workers_are_timed():
    command = [sys.executable, str(BENCHMARKS / "scaling.py"), "--quick"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("checked: ") == 3  # the replicas, and each of the workers
    lines = [line.split() for line in result.stdout.splitlines()]
    rows = {" ".join(line[:-7]): line[-7:] for line in lines if line and line[-1].endswith("%")}
    assert rows["1 replica, 1 core"][-3::2] == ["100%", "100%"]
    assert {"2 replicas, 2 cores", "2 workers, 1 core each"} <= {*rows}
    kinds = {line[0] + " " + line[1]: line[2:] for line in lines if len(line) > 4}
    # Replicas exchange all gradients at once.
    assert [float(value) for value in kinds["all-reduces in"][-2:]] == [0.0, 1.0]
    for kind in ("convolutions, matrix", "batch normalisation", "input pipeline"):
        assert len([value for value in kinds[kind] if value.endswith("%)")]) == 2
    for title in ("steps_per_execution=8", "at full width", "all-reduce in ms", "synchronised normalisation adds"):
        assert title in result.stdout


def test_replicas_that_train_alike_are_accepted(scaling, capsys):
    scaling.require_same_losses("2 replicas", [9.0005, 8.8003, 8.7], [9.0, 8.8, 8.7])
    assert "checked: 2 replicas, losses as 1 replica, but for 6e-05" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([9.01, 8.81, 8.71], [9.0, 8.8, 8.7]),
        ([9.0, np.nan, 8.7], [9.0, 8.8, 8.7]),
        ([9.0, 8.9995, 8.9992], [9.0, 8.9996, 8.9992]),  # as near, and another step
        ([9.0, 9.0, 9.0], [9.0, 9.0, 9.0]),  # where nothing changes, nothing is shown
    ],
)
def test_replicas_that_train_something_else_are_not_timed(scaling, found, expected):
    with pytest.raises(AssertionError, match="2 replicas: "):
        scaling.require_same_losses("2 replicas", found, expected)


def test_a_process_that_fails_shows_its_message(scaling, monkeypatch, tmp_path):
    (tmp_path / "scaling_worker.py").write_text("raise SystemExit('no such device')")
    monkeypatch.setattr(scaling, "HERE", tmp_path)
    cores = os.sched_getaffinity(0)
    with pytest.raises(RuntimeError, match="no such device"), scaling.Process(cores, tmp_path, "alone") as process:
        scaling.ask([process], "load")


def test_the_replica_that_comes_last_shows_how_long_an_exchange_takes(scaling):
    first = {"steps": 2, "step": 30.0, "input_wait": 1.0, "operations": {"quantizer": 2.0}}
    second = {"steps": 2, "step": 32.0, "input_wait": 3.0, "operations": {"quantizer": 4.0, "optimizer": 1.0}}
    # Worker 1 comes 6 ms later the first time, worker 0 2 ms the second time; the exchange takes 4 ms, then 3.
    first["exchanges"] = [[10.0, 20.0], [42.0, 45.0]]
    second["exchanges"] = [[16.0, 20.1], [40.0, 45.1]]
    found = scaling.summary([first, second], replicas=2)
    assert found["step"] == 31.0
    assert found["input_wait"] == 2.0
    assert found["exchanges"] == 1.0
    expected = {"quantizer": 3.0, "optimizer": 0.5, "all-reduce": (4.1 + 3.0) / 2}
    assert found["operations"] == pytest.approx(expected)
    assert found["exchange_wait"] == pytest.approx(((10 - 4.1) / 2 + (5.1 - 3) / 2) / 2)
    with pytest.raises(ValueError, match="Not all replicas took part"):
        scaling.summary([first, {**second, "exchanges": second["exchanges"][:1]}], replicas=2)


def test_an_event_counts_without_those_inside_it(worker):
    events = [("step", 0.0, 10.0), ("a", 1.0, 3.0), ("b", 2.0, 1.0), ("a", 5.0, 5.0), ("after", 10.0, 2.0)]
    totals = {}
    for name, seconds in worker.own_times(events[::-1]):
        totals[name] = totals.get(name, 0.0) + seconds
    assert totals == {"step": 2.0, "a": 7.0, "b": 1.0, "after": 2.0}


def test_a_trace_without_steps_is_refused(worker, tmp_path):
    path = tmp_path / "empty.xplane.pb"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="no steps"):
        worker.read_trace(path)


def test_what_a_network_exchanges_is_what_its_gradients_take(worker):
    model = aib_tf.models.build("wrn_10_1_aib_qt", (32, 32, 3), 10)
    (found,) = worker.networks([("wrn_10_1_aib_qt", (32, 32, 3), 10)])
    assert found["bytes"] == sum(np.asarray(variable).nbytes for variable in model.trainable_variables)
    assert found["tensors"] == len(model.trainable_variables)
    with tf.Graph().as_default() as graph:
        images = tf.nn.conv2d(tf.zeros((1, 8, 8, 3)), tf.zeros((3, 3, 3, 5)), strides=2, padding="SAME")
        tf.matmul(tf.reshape(images, (1, 80)), tf.zeros((80, 7)))
    assert sum(map(worker._multiplications, graph.get_operations())) == 4 * 4 * 5 * 27 + 80 * 7


def test_a_ring_sends_almost_twice_the_bytes_and_machines_exchange_parts(scaling):
    fabric = scaling.Fabric(node=4, inner=100.0, outer=10.0, inner_latency=0.5, outer_latency=2.0)
    assert scaling.all_reduce_seconds(800, 1, fabric) == 0.0
    assert scaling.all_reduce_seconds(800, 4, fabric) == pytest.approx(2 * 3 / 4 * 8 + 6 * 0.5)
    # Each of the 4 GPUs of a machine exchanges 200 bytes with those of the other.
    assert scaling.all_reduce_seconds(800, 8, fabric) == pytest.approx(12 + 3 + 2 * 1 / 2 * 20 + 2 * 2.0)


def test_efficiency_is_lost_to_what_nothing_hides(scaling):
    fabric = scaling.Fabric(node=2, inner=100.0, inner_latency=0.0)
    assert scaling.expected_efficiency(3.0, 100, 1, fabric) == 1.0
    assert scaling.expected_efficiency(3.0, 100, 2, fabric) == pytest.approx(0.75)
    assert scaling.expected_efficiency(3.0, 100, 2, fabric, overlap=1.0) == 1.0
    # Where images come slowly, the exchange matters less.
    assert scaling.expected_efficiency(3.0, 100, 2, fabric, input_seconds=9.0) == pytest.approx(0.9)
