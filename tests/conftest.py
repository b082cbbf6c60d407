"""Two logical CPUs, so that tests of tf.distribute have two devices. It must happen before TensorFlow starts."""

import keras

if keras.config.backend() == "tensorflow":
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
