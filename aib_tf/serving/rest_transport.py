"""Requests to TensorFlow Serving by its REST interface, https://www.tensorflow.org/tfx/serving/api_rest."""

import base64
import contextlib
import http.client
import json
import ssl
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
from tensorflow.core.framework import types_pb2

from aib_tf.serving.errors import RequestError
from aib_tf.serving.signatures import INTERNAL_PREFIX, Signature, tensor_spec

# The server turns the status of a request into one of these; 400 is also FAILED_PRECONDITION and OUT_OF_RANGE.
# 502 is of a proxy whose server is away.
_CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ABORTED",
    413: "RESOURCE_EXHAUSTED",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    500: "INTERNAL",
    501: "UNIMPLEMENTED",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
# JSON is UTF-8, but the server copies the bytes of a string as they are: kept through the text and back.
_TEXT = ("utf-8", "surrogateescape")


class RestTransport:
    """Sends one request at a time, each over its own connection; every failure is a `RequestError`."""

    protocol = "REST"
    default_port = 8501

    def __init__(self, url, model, version, timeout):
        self.status_url = f"{url.rstrip('/')}/v1/models/{urllib.parse.quote(model, safe='')}"
        self._url = self.status_url if version is None else f"{self.status_url}/versions/{version}"
        self._timeout = timeout

    def signatures(self):
        """Returns the model's signatures by name."""
        answer = self._ask(f"{self._url}/metadata")
        with _expecting("metadata with signatures", answer):
            found = answer["metadata"]["signature_def"]["signature_def"]
            return {
                name: Signature(_tensor_specs(signature["inputs"]), _tensor_specs(signature["outputs"]))
                for name, signature in found.items()
                if not name.startswith(INTERNAL_PREFIX)
            }

    def predict(self, name, signature, arrays):
        """Returns the outputs of the signature `name` for `arrays`, both by name."""
        inputs = {key: _encoded(array.tolist()) for key, array in arrays.items()}
        answer = self._ask(f"{self._url}:predict", {"signature_name": name, "inputs": inputs})
        specs = signature.outputs
        with _expecting(f"outputs {', '.join(specs)}", answer):
            values = answer["outputs"]
            if len(specs) == 1:  # A lone output comes without its name.
                values = dict.fromkeys(specs, values)
            return {key: _array(values[key], spec, key) for key, spec in specs.items()}

    def version_states(self):
        """Returns version -> state of the model, whatever version the client is for."""
        answer = self._ask(self.status_url)
        with _expecting("the status of versions", answer):
            return {int(status["version"]): status["state"] for status in answer["model_version_status"]}

    def close(self):
        """Nothing stays open between requests."""

    def _ask(self, url, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            with error:
                raise RequestError(_CODES.get(error.code, "UNKNOWN"), _error_message(error)) from None
        except (OSError, http.client.HTTPException) as error:
            raise _network_failure(error) from None
        text = content.decode(*_TEXT)
        try:
            return json.loads(text)
        except ValueError as error:
            raise RequestError("INTERNAL", f"the answer is not JSON ({error}): {text[:80]!r}") from None


@contextlib.contextmanager
def _expecting(what, answer):
    """Turns what fails when an answer has another form into a `RequestError`."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        said = json.dumps(answer)[:80]
        raise RequestError("INTERNAL", f"the answer does not hold {what}: {said}") from error


def _network_failure(error):
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    said = str(reason) or type(reason).__name__
    if isinstance(reason, TimeoutError):
        return RequestError("DEADLINE_EXCEEDED", said)
    if isinstance(reason, ssl.SSLError):
        return RequestError("UNKNOWN", said)
    if isinstance(reason, (OSError, http.client.IncompleteRead)):
        return RequestError("UNAVAILABLE", said)
    return RequestError("UNKNOWN", f"the answer is not HTTP ({type(reason).__name__})")


def _error_message(error):
    try:
        text = error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        text = ""
    try:
        return str(json.loads(text)["error"])
    except (ValueError, LookupError, TypeError):
        # Not of TensorFlow Serving, or of one up to 2.2, which wrote \' into its JSON.
        return f"HTTP {error.code} {error.reason}: {text[:200]}"


def _tensor_specs(infos):
    return {
        name: tensor_spec(types_pb2.DataType.Value(info["dtype"]), _sizes(info["tensor_shape"]))
        for name, info in infos.items()
    }


def _sizes(shape):
    # 64-bit numbers are strings in the JSON of a proto.
    return None if shape.get("unknown_rank") else [int(dimension["size"]) for dimension in shape.get("dim", [])]


def _encoded(value):
    if isinstance(value, list):
        return [_encoded(item) for item in value] if value and isinstance(value[0], (list, bytes)) else value
    return {"b64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


def _array(value, spec, name):
    if spec.dtype == object:
        array = np.array(value, dtype=object)
        array.flat[:] = [_decoded(string, name) for string in array.ravel()]
    else:
        array = np.array(value, dtype=spec.dtype)
    if array.size or spec.shape is None:
        return array
    # [] does not tell the other sizes; the one that is free is 0.
    shape = [size or 0 for size in spec.shape]
    return array.reshape(shape)


def _decoded(string, name):
    # The server goes by the name of an output, since TensorFlow has one dtype for text and bytes.
    return base64.b64decode(string["b64"]) if name.endswith("_bytes") else string.encode(*_TEXT)
