"""Two logical CPUs, so that tests of tf.distribute have two devices. It must happen before TensorFlow starts."""

import keras
import pytest

if keras.config.backend() == "tensorflow":
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)


def pytest_addoption(parser):
    parser.addoption(
        "--check_gpu", action="store_true", help="end with an error unless TensorFlow has a GPU, and an op for it"
    )


def pytest_configure(config):
    if not config.getoption("check_gpu"):
        return
    if keras.config.backend() != "tensorflow":
        raise pytest.UsageError(f"--check_gpu looks at TensorFlow, and the backend is {keras.config.backend()}.")
    from aib_tf import ops

    if not tf.config.list_physical_devices("GPU"):
        raise pytest.UsageError("--check_gpu: TensorFlow sees no GPU, so that every test would run on the CPU.")
    if ops.implementation().name != "custom_op":
        raise pytest.UsageError(f"--check_gpu: {ops.implementation().reason}")
