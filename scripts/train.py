"""Trains a model, or continues where the same command stopped.

python scripts/train.py --flagfile=configs/digits_aib_qt.flags --output_dir=runs/digits
"""

import sys

import command_line
from absl import flags

from aib_tf import training

_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder of the run; made if it is not there.", required=True)
command_line.define_config_flags()
flags.adopt_module_key_flags(command_line)  # --help lists the flags of this module


def main(arguments):
    if arguments:
        raise ValueError(f"Only flags are expected, such as --epochs=3. Received: {' '.join(arguments)}")
    # The progress bar is redrawn in place, which only a terminal shows well.
    verbose = 1 if sys.stdout.isatty() else 2
    training.fit(command_line.config_from_flags(), _OUTPUT_DIR.value, verbose=verbose)


if __name__ == "__main__":
    command_line.run(main)
