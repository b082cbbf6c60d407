"""The flagfiles in configs/: that they can be run as they say, and that the papers' recipes are what they set."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aib_tf import config, data, models
from aib_tf.optimizers import learning_rate_schedule

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / "configs").rglob("*.flags"))

SMALL_MODELS = (
    *("vgg", "vgg_aib", "vgg_aib_qt", "vgg_att2", "vgg_att3"),
    *("wrn_28_10", "wrn_28_10_aib", "wrn_28_10_aib_qt"),
)
SMALL_DATASETS = {"cifar10": "cifar10", "cifar100": "cifar100", "svhn": "svhn_cropped"}
CUB_MODELS = tuple(f"{base}_cub{variant}" for base in ("vgg16", "wrn_50_2") for variant in ("", "_aib", "_aib_qt"))

# File -> model and data set.
PAPERS = {
    f"configs/papers/{model}_{short}.flags": (model, dataset)
    for model, (short, dataset) in itertools.product(SMALL_MODELS, SMALL_DATASETS.items())
} | {f"configs/papers/{model}.flags": (model, "caltech_birds2011") for model in CUB_MODELS}

every_file = pytest.mark.parametrize("file", FILES)
every_recipe = pytest.mark.parametrize("file", sorted(PAPERS))


@pytest.fixture(scope="module")
def settings():
    """File -> flag -> value, resolved, as the scripts understand the file."""
    program = (
        "import json, sys; sys.path.insert(0, sys.argv.pop(1)); import command_line\n"
        "from absl import flags\n"
        "from aib_tf.config import flatten\n"
        "command_line.define_config_flags()\n"
        "found = {}\n"
        "for file in sys.argv[1:]:\n"
        "    flags.FLAGS.unparse_flags()\n"
        "    [flags.FLAGS[name].unparse() for name in command_line.config_flag_names()]\n"
        "    flags.FLAGS(['x', '--flagfile=' + file])\n"
        "    found[file] = flatten(command_line.config_from_flags().resolved())\n"
        "print(json.dumps(found))\n"
    )
    command = [sys.executable, "-c", program, str(ROOT / "scripts"), *FILES]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def lines_of(file):
    return (ROOT / file).read_text(encoding="utf-8").splitlines()


def test_every_row_of_the_papers_has_its_file_and_no_other_has():
    assert len(PAPERS) == 30
    assert {file for file in FILES if file.startswith("configs/papers/")} == set(PAPERS)


@every_file
def test_the_header_says_what_it_is_and_how_it_is_run(file):
    lines = lines_of(file)
    header = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    assert re.fullmatch(r"# \S.*", header[0])
    found = {}
    for line in header:
        matched = re.fullmatch(r"# (Command|Hardware|Duration|Result): +(\S.*)", line)
        if matched:
            assert matched[1] not in found
            found[matched[1]] = matched[2]
    assert list(found) == ["Command", "Hardware", "Duration", "Result"]
    pattern = rf"python scripts/train\.py --flagfile={re.escape(file)} --output_dir=runs/[\w.-]+"
    assert re.fullmatch(pattern, found["Command"])


@every_file
def test_a_flag_is_set_once(file):
    names = [line.partition("=")[0] for line in lines_of(file) if not line.startswith("#")]
    assert all(re.fullmatch(r"--[a-z0-9_]+", name) for name in names)
    assert len(names) == len(set(names))


@every_file
def test_model_and_data_set_exist(file, settings):
    assert settings[file]["model"] in models.names()
    assert data.get(settings[file]["dataset"]).name == settings[file]["dataset"]


@every_recipe
def test_a_recipe_trains_the_model_of_its_name_on_the_data_set_of_its_name(file, settings):
    assert (settings[file]["model"], settings[file]["dataset"]) == PAPERS[file]
    header = "\n".join(line for line in lines_of(file) if line.startswith("#"))
    paper = "LTPA (Jetley et al., 2018)" if "_att" in file else "AIB (Lai et al., 2021)"
    assert paper in header


@every_recipe
def test_a_recipe_is_repeatable_and_chooses_nothing_on_the_test_images(file, settings):
    assert settings[file]["seed"] == 0
    assert settings[file]["select_on"] == "validation"


def expected_rate(file, epoch):
    """Learning rate of an epoch, counting from 1, as the released code and LTPA have it."""
    model, _ = PAPERS[file]
    if "_cub" in model:
        return 1e-4 * 0.97 ** ((epoch - 1) // 2)
    if model.startswith("wrn_"):
        return 0.1 * 0.2 ** sum(epoch > decay for decay in (60, 120, 160))
    if "_att" in model:
        return 0.1 * 0.5 ** ((epoch - 1) // 25)
    warmup = (0.001, 0.01) if model.endswith("_qt") else (0.01,)
    return warmup[epoch - 1] if epoch <= len(warmup) else 0.1 * 0.5 ** (epoch // 25)


@every_recipe
def test_the_learning_rate_of_every_epoch_is_that_of_the_recipe(file, settings):
    flat = {name: tuple(value) if isinstance(value, list) else value for name, value in settings[file].items()}
    optimization = config.Config.from_flat(flat).optimization
    schedule = learning_rate_schedule(optimization, steps_per_epoch=10)
    assert optimization.epochs == (300 if "_att" in file else 200)
    expected = [expected_rate(file, epoch) for epoch in range(1, optimization.epochs + 1)]
    rates = np.asarray(schedule(np.arange(10 * optimization.epochs))).reshape(-1, 10)
    np.testing.assert_allclose(rates, np.repeat(expected, 10).reshape(-1, 10), rtol=1e-5)


@every_recipe
def test_the_optimizer_is_that_of_the_recipe(file, settings):
    flat = settings[file]
    if "_cub" in file:
        expected = {"optimizer": "adam", "adam_beta_1": 0.5, "batch_size": 16, "weight_decay": 0.0}
        expected |= {"ema_momentum": 0.999, "weights": "imagenet", "precision": "float32"}
    else:
        expected = {"optimizer": "sgd", "batch_size": 128, "weight_decay": 5e-4, "decoupled_weight_decay": False}
        wide = "/wrn_" in file
        expected |= {"precision": "mixed_float16" if wide else "float32", "dropout": 0.3 if wide else 0.0}
        expected |= {"ema_momentum": 0.0, "weights": None}
    expected["augment"] = True
    if "/vgg_" in file or "vgg16_cub_aib.flags" in file:  # where it makes a difference
        expected["initializers"] = "released"
    assert {name: flat[name] for name in expected} == expected


@every_recipe
def test_the_objective_is_what_the_released_code_computes(file, settings):
    model, dataset = PAPERS[file]
    flat = settings[file]
    if "_aib" not in model:
        expected = {"objective": "paper"}  # which a model without bottleneck has no use for
        if "_att" in model:
            expected = {"attention": "pc", "combine": "concat", "position": "before", "normalize": "softmax"}
    else:
        small_vgg, cub = model.startswith("vgg_"), "_cub" in model
        expected = {
            "objective": "reference",
            "kl": "reference",
            "kl_weight": 0.5 if small_vgg else 1.0,
            "beta": 0.01,
            "beta_warmup_epochs": 0.0,
            "latent_dim": 256 if small_vgg or cub else 512,
            "samples": 12 if cub else 4,
        }
        if model.endswith("_qt"):
            anchors = {("vgg", "cifar100"): 50, ("wrn", "cifar100"): 20, ("wrn", "cifar10"): 50}
            anchors[("wrn", "svhn_cropped")] = 50  # as with CIFAR-10
            expected |= {
                "num_anchors": anchors.get((model[:3], dataset), 20),
                "codebook_weight": 0.4,
                "commitment_weight": 0.1,
                "anchor_learning_rate_ratio": 0.0 if cub else 1e-4,
                "anchor_weight_decay": not cub,
            }
    assert {name: flat[name] for name in expected} == expected
