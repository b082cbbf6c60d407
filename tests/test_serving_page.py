"""The examples of docs/serving.md run as they stand, against local servers around an exported model.

The servers are stand-ins for TensorFlow Serving, in Python: gRPC with its protocol definitions, and as much of its REST
interface as the page uses. Both answer with the model's signatures, as TensorFlow's own loader finds them.
"""

import base64
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from concurrent import futures
from pathlib import Path

import grpc
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

import aib_tf
from aib_tf import export

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "serving.md").read_text()
CLASS_NAMES = ("ant", "bee", "cat", "dog")


def _blocks(language):
    """Code blocks of the page; those in a list are indented."""
    return [
        textwrap.dedent(block) for block in re.findall(rf"```{language}\n(.*?)^ *```", PAGE, re.DOTALL | re.MULTILINE)
    ]


@pytest.fixture(scope="module")
def signatures(tmp_path_factory):
    """The signatures of an exported model."""
    model = aib_tf.models.build("vgg_aib_qt", (32, 32, 1), classes=4, width=0.05, latent_dim=16, num_anchors=5, seed=1)
    folder = export.saved_model(model, tmp_path_factory.mktemp("models") / "digits", class_names=CLASS_NAMES)
    loaded = tf.saved_model.load(str(folder))
    yield loaded.signatures
    del loaded


@pytest.fixture
def picture(tmp_path, monkeypatch):
    """digit.png in the folder of the test."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    (tmp_path / "digit.png").write_bytes(tf.io.encode_png(pixels).numpy())
    monkeypatch.chdir(tmp_path)
    return tmp_path / "digit.png"


def _answer(signatures, name, inputs):
    specs = signatures[name].structured_input_signature[1]
    tensors = {key: tf.constant(value, specs[key].dtype) for key, value in inputs.items()}
    return {key: value.numpy() for key, value in signatures[name](**tensors).items()}


@pytest.fixture
def grpc_port(signatures):
    class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
        def Predict(self, request, context):  # noqa: N802
            assert request.model_spec.name == "digits"
            specs = signatures[request.model_spec.signature_name].structured_input_signature[1]
            inputs = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
            for name, value in inputs.items():  # as TensorFlow Serving does, which converts nothing
                assert tf.as_dtype(value.dtype) == specs[name].dtype, name
            response = predict_pb2.PredictResponse()
            for name, value in _answer(signatures, request.model_spec.signature_name, inputs).items():
                response.outputs[name].CopyFrom(tf.make_tensor_proto(value))
            return response

    server = grpc.server(futures.ThreadPoolExecutor(1))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(None).wait()


@pytest.fixture
def http_port(signatures):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.path == "/v1/models/digits:predict"
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            inputs = {name: self._decoded(value) for name, value in request["inputs"].items()}
            outputs = _answer(signatures, request["signature_name"], inputs)
            outputs = {name: value.tolist() for name, value in outputs.items()}
            outputs = outputs if len(outputs) > 1 else next(iter(outputs.values()))
            body = json.dumps({"outputs": outputs}, default=bytes.decode).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _decoded(self, value):
            return [base64.b64decode(item["b64"]) if isinstance(item, dict) else item for item in value]

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_grpc_example_runs(grpc_port, picture, signatures, capsys):
    (example,) = [block for block in _blocks("python") if "import grpc" in block]
    names = {}
    exec(compile(example.replace("localhost:8500", f"127.0.0.1:{grpc_port}"), "docs/serving.md", "exec"), names)
    names["channel"].close()
    assert capsys.readouterr().out.splitlines()[0] in CLASS_NAMES
    assert names["seen"]["attention_image"].shape == (1, 32, 32)
    # What the page says of these numbers.
    information, entropy = names["uncertain"]["mutual_information_bits"], names["uncertain"]["entropy_bits"]
    assert 0 <= information[0] <= entropy[0] <= np.log2(len(CLASS_NAMES)) + 1e-6
    pixels = _answer(signatures, "preprocess", {"image_bytes": [picture.read_bytes()]})["images"]
    np.testing.assert_array_equal(names["images"], pixels)


def test_the_rest_examples_run(http_port, picture, tmp_path):
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
    answers = []
    for example in _blocks("bash"):
        if "curl" in example:
            done = subprocess.run(
                [
                    shutil.which("bash"),
                    "-euo",
                    "pipefail",
                    "-c",
                    example.replace("localhost:8501", f"127.0.0.1:{http_port}"),
                ],
                env={"PATH": os.pathsep.join([str(tools), os.environ["PATH"]]), "no_proxy": "*"},
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
        assert set(re.findall(r"`(\w+)`", inputs)) == set(signatures[name].structured_input_signature[1])
        named = set(re.findall(r"`(\w+)`", outputs)) - {"serve_bytes"}
        if "the same" in outputs:
            named |= set(signatures["serving_default"].structured_outputs)
        assert named == set(signatures[name].structured_outputs), name


def test_every_flag_on_the_page_is_one_of_the_exporter_or_of_the_server():
    known = {"silent", "show-error", "fail-with-body", "data", "branch", "depth", "dir", "all"}
    known |= set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', (ROOT / "scripts" / "export.py").read_text()))
    known |= set(re.findall(r"--(\w+)=", (ROOT / "deploy" / "serve.sh").read_text()))
    # Others of the server, as in tensorflow_serving/model_servers/main.cc.
    known |= {"tensorflow_intra_op_parallelism", "tensorflow_inter_op_parallelism", "xla_cpu_compilation_enabled"}
    assert set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", PAGE)) <= known
