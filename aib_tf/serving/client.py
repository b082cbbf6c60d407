"""Predictions from a model that TensorFlow Serving has loaded."""

import random
import re
import shlex
import urllib.parse
from collections.abc import Callable, Mapping
from time import sleep
from typing import Any

import numpy as np

from aib_tf.serving.errors import RequestError, ServingError
from aib_tf.serving.signatures import Signature, input_arrays
from aib_tf.validation import check_count, check_weight

# What can pass by itself. A prediction changes nothing on the server, so asking twice does no harm.
_PASSING = ("UNAVAILABLE", "DEADLINE_EXCEEDED")
# Seconds before the first retry; each further wait is twice as long, up to the longest, and a fifth more or less, so
# that many clients of one server do not come back together.
_FIRST_WAIT, _LONGEST_WAIT, _JITTER = 0.25, 10.0, 0.2


class Client:
    """Asks TensorFlow Serving for the predictions of one model, by gRPC or REST with the same results.

    Args:
        server: "host:port" or "grpc://host:port" for gRPC, where TensorFlow Serving's default port is 8500;
            "http://host:port" or "https://host:port" for REST, by default at port 8501.
        model: name of the model on the server.
        version: its version; None takes the one that the server prefers, usually the latest.
        timeout: seconds to wait for the answer to one request; over REST, for each part of it.
        retries: how often a request is sent again while the server cannot be reached, is not ready or does not answer
            in time, with a wait before each that starts at a quarter of a second and doubles. Other failures, such as
            an unknown model or a refused input, are not retried.

    Raises:
        ValueError: an argument is impossible.

    Example:
        with Client("localhost:8500", "digits") as client:
            answer = client.predict("serve_bytes", {"image_bytes": [Path("one.png").read_bytes()]})
        print(answer["class_name"][0].decode(), answer["probabilities"][0].max())
    """

    def __init__(self, server: str, model: str, version: int | None = None, *, timeout: float = 30.0, retries: int = 3):
        if not isinstance(model, str) or not re.fullmatch(r"[^/:]+", model):
            raise ValueError(f"`model` must be a name without '/' and ':'. Received: model={model!r}")
        self._version = None if version is None else check_count("version", version, minimum=0)
        self._timeout = check_weight("timeout", timeout, positive=True)
        self._retries = check_count("retries", retries, minimum=0)
        self._server = server
        self._model = model
        self._transport = _transport(server, model, self._version, self._timeout)
        self._signatures = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._transport.close()

    def signatures(self) -> dict[str, Signature]:
        """Asks the server for the model's signatures.

        Returns:
            Name -> inputs and outputs with their dtypes and shapes.

        Raises:
            ServingError: the server gave no answer, or has no such model or version.
        """
        found = self._request(self._transport.signatures)
        self._signatures = {name: found[name] for name in sorted(found)}
        return dict(self._signatures)

    def signature(self, name: str) -> Signature:
        """Returns the inputs and outputs of one signature, as they were when the server was last asked for them.

        Raises:
            ServingError: the model has no such signature, or as for `signatures`.
        """
        if self._signatures is None:
            self.signatures()
        if name not in self._signatures:
            known = ", ".join(self._signatures)
            raise ServingError(f"The model has no signature {name!r}; it has: {known}. {self._received()}", "NOT_FOUND")
        return self._signatures[name]

    def predict(self, signature: str, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Calls the model.

        The signatures are asked for once, before the first prediction; call `signatures()` to ask anew when the server
        may have loaded a version with others.

        Args:
            signature: name of the signature, such as "serve_bytes" or "explain".
            inputs: name -> array, or what NumPy makes an array of, bytes or lists of bytes for strings. Numbers are
                turned into the signature's dtype.

        Returns:
            Name -> array of the signature's dtype; strings are arrays of bytes.

        Raises:
            ServingError: the server gave no answer, has no such model, version or signature, or refused the inputs.
            ValueError: an input is missing or unknown, or is nothing that the signature's dtype can hold.
        """
        expected = self.signature(signature)
        arrays = input_arrays(expected, inputs)
        return self._request(lambda: self._transport.predict(signature, expected, arrays))

    def _request(self, send: Callable[[], Any]) -> Any:
        wait = _FIRST_WAIT
        for attempt in range(1, self._retries + 2):
            try:
                return send()
            except RequestError as failure:
                if failure.code not in _PASSING or attempt > self._retries:
                    message = f"{self._explanation(failure, attempt)} {self._received()}"
                    raise ServingError(message, failure.code, failure.details) from failure
            sleep(wait * random.uniform(1 - _JITTER, 1 + _JITTER))
            wait = min(2 * wait, _LONGEST_WAIT)

    def _explanation(self, failure, attempts):
        """Says what failed, what was tried and what to do."""
        transport = self._transport
        times = "once" if attempts == 1 else f"{attempts} times"
        name = shlex.quote(self._model)
        # Without the node of the graph, which a kernel's message ends with; `details` has it.
        said = " ".join(re.sub(r"\[\[.*\]\]", "", failure.details).split()).rstrip(".")
        if failure.code == "UNAVAILABLE":
            return (
                f"The {transport.protocol} server at {self._server} is not available, tried {times}: {said}. Is it "
                f"running, and is this its {transport.protocol} port ({transport.default_port} by default)? To start "
                f'one: `docker run --rm -p 8500:8500 -p 8501:8501 -v "$PWD"/models/{name}:/models/{name} '
                f"-e MODEL_NAME={name} tensorflow/serving`."
            )
        if failure.code == "DEADLINE_EXCEEDED":
            return (
                f"{self._server} did not answer within {self._timeout:g} seconds, tried {times}: {said}. Give it a "
                "longer timeout, or fewer images in one request."
            )
        if failure.code == "NOT_FOUND":
            return f"{self._server} knows no such model or version: {said}. {self._known_versions()}"
        if failure.code == "INVALID_ARGUMENT":
            return f"{self._server} refused the request: {said}."
        if failure.code == "RESOURCE_EXHAUSTED":
            return f"The request is too much for {self._server}: {said}. Send fewer images in one request."
        return (
            f"{self._server} failed ({failure.code}): {said}. Is this the {transport.protocol} port of TensorFlow "
            f"Serving ({transport.default_port} by default)?"
        )

    def _known_versions(self):
        """Says which versions the server has, for a model that it did not find."""
        try:
            states = self._transport.version_states()
        except RequestError:
            states = {}
        if states:
            listed = ", ".join(f"{version} ({states[version]})" for version in sorted(states))
            return f"Of this model it has the versions: {listed}."
        return (
            "Compare the name with the one that the server was started with (MODEL_NAME, or its models.config); "
            f"{self._transport.status_url} tells whether it has that model."
        )

    def _received(self):
        version = "" if self._version is None else f", version={self._version}"
        return f"Received: server={self._server!r}, model={self._model!r}{version}"


def _transport(server, model, version, timeout):
    """Makes the transport that the form of the address asks for."""
    text = server if isinstance(server, str) else ""
    scheme, separator, rest = text.partition("://")
    scheme, rest = (scheme.lower(), rest) if separator else ("grpc", text)
    try:
        parts = urllib.parse.urlsplit(f"//{rest}")
        host, port = parts.hostname, parts.port
        usable = bool(host) and not (parts.query or parts.fragment or re.search(r"\s", rest))
    except ValueError:  # a port that is no number, brackets of IPv6 that do not close
        usable = False
    if usable and scheme in ("http", "https"):
        from aib_tf.serving.rest_transport import RestTransport

        return RestTransport(f"{scheme}://{rest}", model, version, timeout)
    if usable and scheme == "grpc" and port and rest == parts.netloc:
        from aib_tf.serving.grpc_transport import GrpcTransport

        return GrpcTransport(rest, model, version, timeout)
    raise ValueError(
        "`server` must be an address such as localhost:8500 or grpc://localhost:8500 for gRPC, or "
        f"http://localhost:8501 for REST. Received: server={server!r}"
    )
