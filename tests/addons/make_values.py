"""Makes values.json: what the real tensorflow-addons 0.23 gives for small inputs.

It runs on its own, since tensorflow-addons cannot be imported beside Keras 3. From this folder, with Python 3.11:

    python3.11 -m venv /tmp/addons
    /tmp/addons/bin/pip install tensorflow-cpu==2.15.1 tensorflow-addons==0.23.0 tqdm==4.70.1
    /tmp/addons/bin/python make_values.py

Inputs are stored beside the results, so that nothing has to be drawn again, and the versions beside both.
"""

import contextlib
import io
import json
import pathlib
import platform
import warnings

import numpy as np

with warnings.catch_warnings():  # Addons announces its end.
    warnings.simplefilter("ignore")
    import tensorflow as tf
    import tensorflow_addons as tfa

import keras
import tqdm

OUTPUT = pathlib.Path(__file__).with_name("values.json")

RANDOM = np.random.default_rng(0)


def short(shape):
    """Normal numbers, float32, exact in a few decimal digits."""
    return (np.round(RANDOM.normal(size=shape) * 64) / 64).astype("float32")


START = np.float32([1, -2, 3, -4])
GRADIENTS = short((6, 4))


class Weight(tf.keras.layers.Layer):
    """A layer with one weight of the given name."""

    def __init__(self, name, weight):
        super().__init__(name=name)
        self.weight = self.add_weight(weight, START.shape, initializer=tf.constant_initializer(START))


def trajectories(optimizer, *variables, after_step=lambda: None):
    """The variables after each step with the stored gradients: one list of (4,) a variable."""
    values = [[] for _ in variables]
    for gradient in GRADIENTS:
        optimizer.apply_gradients([(tf.constant(gradient), variable) for variable in variables])
        after_step()
        for steps, variable in zip(values, variables, strict=True):
            steps.append(variable.numpy())
    return values


def steps_of(values):
    """A rate that goes from the first of two values to the second after three steps."""
    return tf.keras.optimizers.schedules.PiecewiseConstantDecay([2], values)


def multi_optimizer():
    result = {"learning_rate": 0.1, "anchor_learning_rate": 0.00625, "momentum": 0.9}
    for name, kind, settings in [
        ("sgd", tf.keras.optimizers.legacy.SGD, {"momentum": 0.9}),
        ("adam", tf.keras.optimizers.legacy.Adam, {}),
    ]:
        kernel, anchors = Weight("dense", "kernel"), Weight("quantizer", "anchors")
        network, quantizer = kind(0.1, **settings), kind(0.00625, **settings)
        optimizer = tfa.optimizers.MultiOptimizer([(network, kernel), (quantizer, anchors)])
        kernel_steps, anchors_steps = trajectories(optimizer, kernel.weight, anchors.weight)
        result[name] = {"kernel": kernel_steps, "anchors": anchors_steps}
    return result


def sgdw():
    result = {"learning_rate": [0.1, 0.02], "weight_decay": [0.05, 0.01], "momentum": 0.9}
    for name, rate, decay in [
        ("constant", 0.1, 0.05),
        ("both_scheduled", steps_of([0.1, 0.02]), steps_of([0.05, 0.01])),
        ("rate_scheduled", steps_of([0.1, 0.02]), 0.05),
    ]:
        variable = tf.Variable(START)
        optimizer = tfa.optimizers.SGDW(weight_decay=decay, learning_rate=rate, momentum=0.9)
        [result[name]] = trajectories(optimizer, variable)
    return result


def moving_average():
    result = {"learning_rate": 0.1, "average_decay": 0.75}
    for name, start_step in [("default", 0), ("start_step_1", 1)]:
        variable, averages = tf.Variable(START), []
        optimizer = tfa.optimizers.MovingAverage(
            tf.keras.optimizers.legacy.SGD(0.1), average_decay=0.75, start_step=start_step
        )

        def note(optimizer=optimizer, variable=variable, averages=averages):
            averages.append(optimizer.get_slot(variable, "average").numpy())

        [weights] = trajectories(optimizer, variable, after_step=note)
        optimizer.assign_average_vars([variable])
        result[name] = {"weights": weights, "averages": averages, "assigned": variable.numpy()}
    return result


def adaptive_average_pooling():
    images = short((2, 6, 12, 2))
    result = {"images": images, "outputs": []}
    for output_size in [1, 2, 3, 6, (2, 4), (6, 12)]:
        output = tfa.layers.AdaptiveAveragePooling2D(output_size)(images)
        result["outputs"].append({"output_size": output_size, "output": output.numpy()})
    try:
        tfa.layers.AdaptiveAveragePooling2D(5)(images)
    except tf.errors.InvalidArgumentError as error:
        result["error_of_output_size_5"] = type(error).__name__
    return result


def cutout():
    size, mask, fill, draws = 5, 2, -1, 1000
    image = np.arange(size * size * 2, dtype="float32").reshape(1, size, size, 2)
    offsets = [(top + mask // 2, left + mask // 2) for top in range(size - 1) for left in range(size - 1)]
    cut = [tfa.image.cutout(image, mask, offset, constant_values=fill)[0].numpy() for offset in offsets]
    tf.random.set_seed(0)
    drawn = tfa.image.random_cutout(np.repeat(image, draws, axis=0), mask, constant_values=fill).numpy()
    erased = drawn[..., 0] == fill
    return {
        "image": image[0].astype(int),
        "mask_size": mask,
        "constant_values": fill,
        "offsets": offsets,
        "cutout": [image.astype(int) for image in cut],
        "random_cutout_tops": np.bincount(erased.any(2).argmax(1), minlength=size),
        "random_cutout_lefts": np.bincount(erased.any(1).argmax(1), minlength=size),
    }


def f1_score():
    labels = RANDOM.integers(0, 3, size=(2, 8))
    exclusive = np.eye(4, dtype="float32")[labels]  # the last class never occurs
    several = RANDOM.integers(0, 2, size=(2, 8, 4)).astype("float32")
    scores = (RANDOM.integers(1, 48, size=(2, 8, 4)) + 16 * exclusive).astype("float32") / 64
    sample_weight = RANDOM.integers(1, 9, size=(2, 8)).astype("float32") / 4
    cases = []
    for truth, threshold in [("exclusive", None), ("several", 0.5)]:
        for average in [None, "micro", "macro", "weighted"]:
            for weighted in [False, True]:
                metric = tfa.metrics.F1Score(num_classes=4, average=average, threshold=threshold)
                for batch in range(2):
                    metric.update_state(
                        {"exclusive": exclusive, "several": several}[truth][batch],
                        scores[batch],
                        sample_weight=sample_weight[batch] if weighted else None,
                    )
                cases.append(
                    {
                        "truth": truth,
                        "threshold": threshold,
                        "average": average,
                        "weighted": weighted,
                        "score": metric.result().numpy(),
                    }
                )
    return {
        "exclusive": exclusive,
        "several": several,
        "scores": scores,
        "sample_weight": sample_weight,
        "cases": cases,
    }


def cohen_kappa():
    # Class 2 of the five is in neither: the distance from 1 to 3 must stay 2 all the same.
    truth = np.array([[4, 4, 3, 4, 0, 4, 1, 1], [0, 3, 3, 1, 4, 0, 1, 3]])
    predicted = np.array([[4, 4, 3, 4, 4, 0, 1, 1], [1, 3, 4, 1, 3, 0, 3, 3]])
    sample_weight = np.array([[1, 1, 2, 5, 10, 2, 3, 3], [4, 1, 1, 2, 6, 1, 2, 3]], "float32")
    cases = []
    for weightage in [None, "linear", "quadratic"]:
        for weighted in [False, True]:
            metric = tfa.metrics.CohenKappa(num_classes=5, weightage=weightage, sparse_labels=True)
            for batch in range(2):
                metric.update_state(
                    truth[batch], predicted[batch], sample_weight=sample_weight[batch] if weighted else None
                )
            cases.append({"weightage": weightage, "weighted": weighted, "kappa": metric.result().numpy()})
    return {
        "num_classes": 5,
        "truth": truth,
        "predicted": predicted,
        "sample_weight": sample_weight,
        "cases": cases,
    }


def progress_bar():
    """What the bars of a fit with 2 epochs of 3 steps count."""
    model = tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(2,))])
    model.compile("sgd", "mse")
    bars = tfa.callbacks.TQDMProgressBar()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        model.fit(np.zeros((6, 2)), np.zeros((6, 1)), batch_size=2, epochs=2, verbose=0, callbacks=[bars])
    overall, epoch = bars.overall_progress_tqdm, bars.epoch_progress_tqdm
    return {"epochs": [overall.n, overall.total], "steps": [epoch.n, epoch.total]}


def plain(value):
    """NumPy to what JSON knows; a float32 in the fewest digits that name it."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, np.ndarray):
        return plain(list(value))
    if isinstance(value, np.floating):
        return float(str(value))
    return int(value) if isinstance(value, np.integer) else value


def main():
    values = {
        "made_by": "make_values.py; the commands are in its docstring",
        "versions": {
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "tensorflow_addons": tfa.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
            "tqdm": tqdm.__version__,
        },
        "start": START,
        "gradients": GRADIENTS,
        "multi_optimizer": multi_optimizer(),
        "sgdw": sgdw(),
        "moving_average": moving_average(),
        "adaptive_average_pooling": adaptive_average_pooling(),
        "cutout": cutout(),
        "f1_score": f1_score(),
        "cohen_kappa": cohen_kappa(),
        "progress_bar": progress_bar(),
    }
    # One line an entry, so that a difference can be read.
    lines = []
    for name, entry in plain(values).items():
        if isinstance(entry, dict):
            inner = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in entry.items())
            lines.append(f" {json.dumps(name)}: {{\n{inner}\n }}")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(entry)}")
    OUTPUT.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
