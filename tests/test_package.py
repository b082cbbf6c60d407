"""The package as a whole: what importing it costs and brings."""

import subprocess
import sys

import keras
import numpy as np
import pytest

import aib_tf


def test_importing_costs_less_than_half_a_second_over_tensorflow():
    program = (
        "import time, tensorflow\nbegan = time.process_time()\nimport aib_tf\n"
        "import sys; print(time.process_time() - began)\n"
        "print('tensorflow_datasets' in sys.modules or 'aib_tf.training' in sys.modules)\n"
    )
    outputs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(2)
    ]
    assert min(float(seconds) for seconds, _ in outputs) < 0.5
    assert outputs[0][1] == "False"


@pytest.mark.parametrize("optimizer", [aib_tf.training.SGD, aib_tf.training.Adam])
def test_importing_is_enough_to_load_a_model_that_was_trained(optimizer, tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer(0.1), loss="mse")
    model.fit(np.ones((2, 2)), np.ones(2), verbose=0)
    model.save(tmp_path / "best.keras")
    program = f"import keras, aib_tf\nprint(keras.saving.load_model({str(tmp_path / 'best.keras')!r}).optimizer.name)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == model.optimizer.name, result.stderr


def test_every_exported_name_is_there_once():
    for module in (
        aib_tf,
        aib_tf.ops,
        aib_tf.layers,
        aib_tf.models,
        aib_tf.data,
        aib_tf.training,
        aib_tf.evaluation,
        aib_tf.export,
        aib_tf.serving,
    ):
        assert all(hasattr(module, name) for name in module.__all__), module.__name__
        assert len(set(module.__all__)) == len(module.__all__)


def test_public_functions_and_classes_say_what_they_do():
    for module in (
        aib_tf.ops,
        aib_tf.layers,
        aib_tf.models,
        aib_tf.data,
        aib_tf.training,
        aib_tf.losses,
        aib_tf.metrics,
    ):
        for name in getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")]):
            value = getattr(module, name)
            if callable(value) and getattr(value, "__module__", "").startswith("aib_tf"):
                assert (value.__doc__ or "").strip(), f"{module.__name__}.{name} has no docstring"
