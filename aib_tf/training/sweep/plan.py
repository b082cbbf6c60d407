"""The file of a sweep: its form, its checks, and the runs that it asks for."""

import dataclasses
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence

import yaml

from aib_tf import data, evaluation, files
from aib_tf.config import Config, settings
from aib_tf.validation import check_choice, check_count, check_weight

_KEYS = ("title", "flags", "seeds", "rows", "evaluate", "columns")
_ROW_KEYS = ("seeds", "evaluate", "run")  # whatever else stands in a row is a flag
_EVALUATE_KEYS = ("suite", "split", "samples", "images", "transfer_to")
_COLUMN_KEYS = ("metric", "complement", "scale")
_SPLITS = ("train", "validation", "test")

# What is known of a run beside the metrics of the suites, for columns such as `run.seconds_per_epoch`.
RUN_FACTS = ("parameters", "seconds_per_epoch", "peak_memory_bytes", "training_seconds", "evaluation_seconds")


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the table: `scale` times a metric, or times one minus it.

    Attributes:
        heading: What stands above it.
        source: Name of a suite of `aib_tf.evaluation`, or "run" for one of `RUN_FACTS`.
        metric: Name of the metric.
        complement: Whether one minus the metric is shown, as the error is of the accuracy.
        scale: Factor, such as 100 for percent.
    """

    heading: str
    source: str
    metric: str
    complement: bool = False
    scale: float = 1.0

    def apply(self, value: float) -> float:
        """What the column shows for a value of the metric."""
        return self.scale * (1 - value if self.complement else value)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row with one seed.

    Attributes:
        row: Name of the row.
        seed: Its seed.
        run: Name of the run folder with the trained model.
        flags: Flags of scripts/train.py that it is trained with, the seed among them.
        config: The resolved `Config` that they make.
        evaluate: Flags of scripts/evaluate.py, or None where metrics.json is enough.
        results: Name of the folder that the results of that evaluation lie in.
    """

    row: str
    seed: int
    run: str
    flags: Mapping[str, object]
    config: Config
    evaluate: Mapping[str, object] | None
    results: str

    @property
    def name(self) -> str:
        return folder_name(self.row, self.seed)

    @property
    def is_trained(self) -> bool:
        """Whether it has a run of its own, and does not look at that of another row."""
        return self.run == self.name

    @property
    def results_file(self) -> str | None:
        """Name of the file that scripts/evaluate.py writes, None where there is nothing to evaluate."""
        if self.evaluate is None:
            return None
        return "_".join(["evaluation", self.evaluate.get("split", "test"), *self.evaluate.get("suite", ())]) + ".json"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a file asks for.

    Attributes:
        title: Its title.
        cells: Rows by seeds, row by row.
        columns: Columns of the table.
    """

    title: str
    cells: Sequence[Cell]
    columns: Sequence[Column]

    @property
    def rows(self) -> dict[str, list[Cell]]:
        """Name of each row to its cells."""
        found = {}
        for cell in self.cells:
            found.setdefault(cell.row, []).append(cell)
        return found


def read(file: str | os.PathLike, data_dir: str | None = None) -> Sweep:
    """Reads the file of a sweep, and makes the config of every run.

    The file is YAML:

        title: Cluttered digits, with and without attention
        flags: {dataset: cluttered_digits, width: 0.125, epochs: 5}     # of scripts/train.py, for all runs
        seeds: [0, 1, 2]                                                # [0] where there are none
        rows:                                                           # name: what differs
          plain: {model: vgg}
          aib: {model: vgg_aib, seeds: [0, 1]}
          aib, 4 samples: {run: aib, evaluate: {samples: 4}}            # looks at the runs of another row
        evaluate: {suite: "accuracy,consistency", images: 250}          # of scripts/evaluate.py; may be absent
        columns:                                                        # heading: SUITE.METRIC or run.FACT
          "test error, %": {metric: accuracy.top_1, complement: true, scale: 100}
          "rate, bits": bottleneck.rate_bits
          "s per epoch": run.seconds_per_epoch

    Args:
        file: The file.
        data_dir: Folder of prepared data sets, in the place of that of the file.

    Raises:
        ValueError: The file is no YAML, a key stands twice or is unknown, or a value is impossible. The message names
            the file and the place.
        OSError: The file cannot be read.
    """
    try:
        text = files.path(file).read_text(encoding="utf-8")
        content = _load(text)
        return _sweep(content, data_dir)
    except yaml.YAMLError as error:
        raise ValueError(
            f"A sweep is a file in YAML, and this one cannot be read: {error}. Received: {file=!s}"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"A sweep is a file in UTF-8, and this one is not: {error}. Received: {file=!s}") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def folder_name(row: str, seed: int) -> str:
    """Name of the run folder of a row with a seed."""
    return f"{row}-{seed}"


def train_arguments(cell: Cell, folder: os.PathLike) -> list[str]:
    """Arguments of scripts/train.py for a cell that is trained."""
    return [f"--output_dir={folder}", *_arguments(cell.flags)]


def evaluate_arguments(cell: Cell, folder: os.PathLike) -> list[str]:
    """Arguments of scripts/evaluate.py for a cell that is evaluated, in the folder of all runs."""
    where = [f"--run={folder / cell.run}"]
    if cell.results != cell.run:
        where.append(f"--output_dir={folder / cell.results}")
    if cell.flags.get("data_dir") is not None:
        where.append(f"--data_dir={cell.flags['data_dir']}")
    return [*where, *_arguments(cell.evaluate)]


def _arguments(flags):
    return [f"--{name}={_text(value)}" for name, value in flags.items() if value is not None]


def _text(value):
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


class _Loader(yaml.SafeLoader):
    """Takes 1e-4 for a number, as YAML 1.2 does and PyYAML does not."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _load(text):
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_keys_once(node, set())
        try:
            return loader.construct_document(node)
        except ValueError as error:  # of a date that there is not, or of a number with too many digits
            raise yaml.YAMLError(error) from None
    finally:
        loader.dispose()


def _check_keys_once(node, seen):
    """Of a key that stands twice, PyYAML takes the last without a word."""
    if id(node) in seen or isinstance(node, yaml.ScalarNode):
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _check_keys_once(child, seen)
        return
    keys = set()
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in keys:
                raise ValueError(
                    f"A key stands twice in one place. Received: {key.value} in line {key.start_mark.line + 1}"
                )
            keys.add(key.value)
        _check_keys_once(value, seen)


def _sweep(content, data_dir):
    content = _mapping("The file", content, _KEYS)
    title = content.get("title")
    if not isinstance(title, str) or not title.strip():
        raise ValueError(f"A sweep has a `title`. Received: title={title!r}")
    common = _flags("flags", content.get("flags") or {})
    if data_dir is not None:
        common["data_dir"] = files.absolute(data_dir)
    seeds = _seeds("seeds", content.get("seeds", [0]))
    evaluate = _evaluate("evaluate", content.get("evaluate"))
    given = _mapping("rows", content.get("rows"))
    if not given:
        raise ValueError(f"A sweep has at least one row. Received: rows={content.get('rows')!r}")
    for name in given:
        _check_row_name(name)
    rows = {name: _mapping(f"Row {name!r}", {} if row is None else row) for name, row in given.items()}
    trained = {
        name: _trained(name, row, common, seeds, evaluate) for name, row in rows.items() if row.get("run") is None
    }
    cells = []
    for name, row in rows.items():
        cells += trained[name] if name in trained else _referring(name, row, rows, trained, evaluate)
    columns = _columns(_mapping("columns", content.get("columns")), cells)
    return Sweep(title.strip(), tuple(cells), columns)


def _trained(name, row, common, seeds, evaluate):
    seeds = _seeds(f"seeds of row {name!r}", row["seeds"]) if "seeds" in row else seeds
    own = {key: value for key, value in row.items() if key not in _ROW_KEYS}
    flags = {**common, **_flags(f"Row {name!r}", own)}
    evaluate = _merged(name, row, evaluate)
    cells = []
    for seed in seeds:
        folder = folder_name(name, seed)
        with_seed = {**flags, "seed": seed}
        try:
            config = Config.from_flat(with_seed).resolved()
            _check_data(config, evaluate)
        except ValueError as error:
            raise ValueError(f"Row {name!r}: {error}") from None
        cells.append(Cell(name, seed, folder, with_seed, config, evaluate, folder))
    return cells


def _referring(name, row, rows, trained, evaluate):
    """The cells of a row that looks at the runs of another one."""
    of = row["run"]
    if not isinstance(of, str) or of not in trained:
        raise ValueError(
            f"`run` of row {name!r} must be a row that is trained, one of {', '.join(trained)}. Received: run={of!r}"
        )
    extra = [key for key in row if key not in _ROW_KEYS]
    if extra:
        raise ValueError(
            f"Row {name!r} looks at the runs of row {of!r}, and cannot train them otherwise: leave out `run` or the "
            f"flags. Received: {', '.join(extra)}"
        )
    bases = {base.seed: base for base in trained[of]}
    seeds = _seeds(f"seeds of row {name!r}", row["seeds"]) if "seeds" in row else list(bases)
    missing = [seed for seed in seeds if seed not in bases]
    if missing:
        raise ValueError(
            f"Row {of!r} has no runs of all seeds of row {name!r}, only {list(bases)}. Received: seeds={seeds}"
        )
    # What the row that it looks at says of its evaluation holds here too.
    evaluate = _merged(name, row, _merged(of, rows[of], evaluate))
    _check_data(bases[seeds[0]].config, evaluate)
    cells = []
    for seed in seeds:
        base = bases[seed]
        results = base.run if evaluate == base.evaluate else folder_name(name, seed)
        cells.append(Cell(name, seed, base.run, base.flags, base.config, evaluate, results))
    return cells


def _check_data(config, evaluate):
    """Whether the images of a run are known, and those that its features are carried to."""
    for name in (config.data.name, *(evaluate or {}).get("transfer_to", ())):
        data.get(name, config.data.data_dir)


def _merged(name, row, evaluate):
    own = _evaluate(f"`evaluate` of row {name!r}", row.get("evaluate"))
    return evaluate if own is None else {**(evaluate or {}), **own}


def _mapping(where, value, keys=None):
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping, with lines like `key: value`. Received: {value!r}")
    for key in value:
        if not isinstance(key, str):
            raise ValueError(f"{where} must have text for keys; put it in quotes. Received: {key!r}")
        if keys is not None and key not in keys:
            raise ValueError(f"{where} has the keys {', '.join(keys)} and no others. Received: {key}={value[key]!r}")
    return value


def _check_row_name(name):
    if not isinstance(name, str) or not re.fullmatch(r"[^\W_]([^/\\\x00-\x1f]*[^/\\\s])?", name):
        raise ValueError(
            "The name of a row is that of its folders too: text that begins with a letter or a digit, has no slash and "
            f"does not end in a space. Received: {name!r}"
        )


def _seeds(where, value):
    if not isinstance(value, list) or not value or len({repr(seed) for seed in value}) < len(value):
        raise ValueError(f"`{where}` must be a list of seeds, each once. Received: {value!r}")
    return [check_count(where, seed, minimum=0, maximum=2**31 - 1) for seed in value]


def _flags(where, given):
    kinds = {flag: field.type for _, flag, field in settings()}
    found = {}
    for name, value in _mapping(where, given).items():
        if name == "seed":
            raise ValueError(f"{where}: the seed of a run is one of `seeds`. Received: seed={value!r}")
        if name not in kinds:
            raise ValueError(
                f"{where}: there is no flag of this name; there are {', '.join(kinds)}. Received: {name}={value!r}"
            )
        found[name] = _typed(where, name, value, kinds[name])
    weights = found.get("weights")
    if weights not in (None, "imagenet"):
        found["weights"] = files.absolute(weights)  # as the run folder has it
    return found


def _typed(where, name, value, kind):
    """The value of a flag, when it is of the flag's type."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and types.NoneType in kinds:
        return None
    kind = next(each for each in kinds if each is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        values = value if isinstance(value, list) else [value]
        return tuple(_typed(where, name, each, typing.get_args(kind)[0]) for each in values)
    if kind is str and isinstance(value, bool):
        return str(value).lower()  # jit_compile has the texts true and false, which YAML takes for booleans
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}: `{name}` must be of type {kind.__name__}. Received: {name}={value!r}")
    return value


def _evaluate(where, given):
    """Flags of scripts/evaluate.py, checked; lists as tuples."""
    if given is None:
        return None
    found = dict(_mapping(where, given, _EVALUATE_KEYS))
    for name in ("suite", "transfer_to"):
        if name in found:
            found[name] = _names(where, name, found[name])
    if "suite" in found:
        evaluation.check_names(found["suite"])
    if "split" in found:
        check_choice("split", found["split"], _SPLITS)
    for name in ("samples", "images"):
        if name in found:
            check_count(name, found[name], minimum=0)
    return found


def _names(where, name, value):
    values = value.split(",") if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(each, str) and each.strip() for each in values):
        raise ValueError(f"{where}: `{name}` must be names separated by commas. Received: {name}={value!r}")
    return tuple(each.strip() for each in values)


def _columns(given, cells):
    if not given:
        raise ValueError("A sweep has at least one column. Received: columns={}")
    measured = set(evaluation.QUICK)
    for cell in cells:
        if cell.evaluate is not None:
            measured |= set(cell.evaluate.get("suite", evaluation.SUITES))
    return tuple(_column(heading, value, measured) for heading, value in given.items())


def _column(heading, value, measured):
    where = f"Column {heading!r}"
    value = _mapping(where, {"metric": value} if isinstance(value, str) else value, _COLUMN_KEYS)
    source, _, metric = str(value.get("metric")).partition(".")
    if source not in ("run", *evaluation.SUITES) or not metric:
        raise ValueError(
            f"{where}: a metric is one of a suite, SUITE.METRIC with {', '.join(evaluation.SUITES)}, or one of "
            f"{', '.join(f'run.{name}' for name in RUN_FACTS)}. Received: metric={value.get('metric')!r}"
        )
    if source == "run":
        check_choice(f"metric of column {heading}", metric, RUN_FACTS)
    elif source not in measured:
        raise ValueError(
            f"{where}: no row is measured by the suite {source}; name it in `evaluate`, such as "
            f"evaluate: {{suite: {source}}}. Received: metric={value['metric']!r}"
        )
    complement = value.get("complement", False)
    if not isinstance(complement, bool):
        raise ValueError(f"{where}: `complement` is true or false. Received: complement={complement!r}")
    scale = check_weight("scale", value.get("scale", 1.0), positive=True)
    return Column(heading, source, metric, complement, scale)
