"""Answers requests to SavedModels with nothing but TensorFlow: a process of its own, in any of TensorFlow's releases.

    python -I answer_with_tensorflow.py FOLDER

reads what `ask_python` of runtimes.py wrote to the folder, and writes answers.json and answers.npz there. Each
model is loaded once, and answers its requests in their order.
"""

import importlib
import json
import sys
from pathlib import Path

# Importing them fails now, also where they are installed; TensorFlow does without Keras.
sys.modules["aib_tf"] = sys.modules["keras"] = None

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402


def importable(name):
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def main(folder):
    requests = json.loads((folder / "requests.json").read_text())
    arrays = np.load(folder / "requests.npz")
    models, errors, answers = {}, {}, {}
    for number, (path, signature, inputs) in enumerate(requests):
        if path not in models:
            models[path] = tf.saved_model.load(path)
        tensors = {name: tf.constant(arrays[f"{number}/{name}"]) for name in inputs}
        try:
            outputs = models[path].signatures[signature](**tensors)
        except (tf.errors.OpError, TypeError, ValueError) as error:
            errors[number] = [type(error).__name__, str(error)]
        else:
            for name, value in outputs.items():
                value = value.numpy()
                answers[f"{number}/{name}"] = value.astype(bytes) if value.dtype == object else value
    np.savez(folder / "answers.npz", **answers)
    facts = {
        "errors": errors,
        "version": tf.__version__,
        "python": sys.version_info[:2],
        "importable": [name for name in ("aib_tf", "keras", "tensorflow") if importable(name)],
    }
    (folder / "answers.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
