"""What can go wrong between a client and a server."""


class ServingError(OSError):
    """A server gave no prediction: it is absent, lacks the model or the signature, or refused the request.

    It is an OSError, as the errors of urllib and of other HTTP clients are.

    Attributes:
        code: the gRPC status by name, over REST too: "UNAVAILABLE", "DEADLINE_EXCEEDED", "NOT_FOUND",
            "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "INTERNAL", "UNKNOWN", ...
        details: what the server, or the network below it, said.
    """

    def __init__(self, message, code, details=""):
        super().__init__(message)
        self.code = code
        self.details = details


class RequestError(Exception):
    """One request of a transport failed; the client retries it or makes a `ServingError` of it."""

    def __init__(self, code, details):
        super().__init__(f"{code}: {details}")
        self.code = code
        self.details = details
