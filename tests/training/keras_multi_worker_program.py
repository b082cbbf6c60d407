"""What each worker of test_keras_multi_worker.py does. Its argument is the folder that gets the results."""

import hashlib
import json
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from keras.src.backend.tensorflow import trainer

from aib_tf import losses, metrics, models
from aib_tf.training import SGD, Adam, collectives, keras_multi_worker

IMAGES, BATCH, CLASSES, SIZE = 37, 8, 4, 32
STEPS, EPOCHS = 4, 2
# Name -> (optimizer, dtype policy).
VARIANTS = {
    "sgd": (lambda: SGD(0.05, l2=1e-3), "float32"),
    "adam": (lambda: Adam(1e-2, use_ema=True, ema_momentum=0.5), "float32"),
    "float16": (lambda: SGD(0.05), "mixed_float16"),
}


class Penalty(keras.layers.Layer):
    """Adds the mean square of its input to the loss, and reports it as a metric of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.squares = keras.metrics.Mean(name="squares")

    def call(self, inputs):
        squares = ops.mean(ops.square(ops.cast(inputs, "float32")), axis=-1)
        self.add_loss(0.1 * ops.mean(squares))
        self.squares.update_state(squares)
        return inputs


def small_model(optimizer):
    """A compiled model with whatever Keras treats apart under tf.distribute."""
    model = keras.Sequential(
        [
            keras.Input((SIZE, SIZE, 3)),
            keras.layers.Conv2D(4, 3, strides=2, kernel_initializer=keras.initializers.GlorotUniform(0)),
            keras.layers.BatchNormalization(momentum=0.5),
            keras.layers.Flatten(),
            Penalty(),
            keras.layers.Dropout(0.5, seed=0),
            keras.layers.Dense(CLASSES, kernel_initializer=keras.initializers.GlorotUniform(1)),
        ]
    )
    return compiled(model, optimizer)


def aib_model(optimizer):
    """A compiled model of the library, with noise, quantizer, and metrics of its layers."""
    return compiled(
        models.build("vgg_aib_qt", (SIZE, SIZE, 3), CLASSES, width=0.05, latent_dim=8, num_anchors=5, seed=0), optimizer
    )


def compiled(model, optimizer):
    model.compile(optimizer, loss=losses.CrossEntropyBits(), metrics=["accuracy", metrics.LabelInformation(CLASSES)])
    return model


def evaluation_data():
    """37 images and labels."""
    generator = np.random.default_rng(0)
    images = generator.normal(size=(IMAGES, SIZE, SIZE, 3)).astype("float32")
    return images, generator.integers(0, CLASSES, IMAGES)


def evaluation_steps():
    return -(-IMAGES // BATCH)


def _distributed_evaluation_data(strategy):
    """Every image once: the last batch is ragged, and no worker is ever without an image, which Keras cannot do."""
    images, labels = evaluation_data()
    workers, steps = strategy.num_replicas_in_sync, evaluation_steps()

    def dataset(context):
        def batch(step):
            cell = step * workers + context.input_pipeline_id
            start, end = cell * IMAGES // (steps * workers), (cell + 1) * IMAGES // (steps * workers)
            return tf.constant(images)[start:end], tf.constant(labels)[start:end]

        return tf.data.Dataset.range(steps, output_type=tf.int32).map(batch).repeat()

    return strategy.distribute_datasets_from_function(dataset)


def _distributed_training_data(strategy):
    """Endless batches that are others on each worker."""

    def dataset(context):
        generator = np.random.default_rng(1 + context.input_pipeline_id)
        images = generator.normal(size=(24, SIZE, SIZE, 3)).astype("float32")
        labels = generator.integers(0, CLASSES, 24)
        batch = context.get_per_replica_batch_size(BATCH)
        return tf.data.Dataset.from_tensor_slices((images, labels)).repeat().batch(batch)

    return strategy.distribute_datasets_from_function(dataset)


class _StepLogs(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.rows = []

    def on_train_batch_end(self, batch, logs=None):
        self.rows.append({name: float(value) for name, value in logs.items()})


class _Worker:
    def __init__(self, folder):
        self.strategy = tf.distribute.MultiWorkerMirroredStrategy()
        self.index = collectives.worker_index(self.strategy)
        self.folder = folder
        self.results = {"index": self.index, "count": collectives.worker_count(self.strategy)}

    def fit(self, model, epochs=EPOCHS, **arguments):
        return model.fit(
            _distributed_training_data(self.strategy),
            epochs=epochs,
            steps_per_epoch=STEPS,
            shuffle=False,
            verbose=0,
            **arguments,
        )

    def plain_keras(self):
        with self.strategy.scope():
            model = small_model(SGD(0.05))
        try:
            self.fit(model)
        except Exception as error:
            # Which error it is changes with the version of TensorFlow.
            self.results["plain_keras_fails_with"] = f"{type(error).__name__}: {error}"

    def mend(self):
        originals = trainer.reduce_per_replica, trainer.TensorFlowTrainer._maybe_symbolic_build
        keras_multi_worker.apply()
        mended = trainer.reduce_per_replica, trainer.TensorFlowTrainer._maybe_symbolic_build
        keras_multi_worker.apply()
        self.results["mended"] = all(before is not after for before, after in zip(originals, mended, strict=True))
        self.results["mended_once"] = mended == (
            trainer.reduce_per_replica,
            trainer.TensorFlowTrainer._maybe_symbolic_build,
        )

    def train(self, name):
        optimizer, policy = VARIANTS[name]
        keras.config.set_dtype_policy(policy)
        with self.strategy.scope():
            model = small_model(optimizer())
        keras.config.set_dtype_policy("float32")
        logs = _StepLogs()
        history = self.fit(
            model,
            callbacks=[logs],
            validation_data=_distributed_evaluation_data(self.strategy),
            validation_steps=evaluation_steps(),
        ).history
        self.results[name] = {"history": history, "steps": logs.rows}
        self.keep(name, model)
        return model

    def overflow(self):
        """Trains two steps under mixed_float16 where the gradients of worker 1 alone are infinite."""
        with self.strategy.scope():
            dense = keras.layers.Dense(3, kernel_initializer="zeros")
            model = keras.Sequential([keras.Input((4,)), dense])
            # In float32, so that it is the images that decide what overflows.
            model.compile(keras.optimizers.LossScaleOptimizer(SGD(0.05)), loss="mean_squared_error")
        images = np.full((4, 4), 3e38 if self.index == 1 else 1.0, "float32")
        dataset = tf.data.Dataset.from_tensors((images, np.ones((4, 3), "float32"))).repeat()
        model.fit(
            self.strategy.distribute_datasets_from_function(lambda _: dataset),
            steps_per_epoch=2,
            shuffle=False,
            verbose=0,
        )
        self.results["overflow"] = {
            "kernel": np.asarray(dense.kernel).tolist(),
            "steps": int(np.asarray(model.optimizer.inner_optimizer.iterations)),
            "scale": float(np.asarray(model.optimizer.dynamic_scale)) / model.optimizer.initial_scale,
        }

    def save(self, model):
        """Saves the model on the chief alone, as a run does, while the others go on to what comes next."""
        if self.index == 0:
            model.save(self.folder / "chief.keras")

    def keep(self, name, model):
        """Writes this worker's values of all variables but the metrics', each of which is a collective to read."""
        groups = {
            "trainable": model.trainable_variables,
            "non_trainable": [v for v in model.non_trainable_variables if "seed_generator" not in v.path],
            "optimizer": model.optimizer.variables,
        }
        arrays = {
            f"{group}/{number}/{variable.path}": np.asarray(variable)
            for group, variables in groups.items()
            for number, variable in enumerate(variables)
        }
        np.savez(self.folder / f"{name}-{self.index}.npz", **arrays)

    def evaluate(self, name, model):
        """Evaluates with the chief's weights, which are the same but for the moving averages of normalisation."""
        weights = collectives.broadcast(self.strategy, model.get_weights())
        model.set_weights(weights)
        results = model.evaluate(
            _distributed_evaluation_data(self.strategy), steps=evaluation_steps(), verbose=0, return_dict=True
        )
        predictions = model.predict(_distributed_evaluation_data(self.strategy), steps=evaluation_steps(), verbose=0)
        self.results[f"{name}_evaluation"] = results
        np.savez(self.folder / f"{name}-evaluated-{self.index}.npz", *weights, predictions=predictions)

    def logs(self):
        """Reduces a step's logs of which one is not a number on one worker."""
        index = self.index

        def step():
            nan = tf.constant(np.nan if index == 1 else 0.0)
            return {"nan": nan, "vector": tf.constant([index, 2.0]), "half": tf.constant(index, tf.float16)}

        @tf.function
        def reduced():
            return trainer.reduce_per_replica(self.strategy.run(step), self.strategy, "auto")

        graph = reduced.get_concrete_function().graph
        collective = [operation for operation in graph.get_operations() if operation.type.startswith("Collective")]
        self.results["logs"] = {name: np.asarray(value, "float32").tolist() for name, value in reduced().items()}
        self.results["log_dtypes"] = {name: value.dtype.name for name, value in reduced().items()}
        self.results["log_collectives"] = [
            operation.type for operation in collective if operation.type.startswith("CollectiveReduce")
        ]

    def exchange(self):
        arrays = exchanged_arrays()
        received = collectives.broadcast(self.strategy, arrays if self.index == 0 else None)
        self.results["received"] = [describe(array) for array in received]
        self.results["received_nothing"] = collectives.broadcast(self.strategy, [] if self.index == 0 else None)
        self.results["texts"] = collectives.gather_texts(self.strategy, exchanged_texts()[self.index])
        self.results["empty_texts"] = collectives.gather_texts(self.strategy, "")

    def write(self):
        (self.folder / f"results-{self.index}.json").write_text(json.dumps(self.results))


def exchanged_arrays():
    """Arrays of all dtypes that a model's variables have, odd values and shapes, and more than one chunk of bytes."""
    generator = np.random.default_rng(2)
    arrays = [generator.normal(size=(3, 5)).astype(dtype) for dtype in ("float32", "float64", "float16")]
    arrays += [np.asarray(tf.cast(generator.normal(size=7), tf.bfloat16)), np.array([True, False, True])]
    arrays += [
        np.array([-(2**31), 2**31 - 1], "int32"),
        np.array([-(2**63), 2**63 - 1]),
        np.array([0, 2**32 - 1], "uint32"),
    ]
    arrays += [np.array(7, "int64"), np.zeros((0, 4), "float32"), np.arange(6.0).reshape(2, 3).T]
    # A NaN that carries bits, -0 and the smallest number: arithmetic would not keep them all.
    arrays += [np.array([0x7F800001, 0x80000000, 1], "uint32").view("float32")]
    arrays += [generator.integers(0, 2**32, 9 * 2**20 + 3, "uint32"), np.array([5], "uint8")]
    return arrays


def exchanged_texts():
    """A text for each of two workers: of different lengths, not ASCII, and not even UTF-8."""
    return ["", "grüße \udc80 \U0001f642"]


def describe(array):
    """Everything about an array that has to arrive, in a form that JSON has."""
    return [str(array.dtype), list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]


def main(folder):
    worker = _Worker(Path(folder))
    worker.plain_keras()
    worker.mend()
    for name in VARIANTS:
        model = worker.train(name)
        if name == "sgd":
            worker.evaluate("small", model)
    with worker.strategy.scope():
        model = aib_model(Adam(1e-3))
    worker.results["aib"] = {"history": worker.fit(model, epochs=1).history, "steps": []}
    worker.keep("aib", model)
    worker.evaluate("aib", model)
    worker.save(model)
    worker.overflow()
    worker.logs()
    worker.exchange()
    worker.write()


if __name__ == "__main__":
    main(sys.argv[1])
