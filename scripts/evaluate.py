"""Measures the best model of a run: accuracy, bottleneck, and where the data has boxes or masks, localisation.

python scripts/evaluate.py --run=runs/digits
"""

import command_line
from absl import flags

from aib_tf import evaluation, training

_RUN = flags.DEFINE_string("run", None, "Folder of the run.", required=True)
_SPLIT = flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "Which images.")
_SUITE = flags.DEFINE_list("suite", [], f"Which of {', '.join(evaluation.SUITES)}; all of them by default.")
_SAMPLES = flags.DEFINE_integer("samples", None, "Attention maps and latents drawn for each image; 0 takes the means.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of prepared data sets, if it is not the one of training.")


def main(arguments):
    if arguments:
        raise ValueError(f"Only flags are expected, such as --run=runs/digits. Received: {' '.join(arguments)}")
    run, config = command_line.open_run(_RUN.value, _DATA_DIR.value)
    results = training.measure(run.load_best(), config, _SPLIT.value, _SAMPLES.value, _SUITE.value or None)
    print(evaluation.report.table(results))
    file = run.path / ("_".join(["evaluation", _SPLIT.value, *_SUITE.value]) + ".json")
    evaluation.report.write_json(file, results, run=str(run.path), split=_SPLIT.value, best=run.best)
    print(f"\nSaved in {file}.")


if __name__ == "__main__":
    command_line.run(main)
