"""Requests to TensorFlow Serving by gRPC."""

import contextlib

import grpc
import tensorflow as tf
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from aib_tf.serving.errors import RequestError
from aib_tf.serving.signatures import INTERNAL_PREFIX, Signature, tensor_spec

_OPTIONS = (
    # gRPC's own limit of an answer is 4 MiB, a few explained pictures; TensorFlow Serving takes and sends 2 GiB.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Retries are the client's: it counts and spaces them. The channel must be ready to connect anew for each.
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 100),
)


class GrpcTransport:
    """Sends one request at a time over a channel; every failure is a `RequestError`."""

    protocol = "gRPC"
    default_port = 8500

    def __init__(self, target, model, version, timeout):
        self._spec = model_pb2.ModelSpec(name=model)
        if version is not None:
            self._spec.version.value = version
        self._timeout = timeout
        self._channel = grpc.insecure_channel(target, options=_OPTIONS)
        self._predictions = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)
        self._models = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self.status_url = f"http://{target.rpartition(':')[0]}:8501/v1/models/{model}"

    def signatures(self):
        """Returns the model's signatures by name."""
        request = get_model_metadata_pb2.GetModelMetadataRequest(
            model_spec=self._spec, metadata_field=["signature_def"]
        )
        with _failures():
            answer = self._predictions.GetModelMetadata(request, timeout=self._timeout)
        found = get_model_metadata_pb2.SignatureDefMap()
        if not answer.metadata["signature_def"].Unpack(found):
            raise RequestError("INTERNAL", "the metadata holds no signatures")
        return {
            name: Signature(_tensor_specs(signature.inputs), _tensor_specs(signature.outputs))
            for name, signature in found.signature_def.items()
            if not name.startswith(INTERNAL_PREFIX)
        }

    def predict(self, name, signature, arrays):
        """Returns the outputs of the signature `name` for `arrays`, both by name."""
        request = predict_pb2.PredictRequest(model_spec=self._spec)
        request.model_spec.signature_name = name
        for key, array in arrays.items():
            request.inputs[key].CopyFrom(tf.make_tensor_proto(array, shape=array.shape))
        with _failures():
            answer = self._predictions.Predict(request, timeout=self._timeout)
        return {key: tf.make_ndarray(tensor) for key, tensor in answer.outputs.items()}

    def version_states(self):
        """Returns version -> state of the model, whatever version the client is for."""
        request = get_model_status_pb2.GetModelStatusRequest(model_spec=model_pb2.ModelSpec(name=self._spec.name))
        with _failures():
            answer = self._models.GetModelStatus(request, timeout=self._timeout)
        state = get_model_status_pb2.ModelVersionStatus.State
        return {status.version: state.Name(status.state) for status in answer.model_version_status}

    def close(self):
        self._channel.close()


def _tensor_specs(infos):
    return {
        name: tensor_spec(
            info.dtype,
            None if info.tensor_shape.unknown_rank else [dimension.size for dimension in info.tensor_shape.dim],
        )
        for name, info in infos.items()
    }


@contextlib.contextmanager
def _failures():
    try:
        yield
    except grpc.RpcError as error:
        raise RequestError(error.code().name, error.details() or "") from None
