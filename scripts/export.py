"""Writes the best model of a run as a SavedModel for TensorFlow Serving.

python scripts/export.py --run=runs/digits --output=models/digits
"""

import command_line
from absl import flags

from aib_tf import data, export

_RUN = flags.DEFINE_string("run", None, "Folder of the run.", required=True)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Folder of the model's versions; its name is that of the model in the server.", required=True
)
_VERSION = flags.DEFINE_integer("version", None, "A number from 1 up; by default the one after the largest there.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "What convolutions and matrix products are computed in."
)
_IMAGE_DTYPE = flags.DEFINE_enum("image_dtype", "float32", ["float32", "uint8"], "Type of the pixels in a request.")
_FAST_CONVOLUTIONS = flags.DEFINE_bool(
    "fast_convolutions",
    True,
    "Half the multiplications and twice the weights in large float32 3x3 convolutions: for CPUs.",
)
_JIT_COMPILE = flags.DEFINE_bool("jit_compile", False, "Have XLA compile the model, on servers that allow it.")
_COMPILED_OP = flags.DEFINE_bool("compiled_op", False, "Keep the compiled op, for servers that were built with it.")


def main(arguments):
    if arguments:
        raise ValueError(f"Only flags are expected, such as --run=DIR. Received: {' '.join(arguments)}")
    run, config = command_line.open_run(_RUN.value, None)
    folder = export.saved_model(
        run.load_best(),
        _OUTPUT.value,
        _VERSION.value,
        dataset=data.get(config.data.name, config.data.data_dir),
        dtype=_DTYPE.value,
        image_dtype=_IMAGE_DTYPE.value,
        fast_convolutions=_FAST_CONVOLUTIONS.value,
        jit_compile=_JIT_COMPILE.value,
        compiled_op=_COMPILED_OP.value,
    )
    print(f"Exported to {folder}.")


if __name__ == "__main__":
    command_line.run(main)
