"""The files in deploy/ say what TensorFlow Serving reads, and serve.sh gives them to it."""

import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format, wrappers_pb2
from tensorflow_serving.config import model_server_config_pb2

from aib_tf.export.warmup import WARMUP_BATCH_SIZES

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"

# The package tensorflow-serving-api leaves these two messages out (releases 1.9, 1.15, 2.0, 2.6 and 2.21 were looked
# through). So their fields stand here, with the names, numbers and types that tensorflow/serving publishes:
# BatchingParameters as in tensorflow_serving/servables/tensorflow/session_bundle_config.proto at commit 03f8b6b, whose
# later releases have more fields, and tensorflow_serving/config/monitoring_config.proto at commit 021efbd.
_INT64, _BOOL, _STRING = "TYPE_INT64", "TYPE_BOOL", "TYPE_STRING"
_INT64_VALUE, _STRING_VALUE = ".google.protobuf.Int64Value", ".google.protobuf.StringValue"
_PUBLISHED = {
    "BatchingParameters": {
        "max_batch_size": (1, _INT64_VALUE),
        "batch_timeout_micros": (2, _INT64_VALUE),
        "max_enqueued_batches": (3, _INT64_VALUE),
        "num_batch_threads": (4, _INT64_VALUE),
        "thread_pool_name": (5, _STRING_VALUE),
        "allowed_batch_sizes": (6, [_INT64]),  # repeated
        "pad_variable_length_inputs": (7, _BOOL),
    },
    "PrometheusConfig": {"enable": (1, _BOOL), "path": (2, _STRING)},
    "MonitoringConfig": {"prometheus_config": (1, ".tensorflow.serving.PrometheusConfig")},
}


def _published_messages():
    """Message classes of `_PUBLISHED`, in a pool of their own, so that they meet no others of the same name."""
    file = descriptor_pb2.FileDescriptorProto(
        name="published.proto",
        package="tensorflow.serving",
        syntax="proto3",
        dependency=[wrappers_pb2.DESCRIPTOR.name],
    )
    for message_name, fields in _PUBLISHED.items():
        message = file.message_type.add(name=message_name)
        for name, (number, kind) in fields.items():
            repeated = isinstance(kind, list)
            field = message.field.add(name=name, number=number)
            field.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            (kind,) = kind if repeated else (kind,)
            if kind.startswith("."):
                field.type, field.type_name = field.TYPE_MESSAGE, kind
            else:
                field.type = field.Type.Value(kind)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.AddSerializedFile(file.SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"tensorflow.serving.{name}"))
        for name in _PUBLISHED
    }


MESSAGES = {
    "models.config": model_server_config_pb2.ModelServerConfig,
    "batching.config": _published_messages()["BatchingParameters"],
    "monitoring.config": _published_messages()["MonitoringConfig"],
}


def _parse(name, text):
    return text_format.Parse(text, MESSAGES[name]())


def _read(name):
    return _parse(name, (DEPLOY / name).read_text())


@pytest.mark.parametrize("name", MESSAGES)
def test_a_config_is_what_the_server_reads(name):
    assert len(_read(name).ListFields()) > 0


@pytest.mark.parametrize("name", MESSAGES)
def test_a_field_that_the_server_does_not_have_would_be_found(name):
    text = (DEPLOY / name).read_text()
    field = re.search(r"^ *([a-z_]+)(?: \{|:)", text, re.MULTILINE)
    misspelt = text[: field.start(1)] + field[1] + "z" + text[field.end(1) :]
    for wrong in (f"{text}\nno_such_field: 1\n", misspelt):
        with pytest.raises(text_format.ParseError, match="no field named"):
            _parse(name, wrong)


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("models.config", "num_versions: 2", 'num_versions: "two"'),
        ("batching.config", "max_batch_size { value: 32 }", "max_batch_size: 32"),
        ("batching.config", "allowed_batch_sizes: 8", "allowed_batch_sizes { value: 8 }"),
        ("monitoring.config", "enable: true", "enable: 2"),
    ],
)
def test_a_value_of_another_type_would_be_found(name, right, wrong):
    text = (DEPLOY / name).read_text()
    assert right in text
    with pytest.raises(text_format.ParseError):
        _parse(name, text.replace(right, wrong))


def test_the_server_keeps_the_version_before_the_newest():
    (model,) = _read("models.config").model_config_list.config
    assert (model.name, model.base_path, model.model_platform) == ("digits", "/models/digits", "tensorflow")
    assert model.model_version_policy.latest.num_versions == 2


def test_the_alternative_in_the_comments_is_a_config_as_well():
    text = (DEPLOY / "models.config").read_text()
    text = re.sub(r"^ *model_version_policy .*\n", "", text, flags=re.MULTILINE)
    (model,) = _parse("models.config", text.replace("#>", "")).model_config_list.config
    assert list(model.model_version_policy.specific.versions) == [1, 2]
    assert dict(model.version_labels) == {"stable": 1, "canary": 2}


def test_batches_have_the_sizes_that_the_model_is_warmed_up_with():
    sizes = list(_read("batching.config").allowed_batch_sizes)
    assert sizes == list(WARMUP_BATCH_SIZES)


def test_batching_keeps_the_rules_of_the_server():
    batching = _read("batching.config")
    sizes = list(batching.allowed_batch_sizes)
    assert sizes == sorted(set(sizes))
    assert batching.max_batch_size.value == sizes[-1]
    assert batching.batch_timeout_micros.value >= 0
    assert batching.num_batch_threads.value >= 1
    assert batching.max_enqueued_batches.value >= 1
    # Pictures of different sizes must not be filled up with zeros.
    assert not batching.pad_variable_length_inputs


def test_metrics_are_where_prometheus_is_told_to_look():
    prometheus = _read("monitoring.config").prometheus_config
    assert prometheus.enable
    assert prometheus.path == "/monitoring/prometheus/metrics"


@pytest.fixture
def serve(tmp_path):
    """Runs serve.sh where `docker` only writes down its arguments; gives these, or what the script said instead."""
    tools = tmp_path / "bin"
    tools.mkdir()
    arguments = tmp_path / "arguments"
    docker = tools / "docker"
    docker.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > '{arguments}'\n")
    docker.chmod(0o755)

    def run(*command, script=DEPLOY / "serve.sh", **environment):
        arguments.unlink(missing_ok=True)
        path = os.pathsep.join([str(tools), os.environ["PATH"]])
        done = subprocess.run(
            [script, *command],
            env={"PATH": path, **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        recorded = arguments.read_text().splitlines() if arguments.exists() else None
        return done.returncode, done.stderr, recorded

    return run


@pytest.fixture
def exported(tmp_path):
    """A folder as the exporter leaves it, in a path with a space."""
    folder = tmp_path / "my models" / "digits"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "saved_model.pb").touch()
    return folder


def _mounts(arguments):
    """Where the folders of this machine are in the container: {target: source}."""
    mounts = [value for flag, value in itertools.pairwise(arguments) if flag == "--mount"]
    assert all(mount.endswith(",readonly") for mount in mounts)
    return {Path(target): Path(source) for source, target in re.findall(r"source=(.*),target=(.*),", "\n".join(mounts))}


def _flags(arguments):
    """The flags of the server, which follow the image: {name: value}."""
    (image,) = [number for number, each in enumerate(arguments) if each.startswith("tensorflow/serving:")]
    return dict(flag.removeprefix("--").split("=", 1) for flag in arguments[image + 1 :])


def test_serve_mounts_the_model_and_every_file_that_it_names(serve, exported):
    code, message, arguments = serve("my models/digits")
    assert (code, message) == (0, "")
    assert arguments[0] == "run"
    assert arguments[arguments.index("--entrypoint") + 1] == "tensorflow_model_server"
    mounts = _mounts(arguments)
    (model,) = _read("models.config").model_config_list.config
    assert mounts[Path(model.base_path)] == exported
    files = {name: Path(value) for name, value in _flags(arguments).items() if name.endswith("_file")}
    assert {name: mounts[file.parent] / file.name for name, file in files.items()} == {
        "model_config_file": DEPLOY / "models.config",
        "batching_parameters_file": DEPLOY / "batching.config",
        "monitoring_config_file": DEPLOY / "monitoring.config",
    }


def test_serve_finds_its_folders_whatever_cd_searches(serve, exported):
    assert serve("my models/digits", CDPATH=".") == serve("my models/digits")


def test_serve_turns_on_what_the_files_are_for(serve, exported):
    flags = _flags(serve(exported)[2])
    assert flags["enable_batching"] == "true"
    assert flags["allow_version_labels_for_unavailable_models"] == "true"
    assert int(flags["model_config_file_poll_wait_seconds"]) > 0
    assert int(flags["rest_api_timeout_in_ms"]) > 0


def test_serve_publishes_both_ports_on_this_machine_alone_by_default(serve, exported):
    published = [each for each in serve(exported)[2] if re.fullmatch(r"[\d.]+:\d+:\d+", each)]
    assert published == ["127.0.0.1:8500:8500", "127.0.0.1:8501:8501"]
    arguments = serve(exported, ADDRESS="0.0.0.0", GRPC_PORT="9000", REST_PORT="9001")[2]
    assert "0.0.0.0:9000:8500" in arguments and "0.0.0.0:9001:8501" in arguments
    flags = _flags(arguments)
    assert (flags["port"], flags["rest_api_port"]) == ("8500", "8501")


def test_serve_runs_one_release_of_the_server_or_the_image_that_is_named(serve, exported):
    (image,) = [each for each in serve(exported)[2] if each.startswith("tensorflow/serving:")]
    assert re.fullmatch(r"tensorflow/serving:\d+\.\d+\.\d+", image)
    arguments = serve(exported, IMAGE="tensorflow/serving:2.21.0-gpu", DOCKER_ARGS="--gpus=all --name=a")[2]
    position = arguments.index("tensorflow/serving:2.21.0-gpu")
    assert {"--gpus=all", "--name=a"} <= set(arguments[:position])


def test_serve_hands_further_flags_to_the_server(serve, exported):
    arguments = serve(exported, "--", "--rest_api_num_threads=8", "--xla_cpu_compilation_enabled=true")[2]
    assert arguments[-2:] == ["--rest_api_num_threads=8", "--xla_cpu_compilation_enabled=true"]


def test_serve_takes_several_models_and_configs_of_another_folder(serve, exported, tmp_path):
    config = tmp_path / "my config"
    shutil.copytree(DEPLOY, config)
    other = shutil.copytree(exported, exported.with_name("cifar10"))
    code, message, arguments = serve(exported, other, CONFIG="my config")
    assert (code, arguments) == (1, None)
    assert 'no model with base_path: "/models/cifar10"' in message
    text = (config / "models.config").read_text()
    block = text[text.index("  config {") : text.rindex("}")]
    (config / "models.config").write_text(text.replace(block, block + block.replace("digits", "cifar10")))
    code, message, arguments = serve(exported, other, CONFIG="my config")
    assert (code, message) == (0, "")
    assert _mounts(arguments) == {
        Path("/config"): config,
        Path("/models/digits"): exported,
        Path("/models/cifar10"): other,
    }


def test_serve_says_what_is_missing_and_starts_nothing(serve, exported, tmp_path):
    for command, environment, expected_code, expected in [
        ([], {}, 2, "Name the folder of an exported model"),
        (["models/none"], {}, 1, "There is no folder models/none. Write it with scripts/export.py"),
        ([exported / "1"], {}, 1, "Give the folder of all versions"),
        ([tmp_path], {}, 1, "No version of a model"),
        ([exported], {"CONFIG": str(tmp_path)}, 1, "There is no models.config in the folder"),
    ]:
        code, message, arguments = serve(*command, **environment)
        assert (code, arguments) == (expected_code, None), command
        assert expected in message and message.startswith("serve.sh: ")


def test_serve_says_that_there_is_no_docker(exported, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "grep"):
        (tools / name).symlink_to(shutil.which(name))
    done = subprocess.run([DEPLOY / "serve.sh", exported], env={"PATH": str(tools)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "There is no docker" in done.stderr
