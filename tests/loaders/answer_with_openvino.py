"""Answers requests to `serving_default` of SavedModels with OpenVINO: a process of its own, without TensorFlow.

    python -I answer_with_openvino.py FOLDER

reads and writes the same files as answer_with_tensorflow.py.
"""

import json
import sys
from pathlib import Path

import numpy as np
import openvino


def main(folder):
    requests = json.loads((folder / "requests.json").read_text())
    arrays = np.load(folder / "requests.npz")
    core = openvino.Core()
    # It computes in bfloat16 where the processor can, unless it is told otherwise.
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    models, answers = {}, {}
    for number, (path, signature, inputs) in enumerate(requests):
        assert signature == "serving_default", signature
        if path not in models:
            models[path] = core.compile_model(core.read_model(path), "CPU", options)
        outputs = models[path]({name: arrays[f"{number}/{name}"] for name in inputs})
        for port, value in outputs.items():
            (name,) = port.names
            answers[f"{number}/{name}"] = value.astype(bytes) if value.dtype.kind == "U" else value
    np.savez(folder / "answers.npz", **answers)
    imported = [name for name in ("aib_tf", "keras", "tensorflow") if name in sys.modules]
    facts = {"errors": {}, "version": openvino.__version__, "imported": imported}
    (folder / "answers.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
