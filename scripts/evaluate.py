"""Measures the best model of a run, and writes a report.

python scripts/evaluate.py --run=runs/digits --report=reports/digits
python scripts/evaluate.py --run=runs/digits --suite=accuracy,localisation
python scripts/evaluate.py --run=runs/aib --compare=runs/plain,runs/ltpa --baseline=runs/plain --report=reports/all
"""

import contextlib
import re
import sys

import command_line
import numpy as np
from absl import flags

from aib_tf import data, evaluation, files, training

_RUN = flags.DEFINE_string("run", None, "Folder of the run.", required=True)
_COMPARE = flags.DEFINE_list("compare", [], "Folders of other runs on the same data, to stand beside it in the report.")
_BASELINE = flags.DEFINE_string(
    "baseline", None, "Folder of a run without attention, whose Grad-CAM stands beside the maps; else the model's own."
)
_REPORT = flags.DEFINE_string("report", None, "Folder for the report: index.html and metrics.json.")
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "Folder for what is found, to keep it apart from another evaluation; by default the run's."
)
_SPLIT = flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "Which images.")
_SUITE = flags.DEFINE_list("suite", [], f"Which of {', '.join(evaluation.SUITES)}; all of them by default.")
_SAMPLES = flags.DEFINE_integer("samples", None, "Attention maps and latents drawn for each image; 0 takes the means.")
_IMAGES = flags.DEFINE_integer(
    "images",
    500,
    f"Images of {' and '.join(evaluation.COSTLY)}, which ask the model many times for each of them; 0 takes all.",
    lower_bound=0,
)
_TRANSFER_TO = flags.DEFINE_list("transfer_to", [], "Data sets that the transfer suite trains a linear SVM for.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of prepared data sets, if it is not the one of training.")

_SHOWN = 36  # images in a report: as many as one looks at


def main(arguments):
    if arguments:
        raise ValueError(f"Only flags are expected, such as --run=runs/digits. Received: {' '.join(arguments)}")
    suites = evaluation.check_names(_SUITE.value or None)
    opened = [command_line.open_run(folder, _DATA_DIR.value) for folder in [_RUN.value, *_COMPARE.value]]
    check_comparable(opened)
    if len(opened) > 1 and _REPORT.value is None:
        raise ValueError(
            "Runs are compared in a report; name its folder with --report. "
            f"Received: compare={','.join(_COMPARE.value)}"
        )
    if len(opened) > 1 and _OUTPUT_DIR.value is not None:
        raise ValueError(
            "What is found of several runs is kept in the folders of these: leave out --output_dir. "
            f"Received: output_dir={_OUTPUT_DIR.value}, compare={','.join(_COMPARE.value)}"
        )
    baseline = None
    if _BASELINE.value is not None:
        beside = command_line.open_run(_BASELINE.value, _DATA_DIR.value)
        check_comparable([opened[0], beside])
        baseline = beside[0].load_best()
    names = distinct_names([run.path for run, _ in opened])
    shown, gallery = {}, None
    for name, (run, config) in zip(names, opened, strict=True):
        if len(opened) > 1:
            print(f"\n{name}\n")
        model = run.load_best()
        # One without attention has Grad-CAM for its maps, and that is its own.
        beside = baseline if model.attention_names else None
        results = measure(run, config, model, suites, beside)
        print(evaluation.report.table(results))
        file = output_of(run) / ("_".join(["evaluation", _SPLIT.value, *_SUITE.value]) + ".json")
        evaluation.report.write_json(file, results, run=str(run.path), split=_SPLIT.value, best=run.best)
        print(f"\nSaved in {file}.")
        if _REPORT.value is not None:
            gallery, shown[name] = for_report(name, run, config, model, beside, results, gallery)
    if _REPORT.value is not None:
        page = evaluation.report.write(_REPORT.value, shown, gallery)
        print(f"The report is {page}.")


def measure(run, config, model, suites, baseline):
    """The results of one run; what an earlier call of this script has finished is read."""
    images = {"images": _IMAGES.value or None}
    options = {name: dict(images) for name in evaluation.COSTLY}
    options["bottleneck"] = {"history": run.read_history()}
    options["transfer"] = transfer_to(config)
    return training.measure(
        model,
        config,
        _SPLIT.value,
        _SAMPLES.value,
        suites,
        baseline,
        options={name: values for name, values in options.items() if name in suites},
        folder=output_of(run) / "evaluation" / _SPLIT.value,
        progress=Progress(number_of_images(config)),
    )


def output_of(run):
    """The folder for what is found of a run."""
    return run.path if _OUTPUT_DIR.value is None else files.path(_OUTPUT_DIR.value)


def number_of_images(config):
    images = config.data
    return data.num_examples(images.name, _SPLIT.value, images.data_dir, bad_examples=images.bad_examples)


def transfer_to(config):
    """The data sets that are transferred to, and the classes that they share with that of the run."""
    own = data.get(config.data.name, config.data.data_dir).class_names
    targets, classes = {}, {}
    for name in _TRANSFER_TO.value:
        info = data.get(name, config.data.data_dir)
        key = re.sub("[^a-z0-9_]", "_", name.lower())
        targets[key] = tuple(
            data.load(
                name,
                split,
                training.measuring_batch(info),
                config.data.data_dir,
                normalize=False,
                bad_examples=config.data.bad_examples,
            )
            for split in ("train+validation", "test")
        )
        # Without any, there is nothing to ask the classifier itself about.
        with contextlib.suppress(ValueError):
            classes[key] = evaluation.shared_classes(own, info.class_names)
    return {"targets": targets, "classes": classes}


def for_report(name, run, config, model, baseline, results, gallery):
    """The images of the report, which the first run chooses, and what it says of one run."""
    info = data.get(config.data.name, config.data.data_dir)
    chosen, maps = evaluation.report.gallery(
        training.subject(model, config, baseline),
        training.measured_images(config, _SPLIT.value),
        _SHOWN,
        class_names=info.class_names,
        indices=None if gallery is None else gallery.indices,
    )
    # Two folders of pictures may have one name.
    if gallery is not None and not all(
        np.array_equal(getattr(chosen, field), getattr(gallery, field)) for field in ("pictures", "labels")
    ):
        raise ValueError(
            "Runs that are compared must be of one data set, and this one has other images than the runs before it. "
            f"Received: {run.path} of {config.data.name} in {config.data.data_dir}"
        )
    best = run.best
    context = {"model": config.model.name, "data": config.data.name, "split": _SPLIT.value}
    context["run"] = run.path.name
    if best is not None:
        context["best epoch"] = best["epoch"]
    if baseline is not None:
        context["Grad-CAM"] = f"of {files.path(_BASELINE.value).name}"
    # Runs whose folders differ in their seed alone are seeds of one model; the 0 of anchors_20 is no seed.
    seed = config.resolved().seed
    stem = name.removesuffix(str(seed))
    is_seed = stem != name and not stem[-1:].isdigit()
    group = stem.removesuffix("seed").rstrip("-_. ") if is_seed else name
    return chosen, evaluation.report.RunResults(results, context, maps, group or name, seed)


def check_comparable(opened):
    """Raises ValueError unless all runs are of one data set."""
    (first, config), *others = opened
    for run, other in others:
        if other.data.name != config.data.name:
            raise ValueError(
                "Runs that are compared must be of one data set. "
                f"Received: {first.path} of {config.data.name}, {run.path} of {other.data.name}"
            )


def distinct_names(paths):
    """The last parts of the paths, as many of them as it takes to tell the runs apart."""
    texts = [str(path if isinstance(path, files.RemotePath) else path.resolve()).split("/") for path in paths]
    for parts in range(1, max(map(len, texts)) + 1):
        names = ["/".join(text[-parts:]) for text in texts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"A run is compared with itself. Received: runs={','.join(map(str, paths))}")


class Progress:
    """A bar for each suite on standard error, and a line at the end of it where that is no terminal.

    Args:
        images: how many there are.
    """

    _WIDTH = 30

    def __init__(self, images):
        self.images = images

    def __call__(self, suite, done, total):
        total = total or self.images
        end = done >= total
        if sys.stderr.isatty():
            bar = "=" * (self._WIDTH * done // total)
            print(f"\r{suite:>14} [{bar:<{self._WIDTH}}] {done:,} of {total:,} images", end="", file=sys.stderr)
        if end:
            print("" if sys.stderr.isatty() else f"{suite}: {done:,} images", file=sys.stderr)
        sys.stderr.flush()


if __name__ == "__main__":
    command_line.run(main)
