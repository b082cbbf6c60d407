"""Runs or resumes a sweep, and writes its table.

python scripts/sweep.py --file=configs/sweeps/cifar10.yaml --output_dir=runs/cifar10_sweep --jobs=2

Each row of the file is trained with each seed by scripts/train.py into OUTPUT_DIR/ROW-SEED and measured by
scripts/evaluate.py, in processes of their own; what is there is not run again. OUTPUT_DIR/table.md, table.json and
curves.png are written at the end, also when some runs failed: these are named, and the exit code is 1. Ctrl-C and
SIGTERM let the runs save first; the same command continues. aib_tf.training.sweep.read describes the file.
"""

import os
import sys
from pathlib import Path

import command_line
from absl import flags

_FILE = flags.DEFINE_string("file", None, "The sweep, in YAML.", required=True)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder of the runs and the table.", required=True)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of prepared data sets, if it is not the one of the file.")
_JOBS = flags.DEFINE_integer("jobs", 1, "How many runs at a time; each gets its share of the cores.", lower_bound=1)


def main(arguments):
    if arguments:
        raise ValueError(f"Only flags are expected, such as --jobs=2. Received: {' '.join(arguments)}")
    if os.name != "posix":
        sys.exit(
            f"sweep.py: Only Linux and macOS can run this; train the rows by hand. Received: system={sys.platform}"
        )
    from aib_tf.training import sweep

    planned = sweep.read(_FILE.value, _DATA_DIR.value)
    scripts = Path(sys.argv[0]).parent  # as it was typed, which is how the table shows it
    commands = {name: [sys.executable, str(scripts / f"{name}.py")] for name in ("train", "evaluate")}
    failures = sweep.execute(planned, _OUTPUT_DIR.value, **commands, jobs=_JOBS.value)
    own = ["python", *sys.argv]
    print(sweep.write(planned, _OUTPUT_DIR.value, **commands, command=own, failures=failures).read_text("utf-8"))
    if failures:
        listed = "\n".join(f"{name}: {reason}" for name, reason in failures.items())
        sys.exit(f"sweep.py: These runs failed; the same command tries them again.\n{listed}")


if __name__ == "__main__":
    command_line.run(main)
