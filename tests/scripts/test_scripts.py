"""The scripts as a user calls them: in processes of their own."""

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from aib_tf import data, files, models, training
from aib_tf.config import Config

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "--dataset=cluttered_digits/train96_validation40_test40_seed0",
    "--width=0.05",
    "--latent_dim=8",
    "--num_anchors=5",
    "--batch_size=16",
    "--epochs=1",
]


def script(name, *arguments):
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir):
    """A trained run, and what training it printed."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    result = script("train", *TINY, f"--data_dir={data_dir}", f"--output_dir={folder}")
    assert result.returncode == 0, result.stderr
    return folder, result


def test_train_shows_its_progress_and_ends_with_a_table(run):
    _, result = run
    for name in ("accuracy", "rate_bits", "codebook_loss", "commitment_loss", "anchors_in_use", "cross_entropy_bits"):
        assert f"{name}:" in result.stdout
    assert "The best model is that of epoch 1" in result.stderr
    assert "95% interval" in result.stderr


def test_train_again_says_that_the_run_is_finished(run, data_dir):
    folder, _ = run
    result = script("train", *TINY, f"--data_dir={data_dir}", f"--output_dir={folder}")
    assert result.returncode == 0, result.stderr
    assert "This run is finished" in result.stderr


def test_evaluate_prints_and_saves_the_same_numbers_as_training_did(run):
    folder, _ = run
    result = script("evaluate", f"--run={folder}", "--suite=accuracy,bottleneck,localisation")
    assert result.returncode == 0, result.stderr
    for name in ("top 1", "rate bits", "pointing box attention", "pointing box uniform", "energy box centred"):
        assert name in result.stdout
    saved = json.loads((folder / "evaluation_test_accuracy_bottleneck_localisation.json").read_text())["suites"]
    measured = json.loads((folder / "metrics.json").read_text())["suites"]
    assert saved.keys() == measured.keys()
    for suite, before in measured.items():
        assert before["metrics"].items() <= saved[suite]["metrics"].items()
    assert saved["accuracy"]["metrics"].keys() - measured["accuracy"]["metrics"].keys()  # draws


def test_evaluate_writes_a_report_that_compares_runs_and_goes_on_where_it_was(run, tmp_path):
    folder, _ = run
    other = tmp_path / "other3"
    shutil.copytree(folder, other)
    suites = ["accuracy", "consistency", "localisation", "faithfulness", "robustness", "transfer", "saliency"]
    result = script(
        "evaluate", f"--run={folder}", "--images=4", f"--baseline={folder}", "--transfer_to=" + TINY[0].split("=")[1]
    )
    assert result.returncode == 0, result.stderr
    for suite in [*suites, "bottleneck"]:
        assert f"\n{suite}" in result.stdout
        assert (folder / "evaluation" / "test" / f"{suite}.npz").exists()
    assert "faithfulness: 4 images" in result.stderr
    before = (folder / "evaluation_test.json").read_text()
    # What is finished is read: nothing is measured again but what the new run lacks.
    few = ["--suite=localisation,robustness", "--images=4", f"--baseline={folder}"]
    result = script("evaluate", f"--run={folder}", f"--compare={other}", f"--report={tmp_path / 'report'}", *few)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("robustness: 4 images") == 1
    assert (folder / "evaluation_test.json").read_text() == before
    assert "<svg" in (tmp_path / "report" / "index.html").read_text()
    runs = json.loads((tmp_path / "report" / "metrics.json").read_text())["runs"]
    assert list(runs) == ["digits", "other3"]
    assert runs["digits"]["suites"] == runs["other3"]["suites"]
    assert list(runs["digits"]["suites"]) == ["localisation", "robustness"]


@pytest.fixture(scope="module")
def runs_of_pictures(tmp_path_factory):
    """Two runs of a folder of pictures, and one of another folder of this name; none of them is trained."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for data_dir, split, label in itertools.product(("first", "second"), ("train", "validation", "test"), "ab"):
        for number in range(2):
            file = folder / data_dir / "pets" / split / label / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(file)
    model = models.build("vgg", (32, 32, 3), 2, width=0.05, seed=0)
    for name, data_dir in (("q20", "first"), ("q2", "first"), ("other", "second")):
        images = {"dataset": "image_folder_32/pets", "data_dir": str(folder / data_dir)}
        config = Config.from_flat({"model": "vgg", **images})
        (folder / name).mkdir()
        model.save(folder / name / "best.keras")
        (folder / name / "history.csv").write_text("epoch\n1\n")
        files.write_json(folder / name / "config.json", {"config": dataclasses.asdict(config)})
    return folder


def test_a_number_that_ends_like_the_seed_is_not_the_seed(runs_of_pictures):
    folder = runs_of_pictures
    compared = [f"--run={folder / 'q20'}", f"--compare={folder / 'q2'}", "--suite=accuracy"]
    result = script("evaluate", *compared, f"--report={folder / 'report'}")
    assert result.returncode == 0, result.stderr
    runs = json.loads((folder / "report" / "metrics.json").read_text())["runs"]
    assert {name: (run["group"], run["seed"]) for name, run in runs.items()} == {"q20": ("q20", 0), "q2": ("q2", 0)}


def test_runs_of_other_images_are_not_compared(runs_of_pictures):
    folder = runs_of_pictures
    compared = [f"--run={folder / 'q2'}", f"--compare={folder / 'other'}", "--suite=accuracy"]
    result = script("evaluate", *compared, f"--report={folder / 'refused'}")
    assert result.returncode == 2
    assert "must be of one data set, and this one has other images" in result.stderr
    assert not (folder / "refused").exists()


def test_evaluate_takes_a_split_a_suite_samples_and_a_folder_of_its_own(run, tmp_path):
    folder, _ = run
    flags = ["--split=validation", "--suite=accuracy", "--samples=2", f"--output_dir={tmp_path / 'drawn'}"]
    result = script("evaluate", f"--run={folder}", *flags)
    assert result.returncode == 0, result.stderr
    saved = json.loads((tmp_path / "drawn" / "evaluation_validation_accuracy.json").read_text())
    assert list(saved["suites"]) == ["accuracy"]
    assert saved["suites"]["accuracy"]["samples"] == 2
    assert (tmp_path / "drawn" / "evaluation" / "validation" / "accuracy.npz").exists()
    assert not (folder / "evaluation" / "validation").exists()


def test_visualize_draws_images_of_the_data_set(run):
    folder, _ = run
    result = script("visualize", f"--run={folder}", "--count=3")
    assert result.returncode == 0, result.stderr
    with Image.open(folder / "attention_test.png") as picture:
        assert picture.width > 300


def test_visualize_draws_a_persons_pictures_and_names_what_is_none(run, tmp_path):
    folder, _ = run
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)).save(tmp_path / "wide.png")
    Image.new("LA", (20, 50), (200, 128)).save(tmp_path / "tall.png")
    Image.fromarray(np.full((40, 40), 30_000, np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "notes.png").write_text("no picture")
    names = ("wide.png", "notes.png", "tall.png", "missing.png", "deep.png", os.fsdecode(b"k\xe4se.png"))  # no UTF-8
    files = [tmp_path / name for name in names]
    shutil.copy(files[0], files[-1])
    result = script("visualize", f"--run={folder}", "--images", *files, f"--output={tmp_path / 'out.png'}")
    assert result.returncode == 0, result.stderr
    assert "notes.png: this is no picture that can be read" in result.stderr
    assert "missing.png: there is no such file" in result.stderr
    assert "wide.png: " in result.stdout
    assert "tall.png: " in result.stdout
    assert "k\\udce4se.png: " in result.stdout
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width > 200


def test_visualize_without_any_picture_fails_and_writes_nothing(run, tmp_path):
    folder, _ = run
    (tmp_path / "notes.png").write_text("no picture")
    result = script(
        "visualize", f"--run={folder}", f"--images={tmp_path / 'notes.png'}", f"--output={tmp_path / 'o.png'}"
    )
    assert result.returncode == 2
    assert "None of the files is a picture" in result.stderr
    assert not (tmp_path / "o.png").exists()


def test_export_writes_versions_that_answer_as_the_model(run, tmp_path):
    folder, _ = run
    path = tmp_path / "models" / "digits"
    first, second = (
        script("export", f"--run={folder}", f"--output={path}", *more) for more in ([], ["--dtype=bfloat16"])
    )
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout == f"Exported to {path / '1'}.\n" and second.stdout == f"Exported to {path / '2'}.\n"
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 1), dtype=np.uint8)
    expected = training.Run(folder).load_best().explain(data.normalize_images(pixels, data.get("cluttered_digits")))
    signature = tf.saved_model.load(str(path / "1")).signatures["serving_default"]
    answer = signature(images=tf.constant(pixels, tf.float32))
    np.testing.assert_allclose(answer["logits"], expected["logits"], rtol=1e-4, atol=1e-4)
    assert set(answer["class_name"].numpy()) <= {b"%d" % digit for digit in range(10)}

    again = script("export", f"--run={folder}", f"--output={path}", "--version=2")
    assert again.returncode == 1 and "The next free one is 3" in again.stderr and "Traceback" not in again.stderr
    (tmp_path / "file").write_text("")
    nowhere = script("export", f"--run={folder}", f"--output={tmp_path / 'file' / 'digits'}")
    assert nowhere.returncode == 1 and str(tmp_path / "file") in nowhere.stderr and "Traceback" not in nowhere.stderr
    assert sorted(entry.name for entry in path.iterdir()) == ["1", "2"]


def test_a_run_that_has_no_model_yet_is_not_exported(run, tmp_path):
    folder, _ = run
    untrained = tmp_path / "run"
    untrained.mkdir()
    shutil.copy(folder / "config.json", untrained)
    result = script("export", f"--run={untrained}", f"--output={tmp_path / 'models'}")
    assert result.returncode == 1 and "This run has no best model" in result.stderr
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("name", "arguments", "messages"),
    [
        ("train", ["--model=vgg_abi"], ["vgg_aib, vgg_aib_qt", "vgg_abi"]),
        ("train", ["--dataset=mnist"], ["cluttered_digits", "cifar10", "mnist"]),
        ("train", ["--epochs=0"], ["`epochs` must be an integer from 1 up. Received: epochs=0"]),
        ("train", ["--epochs=many"], ["epochs", "many"]),
        ("train", ["--widht=0.5"], ["widht", "--width", "--beta_warmup_epochs", "--output_dir"]),
        ("train", ["--flagfile=nowhere.flags"], ["nowhere.flags"]),
        ("train", ["--decay_at=3,x", "--schedule=steps"], ["decay_at=3,x"]),
        ("train", ["--dataset=cifar10"], ["cifar10", "empty", "--data_dir"]),
        ("evaluate", ["--run=nowhere"], ["There is no run in this folder", "nowhere"]),
        ("evaluate", ["--run=nowhere", "--suite=speed"], ["suites must be one or more of accuracy", "speed"]),
        ("visualize", ["--run=nowhere"], ["There is no run in this folder", "nowhere"]),
        ("export", ["--run=nowhere", "--output=models"], ["There is no run in this folder", "nowhere"]),
        ("export", ["--run=nowhere", "--output=models", "--dtype=float16"], ["float32|bfloat16"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_a_user_gets_wrong_is_said_in_a_few_lines_and_nothing_is_written(name, arguments, messages, tmp_path):
    output, data = tmp_path / "run", tmp_path / "empty"
    data.mkdir()
    where = [f"--output_dir={output}", f"--data_dir={data}"] if name == "train" else []
    result = script(name, *where, *arguments)
    assert result.returncode in (1, 2)
    assert "Traceback" not in result.stderr
    for message in messages:
        assert message in result.stderr
    assert not output.exists()


def test_a_flagfile_that_is_not_utf_8_is_named(tmp_path):
    file = tmp_path / "mine.flags"
    file.write_bytes("# für später\n--epochs=3\n".encode("latin-1"))
    result = script("train", f"--flagfile={file}", f"--output_dir={tmp_path / 'run'}")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "A flagfile is text in UTF-8, and this one is not: 'utf-8' codec can't decode" in result.stderr
    assert f"Received: --flagfile={file}" in result.stderr


def test_help_lists_every_setting():
    result = script("train", "--help")
    for flag in ("--model:", "--beta_warmup_epochs:", "--output_dir:", "--[no]deterministic:"):
        assert flag in result.stdout
