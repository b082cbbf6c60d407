"""deploy/kubernetes.yaml says what Kubernetes reads, and slurm.sh starts, restarts and requeues what it should."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aib_tf.config import settings
from aib_tf.training import cluster

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
LONG = 120.0  # seconds; only a hang reaches them

# ---- kubernetes.yaml

# The fields of these objects in Kubernetes 1.31, as far as a training Job has a use for them: {field: type}. A type is
# a scalar, one of these names, a list of one of them, or "map" for names of one's own.
FIELDS = {
    "Service": {"apiVersion": str, "kind": str, "metadata": "Metadata", "spec": "ServiceSpec"},
    "ServiceSpec": {"clusterIP": str, "publishNotReadyAddresses": bool, "selector": "map", "ports": ["ServicePort"]},
    "ServicePort": {"name": str, "port": int},
    "Metadata": {"name": str, "labels": "map"},
    "Job": {"apiVersion": str, "kind": str, "metadata": "Metadata", "spec": "JobSpec"},
    "JobSpec": {
        "completionMode": str,
        "completions": int,
        "parallelism": int,
        "activeDeadlineSeconds": int,
        "backoffLimit": int,
        "podFailurePolicy": "PodFailurePolicy",
        "template": "PodTemplateSpec",
    },
    "PodFailurePolicy": {"rules": ["Rule"]},
    "Rule": {"action": str, "onExitCodes": "OnExitCodes", "onPodConditions": ["Condition"]},
    "OnExitCodes": {"containerName": str, "operator": str, "values": [int]},
    "Condition": {"type": str, "status": str},
    "PodTemplateSpec": {"metadata": "Metadata", "spec": "PodSpec"},
    "PodSpec": {
        "subdomain": str,
        "restartPolicy": str,
        "terminationGracePeriodSeconds": int,
        "containers": ["Container"],
        "volumes": ["Volume"],
    },
    "Container": {
        "name": str,
        "image": str,
        "command": [str],
        "env": ["Variable"],
        "ports": ["ContainerPort"],
        "resources": "Resources",
        "volumeMounts": ["Mount"],
    },
    "Variable": {"name": str, "value": str},
    "ContainerPort": {"name": str, "containerPort": int},
    "Resources": {"requests": "map", "limits": "map"},
    "Mount": {"name": str, "mountPath": str},
    "Volume": {"name": str, "persistentVolumeClaim": "Claim", "emptyDir": "EmptyDir"},
    "Claim": {"claimName": str},
    "EmptyDir": {"medium": str, "sizeLimit": str},
}


def read_yaml(text):
    """Reads the part of YAML that the file keeps to; any other raises ValueError.

    That is block mappings and sequences by indentation, flow sequences of numbers, double-quoted and plain scalars.
    """
    documents, lines = [], []
    for line in [*text.splitlines(), "---"]:
        if line == "---":
            value, rest = _block(lines, 0)
            if rest:
                raise ValueError(f"unexpected: {rest[0]}")
            documents.append(value)
            lines = []
        elif line.strip() and not line.lstrip().startswith("#"):
            lines.append(line)
    return documents


def _block(lines, indent):
    """The value whose lines begin at an indentation, and the lines after it."""
    value = None
    while lines:
        line = lines[0]
        spaces = len(line) - len(line.lstrip(" "))
        if spaces < indent:
            break
        text = line[spaces:]
        if spaces > indent or "\t" in line:
            raise ValueError(f"indentation: {line!r}")
        if text.startswith("- "):
            value = [] if value is None else value
            # What follows the hyphen stands two columns further in, as the first line of the item.
            lines = [" " * (indent + 2) + text[2:], *lines[1:]]
            if re.match(r"[\w./-]+:( |$)", text[2:]):
                item, lines = _block(lines, indent + 2)
            else:
                item, lines = _scalar(text[2:]), lines[1:]
            value.append(item)
        else:
            match = re.fullmatch(r"([\w./-]+):(?: (.+))?", text)
            if match is None or isinstance(value, list):
                raise ValueError(f"neither a field nor an item: {line!r}")
            value = {} if value is None else value
            if match[1] in value:
                raise ValueError(f"twice: {line!r}")
            if match[2] is None:
                value[match[1]], lines = _block(lines[1:], indent + 2)
            else:
                value[match[1]], lines = _scalar(match[2]), lines[1:]
    return value, lines


def _scalar(text):
    if quoted := re.fullmatch(r'"([^"\\]*)"', text):
        return quoted[1]
    if re.fullmatch(r"\[\d+(, \d+)*\]", text):
        return [int(number) for number in text[1:-1].split(", ")]
    if re.fullmatch(r"\d+", text):
        return int(text)
    if text in ("true", "false"):
        return text == "true"
    # What YAML would read as something else than this text, or we do not know.
    if re.search(r"^[\[\]{}>|*&!%@`'\",#?]|: | #|:$", text) or text.lower() in ("yes", "no", "on", "off", "null", "~"):
        raise ValueError(f"scalar: {text!r}")
    return text


def check(value, kind, path=""):
    """Raises ValueError unless a value has only the fields and types of its kind."""
    if isinstance(kind, list):
        if not isinstance(value, list):
            raise ValueError(f"{path} must be a list")
        for number, item in enumerate(value):
            check(item, kind[0], f"{path}[{number}]")
    elif kind == "map":
        if not isinstance(value, dict) or not all(isinstance(each, str | int) for each in value.values()):
            raise ValueError(f"{path} must be names and values")
    elif isinstance(kind, str):
        if not isinstance(value, dict):
            raise ValueError(f"{path} must be an object")
        for name, each in value.items():
            if name not in FIELDS[kind]:
                raise ValueError(f"{path}.{name} is no field of {kind}")
            check(each, FIELDS[kind][name], f"{path}.{name}")
    elif type(value) is not kind:
        raise ValueError(f"{path} must be of type {kind.__name__}, is {value!r}")


@pytest.fixture(scope="module")
def manifest():
    return (DEPLOY / "kubernetes.yaml").read_text()


@pytest.fixture(scope="module")
def service_and_job(manifest):
    return read_yaml(manifest)


@pytest.fixture(scope="module")
def pod(service_and_job):
    return service_and_job[1]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod):
    (container,) = pod["containers"]
    return container


def test_the_manifest_has_only_fields_of_the_api(service_and_job):
    for value in service_and_job:
        check(value, value["kind"])
    versions = [(value["kind"], value["apiVersion"]) for value in service_and_job]
    assert versions == [("Service", "v1"), ("Job", "batch/v1")]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("completionMode: Indexed", "completionmode: Indexed"),
        ("completions: 2", 'completions: "2"'),
        ('value: "2"', "value: 2"),
        ('status: "True"', "status: true"),
        ("      subdomain: digits", "    subdomain: digits"),
        ("values: [75]", "values: 75"),
        ("containerName: train", "containerName: a: b"),
        ("      labels:", "     labels:"),
        ("  completions: 2", "  completions: 2\n  completions: 2"),
    ],
)
def test_an_error_in_the_manifest_would_be_found(right, wrong, manifest):
    assert right in manifest
    with pytest.raises(ValueError):
        for value in read_yaml(manifest.replace(right, wrong, 1)):
            check(value, value["kind"])


def test_each_pod_finds_all_others_at_names_that_the_service_gives_them(service_and_job, pod, container):
    service, job = service_and_job
    variables = {each["name"]: each["value"] for each in container["env"]}
    count, name = job["spec"]["completions"], job["metadata"]["name"]
    assert (job["spec"]["completionMode"], job["spec"]["parallelism"]) == ("Indexed", count)
    (port,) = (each["containerPort"] for each in container["ports"])
    for index in range(count):
        # The two variables that Kubernetes itself sets in the pod.
        environment = {**variables, "JOB_COMPLETION_INDEX": str(index), "HOSTNAME": f"{name}-{index}"}
        found = cluster.find(environment)
        assert found.index == index
        assert found.addresses == tuple(f"{name}-{other}.{pod['subdomain']}:{port}" for other in range(count))
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}  # a label that Kubernetes gives the pods of a Job
    assert [each["port"] for each in service["spec"]["ports"]] == [port]


def test_lost_pods_and_saved_states_are_tried_again_and_errors_are_not(service_and_job, pod, container):
    job = service_and_job[1]
    assert pod["restartPolicy"] == "Never"  # the API demands it beside podFailurePolicy
    actions = {}
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        if codes := rule.get("onExitCodes"):
            assert (codes["containerName"], codes["operator"]) == (container["name"], "In")
            actions |= dict.fromkeys(codes["values"], rule["action"])
        else:
            actions |= {each["type"]: rule["action"] for each in rule["onPodConditions"]}
    assert actions == {"DisruptionTarget": "Ignore", 75: "Ignore", 1: "FailJob", 2: "FailJob"}
    assert pod["terminationGracePeriodSeconds"] > 30  # the default, short for a checkpoint


def test_the_pods_run_train_with_flags_that_it_has_and_keep_the_run(pod, container):
    program, script, *flags = container["command"]
    assert (program, script) == ("python", "scripts/train.py")
    values = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    assert set(values) <= {name for _, name, _ in settings()} | {"flagfile", "output_dir", "strategy"}
    assert values["strategy"] == "multi_worker"
    assert (ROOT / values["flagfile"]).is_file()
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert set(mounts) == {each["name"] for each in pod["volumes"]}
    assert values["output_dir"].startswith(mounts["runs"] + "/")


# ---- slurm.sh

# Takes the place of srun: writes down its arguments, and ends with the next of the codes that it is given. "wait" first
# waits for SIGTERM.
SRUN = """
import os, signal, sys, time
with open(os.environ["CALLS"], "a") as file:
    file.write("\\t".join(["srun", os.environ.get("SRUN_CPUS_PER_TASK", ""), *sys.argv[1:]]) + "\\n")
number = len(open(os.environ["CALLS"]).readlines()) - 1
action = os.environ["ACTIONS"].split(",")[number]
if action.startswith("wait"):
    def stop(*_):
        sys.exit(int(action.removeprefix("wait")))
    signal.signal(signal.SIGTERM, stop)
    open(os.environ["CALLS"] + ".waiting", "w").close()
    while True:
        time.sleep(1)
if int(action) < 0:
    os.kill(os.getpid(), -int(action))
sys.exit(int(action))
"""


@pytest.fixture
def slurm(tmp_path):
    """Starts slurm.sh with stand-ins; `actions` are what each srun does. Gives code, message and what was called."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tmp_path / "srun.py").write_text(SRUN)
    calls = tmp_path / "calls"
    stand_ins = {
        "srun": f"#!/bin/sh\nexec '{sys.executable}' '{tmp_path}/srun.py' \"$@\"\n",
        "scontrol": '#!/bin/sh\nprintf \'scontrol\\t%s\\t%s\\n\' "$@" >> "$CALLS"\n',
    }
    for name, text in stand_ins.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(actions="0", *arguments, number=None, folder=ROOT, **environment):
        calls.unlink(missing_ok=True)
        variables = {
            "PATH": os.pathsep.join([str(tools), os.environ["PATH"]]),
            "CALLS": str(calls),
            "ACTIONS": actions,
            "PYTHON": sys.executable,
            "SLURM_JOB_ID": "77",
            "SLURM_CPUS_PER_TASK": "4",
            **environment,
        }
        process = subprocess.Popen(
            [DEPLOY / "slurm.sh", *arguments],
            env={name: value for name, value in variables.items() if value is not None},
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            if number is not None:
                end = time.monotonic() + LONG
                while not Path(f"{calls}.waiting").exists():
                    assert time.monotonic() < end and process.poll() is None
                    time.sleep(0.02)
                process.send_signal(number)
            _, message = process.communicate(timeout=LONG)
        finally:
            process.kill()
        called = calls.read_text().splitlines() if calls.exists() else []
        return process.returncode, message, [line.split("\t") for line in called]

    return run


def test_slurm_starts_train_on_all_nodes_with_the_flags_that_it_was_given(slurm):
    code, message, ((name, cpus, *arguments),) = slurm("0", "--output_dir=runs/a b", "--epochs=3")
    assert (code, message, name, cpus) == (0, "", "srun", "4")
    position = arguments.index(sys.executable)
    assert arguments[position + 1 :] == [
        "scripts/train.py",
        "--strategy=multi_worker",
        "--output_dir=runs/a b",
        "--epochs=3",
    ]
    assert "--distribution=block" in arguments[:position]  # the order that cluster.find supposes
    assert "--kill-on-bad-exit=0" in arguments[:position]


@pytest.mark.parametrize(
    ("actions", "code", "starts"),
    [("75,0", 0, 2), ("-9,0", 0, 2), ("137,75,75", 75, 3), ("1", 1, 1), ("2", 2, 1)],
)
def test_slurm_starts_the_workers_again_only_after_one_was_lost(actions, code, starts, slurm):
    actual, message, called = slurm(actions)
    assert (actual, len(called)) == (code, starts)
    assert message.count("starting all workers again") == starts - 1


def test_slurm_puts_the_job_back_into_the_queue_when_its_time_is_up(slurm):
    code, message, called = slurm("wait75", number=signal.SIGUSR1)
    assert code == 0 and "goes back into the queue" in message
    assert called[1:] == [["scontrol", "requeue", "77"]]


@pytest.mark.parametrize(
    ("number", "action", "code"),
    [(signal.SIGUSR1, "wait0", 0), (signal.SIGUSR1, "wait1", 1), (signal.SIGTERM, "wait75", 75)],
)
def test_slurm_puts_back_neither_what_has_ended_nor_what_was_stopped(number, action, code, slurm):
    actual, message, called = slurm(action, number=number)
    assert (actual, message, len(called)) == (code, "", 1)


def test_slurm_says_what_is_missing_and_starts_nothing(slurm, tmp_path):
    for options, expected in [
        ({"SLURM_JOB_ID": None}, "There is no job of Slurm. Submit this file with sbatch."),
        ({"folder": tmp_path}, "There is no scripts/train.py in"),
        ({"PYTHON": "no/such/python"}, "There is no no/such/python."),
    ]:
        code, message, called = slurm(**options)
        assert (code, called) == (2, []), options
        assert message.startswith("slurm.sh: ") and expected in message


def test_the_options_of_sbatch_stand_before_the_first_command():
    lines = (DEPLOY / "slurm.sh").read_text().splitlines()
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH ")]
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert options and max(options) < first  # sbatch reads no further
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", lines[number]) for number in options)
    assert "#SBATCH --ntasks-per-node=1" in lines
