"""The examples of docs/serving.md run as they stand, against local stand-ins for TensorFlow Serving."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import aib_tf
from aib_tf import export
from tests.serving import servers

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text()
CLASS_NAMES = ("ant", "bee", "cat", "dog")


def _blocks(language):
    """Code blocks of the page; those in a list are indented."""
    return [
        textwrap.dedent(block) for block in re.findall(rf"```{language}\n(.*?)^ *```", PAGE, re.DOTALL | re.MULTILINE)
    ]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Folder with one version of an exported model."""
    model = aib_tf.models.build("vgg_aib_qt", (32, 32, 1), classes=4, width=0.05, latent_dim=16, num_anchors=5, seed=1)
    path = tmp_path_factory.mktemp("models") / "digits"
    export.saved_model(model, path, class_names=CLASS_NAMES)
    return path


@pytest.fixture(scope="module")
def models(digits):
    return servers.load({"digits": digits})


@pytest.fixture(scope="module")
def signatures(models):
    """The signatures by name, without TensorFlow's own."""
    found = models["digits"][1].signature_def
    return {name: found[name] for name in found if not name.startswith("__")}


@pytest.fixture
def picture(tmp_path, monkeypatch):
    """digit.png in the folder of the test."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    (tmp_path / "digit.png").write_bytes(tf.io.encode_png(pixels).numpy())
    monkeypatch.chdir(tmp_path)
    return tmp_path / "digit.png"


def test_the_grpc_example_runs(models, picture, capsys):
    (example,) = [block for block in _blocks("python") if "import grpc" in block]
    names = {}
    with servers.GrpcStandIn(models) as server:
        exec(compile(example.replace("localhost:8500", server.address), "docs/serving.md", "exec"), names)
        names["channel"].close()
    assert capsys.readouterr().out.splitlines()[0] in CLASS_NAMES
    assert names["seen"]["attention_image"].shape == (1, 32, 32)
    # What the page says of these numbers.
    information, entropy = names["uncertain"]["mutual_information_bits"], names["uncertain"]["entropy_bits"]
    assert 0 <= information[0] <= entropy[0] <= np.log2(len(CLASS_NAMES)) + 1e-6
    seen = models["digits"][1].predict("preprocess", {"image_bytes": [picture.read_bytes()]})
    np.testing.assert_array_equal(names["images"], seen["images"])


def test_the_example_of_the_client_runs(models, picture, capsys):
    (example,) = [block for block in _blocks("python") if "serving.Client" in block]
    with servers.GrpcStandIn(models) as server:
        exec(compile(example.replace("localhost:8500", server.address), "docs/serving.md", "exec"), {})
    assert capsys.readouterr().out.split()[0] in CLASS_NAMES


def test_the_rest_examples_run(models, picture, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    # Not every machine has curl. This one does what the examples ask of it: it sends what it reads.
    curl = (
        f"#!{sys.executable}\nimport sys, urllib.request as r\n"
        "sys.stdout.buffer.write(r.urlopen(sys.argv[-1], sys.stdin.buffer.read()).read())\n"
    )
    (tools / "curl").write_text(curl)
    (tools / "curl").chmod(0o755)
    (tools / "python3").symlink_to(sys.executable)
    environment = {"PATH": os.pathsep.join([str(tools), os.environ["PATH"]]), "no_proxy": "*"}
    answers = []
    with servers.RestStandIn(models) as server:
        for example in _blocks("bash"):
            if "curl" in example:
                program = example.replace("http://localhost:8501", server.address)
                done = subprocess.run(
                    [shutil.which("bash"), "-euo", "pipefail", "-c", program],
                    env=environment,
                    cwd=tmp_path,
                    capture_output=True,
                    check=True,
                    timeout=120,
                )
                answers.append(json.loads(done.stdout)["outputs"])
    prediction, uncertain = answers
    assert prediction["class_name"][0] in CLASS_NAMES
    assert np.shape(prediction["probabilities"]) == (1, 4)
    assert 0 <= uncertain["mutual_information_bits"][0] <= uncertain["entropy_bits"][0]


def test_shell_and_python_on_the_page_are_well_formed():
    for block in _blocks("bash"):
        subprocess.run([shutil.which("bash"), "-n"], input=block, text=True, check=True)
    for block in _blocks("python"):
        compile(block, "docs/serving.md", "exec")


def test_the_table_of_signatures_is_that_of_a_model(signatures):
    table = {
        row[0].strip(" `"): row[1:]
        for row in (line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("| `"))
        if row[0].strip(" `") in signatures
    }
    assert set(table) == set(signatures)
    for name, (inputs, outputs) in table.items():
        assert set(re.findall(r"`(\w+)`", inputs)) == set(signatures[name].inputs)
        named = set(re.findall(r"`(\w+)`", outputs)) - {"serve_bytes"}
        if "the same" in outputs:
            named |= set(signatures["serving_default"].outputs)
        assert named == set(signatures[name].outputs), name


def test_every_flag_on_the_page_is_one_of_a_script_or_of_the_server():
    known = {"silent", "show-error", "fail-with-body", "data", "branch", "depth", "dir", "all"}
    for script in ("export", "predict"):
        source = (ROOT / "scripts" / f"{script}.py").read_text()
        known |= set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source))
        known |= {f"no{name}" for name in re.findall(r'DEFINE_bool\(\s*"(\w+)"', source)}
    known |= set(re.findall(r"--(\w+)=", (ROOT / "deploy" / "serve.sh").read_text()))
    # Others of the server, as in tensorflow_serving/model_servers/main.cc.
    known |= {"tensorflow_intra_op_parallelism", "tensorflow_inter_op_parallelism", "xla_cpu_compilation_enabled"}
    assert set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", PAGE)) <= known
