"""The client against local stand-ins for TensorFlow Serving, over both protocols by the same tests."""

import contextlib
import io
import json
import re
import socket
import threading

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from aib_tf.serving import Client, ServingError, TensorSpec
from aib_tf.serving import client as client_module
from tests.serving import servers
from tests.serving.conftest import CLASSES, ECHOED

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.float32)


def encoded(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, kind)
    return file.getvalue()


@pytest.fixture
def waits(monkeypatch):
    """The waits before retries, in seconds; they take no time."""
    seconds = []
    monkeypatch.setattr(client_module, "sleep", seconds.append)
    return seconds


@pytest.fixture
def closed_port():
    """A port where nobody listens, and which nobody gets meanwhile who does not share it."""
    with socket.socket() as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def echo_inputs(**values):
    """Inputs of the echo's signature "everything": `values`, and a zero or an empty string for each other one."""
    others = {name: [b""] if dtype == tf.string else [0] for name, dtype in ECHOED.items()}
    return others | values


def fails(code, times):
    def fault():
        raise servers.StatusError(code, f"{code} on purpose")

    return [fault] * times


def test_signatures_have_the_names_dtypes_and_shapes_of_the_exported_model(server):
    with Client(server.address, "small") as client:
        signatures = client.signatures()
    assert list(signatures) == ["explain", "predict_mc", "preprocess", "serve_bytes", "serving_default"]
    images = TensorSpec(np.dtype("float32"), (None, 32, 32, 3))
    assert signatures["preprocess"].inputs == {"image_bytes": TensorSpec(np.dtype(object), (None,))}
    assert signatures["preprocess"].outputs == {"images": images}
    assert signatures["serving_default"].outputs["probabilities"] == TensorSpec(np.dtype("float32"), (None, 10))
    assert signatures["serving_default"].outputs["label"] == TensorSpec(np.dtype("int64"), (None,))
    assert signatures["predict_mc"].inputs["images"] == images
    assert signatures["predict_mc"].inputs["seed"] == TensorSpec(np.dtype("int32"), None)


@pytest.mark.parametrize(
    "signature, inputs",
    [
        ("serving_default", {"images": IMAGES}),
        ("explain", {"images": IMAGES}),
        ("predict_mc", {"images": IMAGES, "samples": 4, "seed": 7}),
        ("predict_mc", {"images": IMAGES, "samples": [4, 5, 6], "seed": 7}),
        ("serve_bytes", {"image_bytes": [encoded(IMAGES[0]), encoded(IMAGES[1], "JPEG")]}),
        ("preprocess", {"image_bytes": [encoded(IMAGES[0, :20]), encoded(IMAGES[1], "JPEG")]}),
    ],
)
def test_predictions_are_those_of_the_loaded_model(server, models, signature, inputs):
    expected = models["small"][1].predict(signature, inputs)
    with Client(server.address, "small") as client:
        found = client.predict(signature, inputs)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        if value.dtype.kind == "f":
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_class_names_come_as_the_bytes_of_their_text(server):
    with Client(server.address, "small") as client:
        found = client.predict("serving_default", {"images": IMAGES})
    assert [name.decode() for name in found["class_name"]] == [CLASSES[label] for label in found["label"]]


@pytest.mark.parametrize(
    "name, values",
    [
        ("float32", np.float32([[np.nan, np.inf, -np.inf], [0.1, np.finfo(np.float32).max, 1e-45]])),
        ("float64", np.float64([np.nan, np.inf, 0.1, -0.0, 5e-324, 1.7e308])),
        ("int32", np.int32(-(2**31))),
        ("int64", np.int64([2**63 - 1, -(2**63)])),
        ("uint8", np.uint8([[0], [255]])),
        ("bool", np.array([True, False])),
        ("text", np.array(['"\\\n', "знак\0", ""], object)),
        ("text", np.array([b"\xff\xfe no UTF-8"], object)),
        ("data_bytes", np.array([[b"\xff\0\0", b""], [b"{", b"\x80"]], object)),
        ("data_bytes", np.array(b"scalar", object)),
    ],
)
def test_values_of_every_dtype_come_back_as_they_were_sent(server, name, values):
    with Client(server.address, "echo") as client:
        found = client.predict("everything", echo_inputs(**{name: values}))[name]
    sent = values
    if values.dtype == object:
        sent = np.array([text.encode() if isinstance(text, str) else text for text in values.ravel()], object)
        sent = sent.reshape(values.shape)
    assert found.dtype == sent.dtype
    assert found.shape == sent.shape
    np.testing.assert_array_equal(found, sent)


def test_an_answer_without_rows_keeps_the_other_sizes_of_its_signature():
    info = {"dtype": "DT_FLOAT", "tensor_shape": {"dim": [{"size": "-1"}, {"size": "3"}]}}
    signatures = {"rows": {"inputs": {}, "outputs": {"rows": info}}}
    replies = {"GET": {"metadata": {"signature_def": {"signature_def": signatures}}}, "POST": {"outputs": []}}
    with servers.HttpServer(lambda method, path, body: (200, json.dumps(replies[method]).encode())) as http:
        found = Client(http.address, "echo").predict("rows", {})
    assert found["rows"].shape == (0, 3)
    assert found["rows"].dtype == np.float32


def test_metadata_as_tensorflow_serving_writes_them_are_understood():
    """The answer for TensorFlow Serving's own example saved_model_counter, shortened."""
    answer = b"""{
"model_spec":{ "name": "saved_model_counter", "signature_name": "", "version": "123" }
,
"metadata": {"signature_def": {
 "signature_def": {
  "incr_counter_by": {
   "inputs": { "delta": { "dtype": "DT_FLOAT", "tensor_shape": { "dim": [], "unknown_rank": true },
     "name": "delta:0" } },
   "outputs": { "output": { "dtype": "DT_FLOAT_REF", "tensor_shape": { "dim": [], "unknown_rank": false },
     "name": "incr_counter_by_op/AssignAdd:0" } },
   "method_name": "tensorflow/serving/predict"
  }
 }
}
}
}
"""
    with servers.HttpServer(lambda *request: (200, answer)) as http:
        (found,) = Client(http.address, "saved_model_counter").signatures().items()
    float32 = np.dtype("float32")
    assert found == ("incr_counter_by", ({"delta": TensorSpec(float32, None)}, {"output": TensorSpec(float32, ())}))


def test_messages_larger_than_the_default_limit_of_grpc_pass_both_ways(models):
    rows = np.ones((400_000, 3), np.float32)  # 4.8 MB; the limit is 4 MiB
    with servers.GrpcStandIn(models) as server, Client(server.address, "echo") as client:
        np.testing.assert_array_equal(client.predict("rows", {"rows": rows})["rows"], rows)


def test_a_version_can_be_asked_for_and_the_latest_is_the_default(server):
    for version, expected in ((None, 2), (1, 1), (2, 2)):
        with Client(server.address, "echo", version) as client:
            assert client.predict("version", {"count": 1})["version"] == [expected]


def test_an_address_may_name_its_scheme(models):
    with servers.GrpcStandIn(models) as server, Client(f"grpc://{server.address}", "echo") as client:
        assert "rows" in client.signatures()
    with servers.RestStandIn(models) as server, Client(f"{server.address.upper()}/", "echo") as client:
        assert "rows" in client.signatures()


def test_signatures_are_asked_for_once(server):
    with Client(server.address, "echo") as client:
        for _ in range(2):
            client.predict("rows", {"rows": [[1, 2, 3]]})
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    "address",
    ["", "localhost", "localhost:", "localhost:port", "localhost:99999", "localhost:8500/v1", "ftp://localhost:8500",
     "http://", "http://local host:8501", "http://localhost:8501?a=b", "[::1:8500", None],
)  # fmt: skip
def test_an_address_that_is_none_is_refused_with_examples(address):
    with pytest.raises(ValueError, match=r"http://localhost:8501 for REST\. Received: server="):
        Client(address, "small")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"model": "a/b"}, "`model` must be a name"),
        ({"model": ""}, "`model` must be a name"),
        ({"version": -1}, "`version` must be"),
        ({"timeout": 0}, "`timeout` must be"),
        ({"retries": -1}, "`retries` must be"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"{message}.*Received: "):
        Client(**{"server": "localhost:8500", "model": "small"} | arguments)


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"uint8": np.float32([0.5])}, "`uint8` must be whole numbers from 0 to 255"),
        ({"uint8": [256]}, "`uint8` must be whole numbers"),
        ({"int32": [2**31]}, "`int32` must be whole numbers"),
        ({"int32": [np.nan]}, "`int32` must be whole numbers"),
        ({"float32": ["text"]}, "`float32` must be an array of float32"),
        ({"float32": [[1], [2, 3]]}, "`float32` must be an array of float32"),
        ({"data_bytes": [1]}, "`data_bytes` must be bytes"),
        ({"surplus": [1]}, "The inputs of this signature are: bool, data_bytes"),
    ],
)
def test_inputs_that_the_signature_cannot_take_are_refused_before_they_are_sent(server, inputs, message):
    match = f"(?s){message}.*Received: "
    with Client(server.address, "echo") as client, pytest.raises(ValueError, match=match):
        client.predict("everything", echo_inputs(**inputs))
    assert len(server.requests) == 1


@pytest.mark.parametrize("scheme, port", [("grpc", 8500), ("http", 8501)])
def test_an_absent_server_is_tried_again_with_growing_waits_and_then_named(scheme, port, closed_port, waits):
    address = f"{scheme}://127.0.0.1:{closed_port}"
    with Client(address, "small", retries=4) as client, pytest.raises(ServingError) as caught:
        client.signatures()
    assert caught.value.code == "UNAVAILABLE"
    message = str(caught.value)
    assert f"server at {address} is not available, tried 5 times: " in message
    assert f"port ({port} by default)" in message
    assert "docker run" in message
    assert message.endswith(f"Received: server={address!r}, model='small'")
    np.testing.assert_allclose(waits, [0.25, 0.5, 1, 2], rtol=0.2)
    assert waits == sorted(waits)


def test_waits_end_at_ten_seconds(closed_port, waits):
    with Client(f"http://127.0.0.1:{closed_port}", "small", retries=9) as client, pytest.raises(ServingError):
        client.signatures()
    np.testing.assert_allclose(waits[-3:], 10, rtol=0.2)


@pytest.mark.parametrize("code", ["UNAVAILABLE", "DEADLINE_EXCEEDED"])
def test_what_can_pass_is_tried_again_until_the_server_answers(server, waits, code):
    with Client(server.address, "echo", retries=2) as client:
        client.signatures()
        server.faults += fails(code, 2)
        assert client.predict("version", {"count": 1})["version"] == [2]
    assert len(server.requests) == 4
    assert len(waits) == 2


def test_a_grpc_server_that_starts_while_the_client_retries_is_reached(models, closed_port, monkeypatch):
    """A channel that could not connect must be ready to try anew when the client does."""
    server = servers.GrpcStandIn(models, closed_port)
    real_sleep = client_module.sleep
    waits = []

    def start_and_sleep(seconds):
        if not waits:
            stack.enter_context(server)
        waits.append(seconds)
        real_sleep(seconds)

    monkeypatch.setattr(client_module, "sleep", start_and_sleep)
    with contextlib.ExitStack() as stack, Client(f"127.0.0.1:{closed_port}", "echo") as client:
        assert "rows" in client.signatures()
    assert waits


@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "NOT_FOUND", "INTERNAL", "RESOURCE_EXHAUSTED"])
def test_what_cannot_pass_is_not_tried_again(server, waits, code):
    with Client(server.address, "echo") as client:
        client.signatures()
        server.faults += fails(code, 1)
        with pytest.raises(ServingError, match=f"{code} on purpose.*Received: server=") as caught:
            client.predict("rows", {"rows": [[1, 2, 3]]})
        assert caught.value.code == code
        assert caught.value.details == f"{code} on purpose"
        assert client.predict("rows", {"rows": [[1, 2, 3]]})["rows"].shape == (1, 3)
    assert waits == []


def test_a_server_that_hangs_is_given_up_after_the_timeout(server, waits):
    released = threading.Event()
    server.faults += [released.wait] * 2
    try:
        with Client(server.address, "echo", timeout=0.1, retries=1) as client, pytest.raises(ServingError) as caught:
            client.signatures()
    finally:
        released.set()
    assert "did not answer within 0.1 seconds, tried 2 times" in str(caught.value)
    assert caught.value.code == "DEADLINE_EXCEEDED"
    assert len(waits) == 1


def test_an_unknown_model_is_named_with_what_to_check(server):
    with Client(server.address, "sma11") as client, pytest.raises(ServingError) as caught:
        client.signatures()
    assert caught.value.code == "NOT_FOUND"
    message = str(caught.value)
    assert "Servable not found for request: Latest(sma11)" in message
    assert "/v1/models/sma11 tells whether it has that model" in message
    assert "model='sma11'" in message


def test_an_unknown_version_is_answered_with_the_versions_that_there_are(server):
    with Client(server.address, "echo", 7) as client, pytest.raises(ServingError) as caught:
        client.signatures()
    assert caught.value.code == "NOT_FOUND"
    assert "Of this model it has the versions: 1 (AVAILABLE), 2 (AVAILABLE)." in str(caught.value)
    assert str(caught.value).endswith("version=7")


def test_an_unknown_signature_is_answered_with_those_that_there_are(server):
    match = r"no signature 'explain'; it has: everything, rows, version\. Received: server="
    with Client(server.address, "echo") as client, pytest.raises(ServingError, match=match):
        client.predict("explain", {"images": IMAGES})
    assert len(server.requests) == 1


def test_bytes_that_are_no_image_are_refused_and_the_model_goes_on_answering(server):
    with Client(server.address, "small") as client:
        with pytest.raises(ServingError, match=r"refused the request: [^{}]*\. Received: ") as caught:
            client.predict("serve_bytes", {"image_bytes": [encoded(IMAGES[0]), b"no image"]})
        assert caught.value.code == "INVALID_ARGUMENT"
        assert client.predict("serve_bytes", {"image_bytes": [encoded(IMAGES[0])]})["label"].shape == (1,)


@pytest.mark.parametrize(
    "stand_in, prefix, hint",
    [
        (servers.GrpcStandIn, "http://", "Is this the REST port of TensorFlow Serving (8501 by default)?"),
        (servers.RestStandIn, "", "is this its gRPC port (8500 by default)?"),
    ],
)
def test_a_client_at_the_port_of_the_other_protocol_asks_whether_it_is_the_right_one(
    models, waits, stand_in, prefix, hint
):
    with stand_in(models) as server:
        address = prefix + server.address.removeprefix("http://")
        with Client(address, "echo") as client, pytest.raises(ServingError) as caught:
            client.signatures()
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    "status, body, code, message",
    [
        (200, b"<html>Welcome</html>", "INTERNAL", "the answer is not JSON.*<html>Welcome"),
        (200, b"", "INTERNAL", "the answer is not JSON"),
        (200, b'{"predictions": [1]}', "INTERNAL", "does not hold metadata with signatures.*predictions"),
        (200, b"[]", "INTERNAL", "does not hold metadata with signatures"),
        (404, b"<html>Not here</html>", "NOT_FOUND", "HTTP 404 Not Found: <html>Not here"),
        (400, rb"""{ "error": "Missing \'inputs\' key" }""", "INVALID_ARGUMENT", "Missing .*inputs"),
        (302, b"", "UNKNOWN", "HTTP 302"),
        (418, b'{"error": "tea"}', "UNKNOWN", "tea"),
    ],
)
def test_an_answer_of_http_that_is_not_the_servers_is_shown(status, body, code, message, waits):
    answering = servers.HttpServer(lambda *request: (status, body))
    with answering as http, Client(http.address, "small") as client, pytest.raises(ServingError) as caught:
        client.signatures()
    assert re.search(message, str(caught.value))
    assert caught.value.code == code
    assert waits == []


@pytest.mark.parametrize(
    "outputs",
    [
        {"version": [2]},
        {"version": [[2], [3, 4]], "count": 1},
        {"version": ["two"], "count": 1},
        {"version": [2**70], "count": 1},
        [2],
        None,
    ],
)
def test_outputs_that_are_not_those_of_the_signature_are_an_error(models, outputs):
    with servers.RestStandIn(models) as server, Client(server.address, "echo") as client:
        client.signatures()
        server._process = lambda *request: json.dumps({"outputs": outputs}).encode()
        with pytest.raises(ServingError, match="the answer does not hold outputs") as caught:
            client.predict("version", {"count": 1})
    assert caught.value.code == "INTERNAL"


def test_a_connection_that_breaks_off_is_tried_again(waits):
    """After nothing, and after half an answer."""
    beginnings = [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"]

    def answer(listener):
        for beginning in beginnings:
            connection, _ = listener.accept()
            with connection:
                connection.recv(2**16)
                connection.sendall(beginning)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, args=[listener])
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with (
            Client(address, "small", retries=1) as client,
            pytest.raises(ServingError, match="tried 2 times") as caught,
        ):
            client.signatures()
        thread.join()
    assert caught.value.code == "UNAVAILABLE"


def test_dtypes_of_tensorflow_are_those_of_numpy():
    from aib_tf.serving.signatures import tensor_spec

    assert tensor_spec(tf.bfloat16.as_datatype_enum, [-1, 3]).dtype == tf.bfloat16.as_numpy_dtype
    assert tensor_spec(tf.string.as_datatype_enum, []) == TensorSpec(np.dtype(object), ())
