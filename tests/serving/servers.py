"""Local stand-ins for TensorFlow Serving: they are not it, but follow its rules around models loaded in this process.

The gRPC one is made of tensorflow-serving-api's own protos and services. The REST one does what
tensorflow_serving/model_servers/http_rest_api_handler.cc, http_server.cc and util/json_tensor.cc do for the status, the
metadata and predictions in columns ("inputs"); rows ("instances") it refuses.
"""

import base64
import concurrent.futures
import http.server
import json
import re
import threading
import urllib.parse
from pathlib import Path

import grpc
import numpy as np
import tensorflow as tf
from google.protobuf import json_format
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

HTTP_STATUS = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}


class StatusError(Exception):
    """What a request ends with instead of an answer."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code
        self.message = message


class Servable:
    """One version of a model: a SavedModel, called by its signatures."""

    def __init__(self, folder):
        proto = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
        self.signature_def = proto.meta_graphs[0].signature_def
        self._loaded = tf.saved_model.load(folder)

    def predict(self, name, inputs):
        expected = self.signature_def[name].inputs
        if set(inputs) != set(expected):
            raise StatusError("INVALID_ARGUMENT", f"input size does not match signature: {sorted(inputs)}")
        try:
            tensors = {key: tf.constant(value, expected[key].dtype) for key, value in inputs.items()}
            outputs = self._loaded.signatures[name](**tensors)
        except (tf.errors.InvalidArgumentError, ValueError, TypeError) as error:
            # A server's session finds a wrong dtype or rank, too; Python finds it before it calls, and puts frames of
            # its own around what a kernel says, which is all that a server has.
            message = getattr(error, "message", str(error)).partition("<stack traces unavailable>\n")
            raise StatusError("INVALID_ARGUMENT", (message[2] or message[0]).partition(" [Op:")[0]) from error
        # The value of a scalar string is no array.
        return {key: np.array(value.numpy(), value.dtype.as_numpy_dtype) for key, value in outputs.items()}


class StandIn:
    """What both stand-ins share: the models that `load` returns, and the requests that came in.

    Without a `port`, the system gives a free one.

    `faults` holds functions that are called one after the other, one for each request that comes in, before anything
    else is done; they may raise a `StatusError` or wait.
    """

    def __init__(self, models, port=0):
        self.models = models
        self.port = port
        self.faults = []
        self.requests = []

    def receive(self, request):
        self.requests.append(request)
        if self.faults:
            self.faults.pop(0)()

    def find(self, name, version):
        versions = self.models.get(name, {})
        if version is None and versions:
            version = max(versions)
        if version not in versions:
            wanted = f"Latest({name})" if version is None else f"Specific({name}, {version})"
            raise StatusError("NOT_FOUND", f"Servable not found for request: {wanted}")
        return versions[version]

    def metadata(self, name, version):
        signatures = get_model_metadata_pb2.SignatureDefMap()
        for key, signature in self.find(name, version).signature_def.items():
            signatures.signature_def[key].CopyFrom(signature)
        return signatures

    def status(self, name):
        if name not in self.models:
            raise StatusError("NOT_FOUND", f"Could not find any versions of model {name}")
        response = get_model_status_pb2.GetModelStatusResponse()
        for version in sorted(self.models[name], reverse=True):
            response.model_version_status.add(version=version, state="AVAILABLE").status.error_code = 0
        return response


def load(folders):
    """Loads every version of the models in `folders`, name -> path."""
    return {
        name: {int(version.name): Servable(version) for version in Path(path).iterdir() if version.name.isdigit()}
        for name, path in folders.items()
    }


class GrpcStandIn(StandIn):
    """A gRPC server at a port of its own, until the block ends."""

    def __enter__(self):
        # TensorFlow Serving takes messages as large as there can be, and gives errors of 1024 letters at most.
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self._server = grpc.server(concurrent.futures.ThreadPoolExecutor(4), options=options)
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(_Predictions(self), self._server)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(_Models(self), self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{self.port}')}"
        self._server.start()
        return self

    def __exit__(self, *exception):
        self._server.stop(grace=None).wait()


def _answering(method):
    """Ends a call of gRPC with the status that its method raises."""

    def answer(self, request, context):
        try:
            self._stand_in.receive(method.__name__)
            spec = request.model_spec
            version = spec.version.value if spec.HasField("version") else None
            return method(self, request, spec.name, version)
        except StatusError as error:
            context.abort(grpc.StatusCode[error.code], error.message[:1024])

    return answer


class _Predictions(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, stand_in):
        self._stand_in = stand_in

    @_answering
    def Predict(self, request, name, version):  # noqa: N802
        servable = self._stand_in.find(name, version)
        signature = request.model_spec.signature_name or "serving_default"
        if signature not in servable.signature_def:
            raise StatusError("FAILED_PRECONDITION", f'Serving signature key "{signature}" not found.')
        for key, info in servable.signature_def[signature].inputs.items():
            if key in request.inputs and request.inputs[key].dtype != info.dtype:
                dtypes = [tf.as_dtype(number).name for number in (info.dtype, request.inputs[key].dtype)]
                raise StatusError("INVALID_ARGUMENT", "Expects {} to be {} but {} is provided".format(key, *dtypes))
        inputs = {key: tf.make_ndarray(value) for key, value in request.inputs.items()}
        response = predict_pb2.PredictResponse(model_spec=request.model_spec)
        for key, value in servable.predict(signature, inputs).items():
            response.outputs[key].CopyFrom(tf.make_tensor_proto(value))
        return response

    @_answering
    def GetModelMetadata(self, request, name, version):  # noqa: N802
        if list(request.metadata_field) != ["signature_def"]:
            raise StatusError("INVALID_ARGUMENT", "Metadata field is not supported")
        response = get_model_metadata_pb2.GetModelMetadataResponse(model_spec=request.model_spec)
        response.metadata["signature_def"].Pack(self._stand_in.metadata(name, version))
        return response


class _Models(model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, stand_in):
        self._stand_in = stand_in

    @_answering
    def GetModelStatus(self, request, name, version):  # noqa: N802
        assert version is None, "this stand-in tells of all versions only"
        return self._stand_in.status(name)


class HttpServer:
    """Any handler of HTTP at a port of its own, until the block ends."""

    def __init__(self, answer, port=0):
        """`answer(method, path, body)` returns the status code and the bytes of the answer."""
        self._answer = answer
        self._port = port

    def __enter__(self):
        answer = self._answer

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                code, content = answer(self.command, self.path, body)
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET  # noqa: N815

            def log_message(self, *arguments):
                pass

            def handle(self):
                try:
                    super().handle()
                except ConnectionError:  # A client that has given up.
                    self.close_connection = True

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = False
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class RestStandIn(StandIn):
    """An HTTP server at a port of its own, until the block ends."""

    def __enter__(self):
        self._server = HttpServer(self._answer, self.port).__enter__()
        self.address = self._server.address
        return self

    def __exit__(self, *exception):
        self._server.__exit__(*exception)

    def _answer(self, method, path, body):
        try:
            self.receive(f"{method} {path}")
            return 200, self._process(method, path, body)
        except StatusError as error:
            return HTTP_STATUS[error.code], _json_bytes({"error": error.message})

    def _process(self, method, path, body):
        name = r"/v1/models/(?P<name>[^/:]+)(?:/versions/(?P<version>\d+))?"
        pattern = {"POST": f"{name}:predict", "GET": rf"{name}(?P<metadata>/metadata)?"}[method]
        match = re.fullmatch(pattern, path)
        if not match:
            raise StatusError("INVALID_ARGUMENT", f"Malformed request: {method} {path}")
        name = urllib.parse.unquote(match["name"])
        version = None if match["version"] is None else int(match["version"])
        if method == "POST":
            return self._predict(name, version, body)
        if not match["metadata"]:
            return json_format.MessageToJson(self.status(name), always_print_fields_with_no_presence=True).encode()
        signatures = json_format.MessageToDict(
            self.metadata(name, version), preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        spec = {"name": name, "signature_name": "", "version": str(version or 1)}
        return _json_bytes({"model_spec": spec, "metadata": {"signature_def": signatures}})

    def _predict(self, name, version, body):
        request = json.loads(body)
        servable = self.find(name, version)
        signature = request.get("signature_name", "serving_default")
        if signature not in servable.signature_def:
            raise StatusError("INVALID_ARGUMENT", f'Serving signature name: "{signature}" not found in signature def')
        if "inputs" not in request:
            raise StatusError("INVALID_ARGUMENT", "Missing 'inputs' key")
        infos = servable.signature_def[signature].inputs
        inputs = request["inputs"]
        if not isinstance(inputs, dict) or set(inputs) == {"b64"}:
            if len(infos) > 1:
                raise StatusError("INVALID_ARGUMENT", "inputs is a plain value/list, but expecting an object")
            inputs = dict.fromkeys(infos, inputs)
        missing = set(infos) - set(inputs)
        if missing:
            raise StatusError("INVALID_ARGUMENT", f"Missing named input: {missing.pop()} in 'inputs' object.")
        arrays = {key: _from_json(inputs[key], tf.as_dtype(info.dtype)) for key, info in infos.items()}
        outputs = {key: _to_json(value, key) for key, value in servable.predict(signature, arrays).items()}
        (lone,) = outputs.values() if len(outputs) == 1 else (None,)
        return _json_bytes({"outputs": outputs if len(outputs) > 1 else lone})


def _from_json(value, dtype):
    def leaf(item):
        if isinstance(item, dict):
            if dtype != tf.string or set(item) != {"b64"}:
                raise StatusError("INVALID_ARGUMENT", f"JSON Value: {item} not formatted correctly for base64 data")
            return base64.b64decode(item["b64"], validate=True)
        fitting = {tf.string: str, tf.bool: bool}.get(dtype, int if dtype.is_integer else (int, float))
        if not isinstance(item, fitting) or (isinstance(item, bool) and dtype != tf.bool):
            raise StatusError("INVALID_ARGUMENT", f"JSON Value: {item} is not of expected type: {dtype.name}")
        return item.encode() if isinstance(item, str) else item

    def walk(item):
        return [walk(each) for each in item] if isinstance(item, list) else leaf(item)

    return np.array(walk(value), dtype=dtype.as_numpy_dtype)


def _to_json(array, name):
    if array.dtype != object:
        return array.tolist()
    encode = (
        (lambda item: {"b64": base64.b64encode(item).decode()})
        if name.endswith("_bytes")
        else (lambda item: item.decode("utf-8", "surrogateescape"))
    )

    def walk(item):
        return [walk(each) for each in item] if isinstance(item, list) else encode(item)

    return walk(array.tolist())


def _json_bytes(value):
    """JSON as the server writes it: NaN and Infinity bare, and the bytes of strings as they are."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")
