"""The workers of a run on several machines: found in the environment, and met before TensorFlow starts.

TensorFlow's own servers wait for a worker that never comes, and tell nobody of a busy port or of another version. So
the workers meet first, on the ports that TensorFlow takes afterwards. Each connects to worker 0 and sends one JSON
line: its index, the addresses it knows, and the facts that must be equal. Worker 0 answers `waiting` at once and, when
all are there, `go`, or `stop` with the same reason for all. A line has at most 1 MiB and nothing in it is executed;
what is no such line, a port scan for example, is dropped. Like TensorFlow's servers, a meeting trusts its network.

Nothing here needs TensorFlow.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import re
import secrets
import selectors
import socket
import time
from collections.abc import Mapping

__all__ = ["Cluster", "ClusterError", "MissingWorkerError", "find", "meet"]

_LOG = logging.getLogger("aib_tf")

_PROTOCOL = 1
_MAX_LINE = 2**20
_SILENT_SECONDS = 10.0  # who has said nothing whole by then is no worker
_RETRY_SECONDS = 0.5
_GRACE_SECONDS = 20.0  # after trouble is known: for the others to come and hear of it
_BIND_SECONDS = 5.0  # for an earlier run on the same port to end
_MAX_STRANGERS = 128
_MAX_DIFFERENCES = 12

_KUBERNETES_PORT = 2222
# Below the ports that systems give to outgoing connections (from 32768 on Linux). 64 for each job on a node.
_SLURM_PORTS, _SLURM_SLOTS, _SLURM_SLOT = 10000, 340, 64

_REMEDIES = {
    "addresses": "Give every worker the same list of addresses.",
    "versions": "Install the same versions everywhere.",
    "devices": "Give every worker the same number of GPUs, for example with CUDA_VISIBLE_DEVICES.",
}


class ClusterError(ValueError):
    """The workers of a run do not fit together, or their description is damaged; the message says how to mend it."""


class MissingWorkerError(ClusterError):
    """A worker did not come in time: the same command may succeed when it does."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers of a run, and which of them this process is.

    Args:
        addresses: of each worker, "host:port" with a name, an IPv4 address, or an IPv6 address in brackets.
        index: this worker's place in `addresses`, from 0; worker 0 is the chief.

    Raises:
        ClusterError: an address has another form or comes twice, or there is no worker `index`.

    Example:
        cluster = Cluster(("node1:2222", "node2:2222"), index=0)
        os.environ["TF_CONFIG"] = cluster.tf_config()
    """

    addresses: tuple[str, ...]
    index: int

    def __post_init__(self):
        object.__setattr__(self, "addresses", tuple(self.addresses))
        if not self.addresses:
            raise ClusterError("A cluster needs the address of at least one worker. Received: addresses=()")
        for number, address in enumerate(self.addresses):
            _split(address, number)
        lowered = [address.lower() for address in self.addresses]
        for number, address in enumerate(lowered):
            first = lowered.index(address)
            if first != number:
                raise ClusterError(
                    f"Worker {first} and worker {number} have the same address. Give each worker a port of its own. "
                    f"Received: address={self.addresses[number]!r}"
                )
        if isinstance(self.index, bool) or not isinstance(self.index, int) or not 0 <= self.index < self.size:
            raise ClusterError(
                f"The index of a worker must be an integer from 0 to {self.size - 1}, since there are {self.size} "
                f"addresses. Received: index={self.index!r}"
            )

    @property
    def size(self):
        """How many workers there are."""
        return len(self.addresses)

    @property
    def address(self):
        """The address of this worker."""
        return self.addresses[self.index]

    @property
    def is_chief(self):
        """Whether this is worker 0."""
        return self.index == 0

    def tf_config(self):
        """Returns the value of TF_CONFIG that describes this worker to TensorFlow, as JSON."""
        task = {"type": "worker", "index": self.index}
        return json.dumps({"cluster": {"worker": list(self.addresses)}, "task": task})


def find(environment: Mapping[str, str] = os.environ) -> Cluster | None:
    """Finds the workers of this run in the environment.

    In this order: TF_CONFIG, whose "chief" counts as worker 0; the step of Slurm that this process is a task of; an
    Indexed Job of Kubernetes where AIB_TF_WORKERS is set, see deploy/kubernetes.yaml. The shell of `sbatch` or
    `salloc` outside `srun` is no cluster.

    Args:
        environment: the variables to look at.

    Returns:
        The `Cluster`, or None if the environment has none.

    Raises:
        ClusterError: if what is there is damaged.
    """
    if environment.get("TF_CONFIG", "").strip():
        return _from_tf_config(environment["TF_CONFIG"])
    if "SLURM_STEP_NUM_TASKS" in environment:
        return _from_slurm(environment)
    if "AIB_TF_WORKERS" in environment:
        return _from_kubernetes(environment)
    return None


def meet(cluster: Cluster, facts: dict, timeout: float = 300.0) -> None:
    """Waits for all workers of a cluster and checks that they fit together; every one of them calls it.

    To be called before TensorFlow starts its server, which takes the same port. Workers may start in any order, and
    their host names need not resolve yet. The port is free again when this returns or raises.

    Args:
        cluster: the `Cluster`.
        facts: what must be equal on all workers, of what JSON can hold. Dicts in it are compared name by name. For
            "versions" and "devices" the error names the remedy.
        timeout: how long to wait for the other workers, in seconds. Worker 0 counts from its own start; who has reached
            it goes by its clock.

    Raises:
        MissingWorkerError: if a worker did not come within `timeout`.
        ClusterError: if a port is busy, two workers have the same index, or workers differ in addresses or facts. All
            workers raise it, with the same message.

    Example:
        meet(cluster, {"versions": {"tensorflow": tf.__version__}})
    """
    hello = {
        "aib_tf": _PROTOCOL,
        "index": cluster.index,
        "token": secrets.token_hex(8),
        "addresses": list(cluster.addresses),
        "facts": facts,
    }
    hello = json.loads(json.dumps(hello))  # tuples become lists here as they do for the others
    deadline = time.monotonic() + timeout
    try:
        listener = _listen(cluster.address)
    except OSError as error:
        reason = _no_port(cluster, error)
        _tell(cluster, hello | {"error": reason})
        raise ClusterError(reason) from error
    with listener:
        if cluster.is_chief:
            _receive(cluster, hello, listener, deadline, timeout)
        else:
            _report(cluster, hello, listener, deadline, timeout)


# ---- finding


def _from_tf_config(text):
    def damaged(what, remedy):
        raise ClusterError(f"TF_CONFIG {what}. {remedy} Received: TF_CONFIG={_shortened(text, 500)}")

    form = (
        'It looks like {"cluster": {"worker": ["node1:2222", "node2:2222"]}, "task": {"type": "worker", "index": 0}}, '
        "with another index on each worker."
    )
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        damaged(f"is not JSON ({error})", form)
    if not isinstance(config, dict):
        damaged("is not a JSON object", form)
    jobs = config.get("cluster")
    if not isinstance(jobs, dict) or not jobs:
        damaged("has no cluster", form)
    foreign = sorted(set(jobs) - {"chief", "worker"})
    if foreign:
        damaged(f"has the job {', '.join(foreign)}, but all workers of a run train", "Keep only worker and chief.")
    for job, addresses in jobs.items():
        if not isinstance(addresses, list) or not all(isinstance(address, str) for address in addresses):
            damaged(f"has no list of addresses for the job {job}", form)
    chiefs, workers = jobs.get("chief", []), jobs.get("worker", [])
    if len(chiefs) > 1:
        damaged(f"has {len(chiefs)} chiefs", "Make all but one of them workers.")
    if not chiefs and not workers:
        damaged("has no worker", form)
    task = config.get("task")
    if not isinstance(task, dict) or "type" not in task or "index" not in task:
        damaged("does not say which worker this is: its task has no type and index", form)
    job, index = task["type"], task["index"]
    if job not in ("chief", "worker"):
        damaged(f"makes this process a task of type {job!r}", "The type must be worker or chief.")
    if isinstance(index, str) and re.fullmatch(r"[0-9]{1,9}", index):
        index = int(index)
    count = len(jobs.get(job, []))
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
        damaged(
            f"makes this process {job} {index!r}, and the cluster has {count} of this type",
            f"The index must be an integer from 0 to {count - 1}." if count else "Give it the type worker.",
        )
    try:
        return Cluster((*chiefs, *workers), index + (len(chiefs) if job == "worker" else 0))
    except ClusterError as error:
        raise ClusterError(f"TF_CONFIG: {error}") from None


def _alone():
    return Cluster((f"localhost:{_KUBERNETES_PORT}",), 0)  # an address that nobody has to reach


def _from_slurm(environment):
    # Not tf.distribute.cluster_resolver.SlurmClusterResolver: it fails on nodes without nvidia-smi, overwrites
    # CUDA_VISIBLE_DEVICES, and sorts hosts as text (n10 before n9), so that tasks get the addresses of others.
    tasks = _slurm_number(environment, "SLURM_STEP_NUM_TASKS")
    if tasks == 1:
        return _alone()
    rank = _slurm_number(environment, "SLURM_PROCID")
    job = _slurm_number(environment, "SLURM_JOB_ID")
    step = _slurm_number(environment, "SLURM_STEP_ID", "0")
    node_list = environment.get("SLURM_STEP_NODELIST", "")
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    hosts, counts = _expand_hosts(node_list), _expand_counts(per_node)
    if len(hosts) != len(counts) or sum(counts) != tasks or rank >= tasks:
        raise ClusterError(
            "The variables of Slurm do not fit together. Start the workers with srun, inside sbatch or salloc. "
            f"Received: SLURM_STEP_NODELIST={node_list!r}, SLURM_STEP_TASKS_PER_NODE={per_node!r}, "
            f"SLURM_STEP_NUM_TASKS={tasks}, SLURM_PROCID={rank}"
        )
    places = [(node, local) for node, count in enumerate(counts) for local in range(count)]
    # The addresses suppose that tasks fill one node after the other. Slurm says where this task really is.
    node, local = places[rank]
    actual_node = _slurm_number(environment, "SLURM_NODEID", str(node))
    actual_local = _slurm_number(environment, "SLURM_LOCALID", str(local))
    if (actual_node, actual_local) != (node, local):
        raise ClusterError(
            "Slurm has spread the tasks over the nodes in an order that is not block. Start them with "
            f"srun --distribution=block. Received: SLURM_PROCID={rank}, SLURM_NODEID={actual_node}, "
            f"SLURM_LOCALID={actual_local}"
        )
    # Ports that depend on the job, so that two jobs on one node do not meet; nor do two steps of one job.
    first = _SLURM_PORTS + (job + 97 * step) % _SLURM_SLOTS * _SLURM_SLOT
    return Cluster(tuple(f"{hosts[node]}:{first + local}" for node, local in places), rank)


def _slurm_number(environment, name, default=""):
    text = environment.get(name, default)
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ClusterError(
            f"Slurm's variable {name} must be a whole number. Start the workers with srun, inside sbatch or salloc. "
            f"Received: {name}={environment.get(name)!r}"
        )
    return int(text)


def _expand_hosts(text):
    """Expands Slurm's "n[1-2,07],m5" into the names of hosts, in its order."""
    hosts = []
    # Commas part the hosts only outside brackets.
    for part in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text):
        names = [""]
        for plain, ranges in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", part):
            endings = (
                [plain] if plain else [number for each in ranges.split(",") for number in _expand_range(each, text)]
            )
            names = [name + ending for name in names for ending in endings]
        hosts += names
    return hosts


def _expand_range(text, whole):
    match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", text)
    if match is None:
        raise ClusterError(f"Slurm's list of nodes cannot be read. Received: SLURM_STEP_NODELIST={whole!r}")
    first, last = match[1], match[2] or match[1]
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def _expand_counts(text):
    """Expands Slurm's "2(x3),1" into a list of numbers."""
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part)
        if match is None:
            raise ClusterError(f"Slurm's tasks per node cannot be read. Received: SLURM_STEP_TASKS_PER_NODE={text!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _from_kubernetes(environment):
    def number(name, default, minimum, maximum, remedy):
        text = environment.get(name, default)
        if not re.fullmatch(r"[0-9]{1,9}", text) or not minimum <= int(text) <= maximum:
            raise ClusterError(
                f"{name} must be a whole number from {minimum} to {maximum}. {remedy} "
                f"Received: {name}={environment.get(name)!r}"
            )
        return int(text)

    size = number("AIB_TF_WORKERS", "", 1, 10**5, "Set it to the Job's number of completions.")
    if size == 1:
        return _alone()
    indexed = (
        "Kubernetes sets it in a Job with completionMode: Indexed; AIB_TF_WORKERS is the number of its completions."
    )
    index = number("JOB_COMPLETION_INDEX", "", 0, size - 1, indexed)
    port = number("AIB_TF_PORT", str(_KUBERNETES_PORT), 1, 65535, "Leave it out for 2222.")
    name = environment.get("HOSTNAME") or socket.gethostname()
    host = name.split(".")[0]
    job = host.removesuffix(f"-{index}")
    if job == host or not job:
        raise ClusterError(
            f"The host name of this pod must be that of its Job with -{index} behind it. Use no hostNetwork, and let "
            f"the Job name its pods. Received: HOSTNAME={name!r}"
        )
    service = environment.get("AIB_TF_SERVICE") or job
    return Cluster(tuple(f"{job}-{number}.{service}:{port}" for number in range(size)), index)


def _split(address, number):
    """Splits an address into host and port."""
    form = "Write it as host:port, with the brackets around an IPv6 address: [::1]:2222"
    if not isinstance(address, str):
        raise ClusterError(f"The address of worker {number} must be a string. {form}. Received: address={address!r}")
    host, colon, port = address.rpartition(":")
    if not colon or (address.startswith("[") and address.endswith("]")):
        raise ClusterError(f"The address of worker {number} has no port. {form}. Received: address={address!r}")
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise ClusterError(
            f"The port of worker {number} must be a number from 1 to 65535. {form}. Received: address={address!r}"
        )
    match = re.fullmatch(r"\[([0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|([\w.-]+)", host)
    if match is None:
        raise ClusterError(f"The host of worker {number} has no form of a host. {form}. Received: address={address!r}")
    return match[1] or match[2], int(port)


# ---- meeting


def _listen(address):
    """Opens a listening socket on the port of an address, on all interfaces as TensorFlow does."""
    _, port = _split(address, 0)
    end = time.monotonic() + _BIND_SECONDS
    both = socket.has_dualstack_ipv6()
    while True:
        family = socket.AF_INET6 if both else socket.AF_INET
        try:
            # It sets SO_REUSEADDR where connections of the past would keep the port.
            return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=both)
        except OSError as error:
            if both and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                both = False  # IPv6 is there and turned off, as in many containers.
            elif error.errno == errno.EADDRINUSE and time.monotonic() < end:
                time.sleep(0.2)
            else:
                raise


def _no_port(cluster, error):
    _, port = _split(cluster.address, cluster.index)
    if error.errno == errno.EADDRINUSE:
        what = f"its port {port} is in use on its machine ({socket.gethostname()})"
        remedy = (
            f"Stop what listens there (`ss -ltnp sport = :{port}` shows it), such as an earlier run or a second worker "
            f"{cluster.index}, or give the worker another port on all workers"
        )
    else:
        what = f"its port {port} cannot be opened on its machine ({socket.gethostname()}): {error.strerror or error}"
        remedy = "Give the worker another port on all workers, above 1023"
    return f"{_name(cluster, cluster.index)} cannot start: {what}. {remedy}. Received: address={cluster.address!r}"


def _tell(cluster, hello):
    """Tells the others that this worker has no port; returns when they know, or cannot be reached for a while."""
    with contextlib.suppress(MissingWorkerError):
        # Where worker 0 itself has no port, another worker 0 may have it, and then all of them should know.
        seconds = min(3.0, _GRACE_SECONDS) if cluster.is_chief else _GRACE_SECONDS
        _report(cluster, hello, None, time.monotonic() + seconds, seconds)
    if not cluster.is_chief:
        return
    # What is on worker 0's port does not answer, so that the others are waiting for it. They listen, too.
    deadline = time.monotonic() + _GRACE_SECONDS
    untold = set(range(1, cluster.size))
    while untold and time.monotonic() < deadline:
        for index in sorted(untold):
            with contextlib.suppress(OSError), _connect(cluster, index, deadline) as connected:
                connected.sendall(_line({"aib_tf": _PROTOCOL, "status": "stop", "reason": hello["error"]}))
                untold.discard(index)
        time.sleep(0.2)


def _receive(cluster, hello, listener, deadline, timeout):
    """Worker 0: waits for the others, compares, and answers all of them."""
    here = {}  # index -> (connection, token)
    facts = {0: _facts(hello)}  # index -> what must be equal
    refused = {}  # connection of a worker that cannot take part -> its index
    left = set()
    trouble = []
    end = deadline
    notices = _Notices()
    with _Room(listener) as room:
        while True:
            missing = [index for index in range(1, cluster.size) if index not in {*here, *refused.values()}]
            reason = " ".join(trouble) or _differences(cluster, facts)
            end = min(end, time.monotonic() + _GRACE_SECONDS) if reason else deadline
            if not missing or time.monotonic() >= end:
                break
            notices.waiting(cluster, missing)
            for connection, message in room.events(end):
                if message is None:
                    for index in [index for index, (other, _) in here.items() if other is connection]:
                        del here[index], facts[index]
                        left.add(index)
                        _LOG.warning("%s has left; waiting for it to come back.", _name(cluster, index))
                elif not _is_hello(message) or _is_other_chief(cluster, message):
                    room.drop(connection)
                else:
                    seconds = max(deadline - time.monotonic(), 0.0)
                    room.say(connection, {"aib_tf": _PROTOCOL, "status": "waiting", "seconds": seconds})
                    problem = _problem(cluster, message, here)
                    if problem is None:
                        here[message["index"]] = connection, message["token"]
                        facts[message["index"]] = _facts(message)
                        left.discard(message["index"])
                    else:
                        trouble.append(problem)
                        refused[connection] = message["index"]
        late = not reason and bool(missing)
        if late:
            reason = _missing(cluster, missing, left, timeout)
        # Closed before anybody starts TensorFlow: its first call must not end in this queue.
        room.close_listener()
        verdict = {"status": "stop", "reason": reason, "missing": late} if reason else {"status": "go"}
        for connection in [*(connection for connection, _ in here.values()), *refused]:
            room.say(connection, {"aib_tf": _PROTOCOL, **verdict})
    if reason:
        raise (MissingWorkerError if late else ClusterError)(reason)


def _report(cluster, hello, listener, deadline, timeout):
    """Any other worker: goes to worker 0 and waits for its answer."""
    chief, known = None, False
    retry = time.monotonic()
    obstacle = "nothing answers"
    notices = _Notices()
    with _Room(listener) as room:
        while time.monotonic() < deadline:
            if chief is None and time.monotonic() >= retry:
                try:
                    chief = room.add(_connect(cluster, 0, deadline))
                    room.say(chief, hello)
                except OSError as error:
                    obstacle = error.strerror or str(error)
                retry = time.monotonic() + _RETRY_SECONDS
            if not known:
                notices.waiting(cluster, [0])
            for connection, message in room.events(deadline if chief is not None else min(deadline, retry)):
                if connection is not chief:
                    if message is not None:
                        _answer_other(cluster, room, connection, message, known)
                elif message is None:
                    if not known and connection.heard:
                        obstacle = "what listens there is no worker of aib_tf"
                        notices.once("What listens on the port of %s is no worker; trying again.", _name(cluster, 0))
                    elif known:
                        obstacle = "it has left"
                        _LOG.warning("%s has left; waiting for it to come back.", _name(cluster, 0))
                    chief, known = None, False
                    retry = time.monotonic() + _RETRY_SECONDS
                elif message.get("status") == "waiting":
                    known, obstacle = True, "it does not answer any more"
                    seconds = message.get("seconds")
                    if isinstance(seconds, int | float):
                        deadline = max(deadline, time.monotonic() + min(seconds, 10**6) + 2 * _GRACE_SECONDS)
                elif message.get("status") == "go":
                    return
                elif message.get("status") == "stop":
                    _stop(message)
    raise MissingWorkerError(
        f"{_name(cluster, 0)} did not come within {timeout:g} s ({obstacle}): start it, or look at its log."
    )


def _answer_other(cluster, room, connection, message, known):
    """Answers who connects to a worker that is not worker 0."""
    if _is_hello(message):
        reason = (
            f"The address of worker 0 ({message['addresses'][0]}) has led worker {message['index']} to "
            f"worker {cluster.index}. Start each worker on the machine that its address names."
        )
        room.say(connection, {"aib_tf": _PROTOCOL, "status": "stop", "reason": reason})
        # A worker of another run that strays here is no trouble of ours.
        if message["addresses"] == list(cluster.addresses):
            raise ClusterError(reason)
    elif message.get("aib_tf") == _PROTOCOL and message.get("status") == "stop" and not known:
        _stop(message)
    room.drop(connection)


def _stop(message):
    reason = message.get("reason")
    raise (MissingWorkerError if message.get("missing") is True else ClusterError)(
        reason if isinstance(reason, str) else "Worker 0 has stopped the run: look at its log."
    )


def _is_hello(message):
    index, addresses = message.get("index"), message.get("addresses")
    return (
        isinstance(message.get("aib_tf"), int)
        and isinstance(index, int)
        and not isinstance(index, bool)
        and index >= 0
        and isinstance(addresses, list)
        and len(addresses) > 0
        and all(isinstance(address, str) for address in addresses)
        and isinstance(message.get("facts"), dict)
        and isinstance(message.get("token"), str)
    )


def _is_other_chief(cluster, message):
    """Whether the chief of another run found its port taken by ours, which is no trouble of ours."""
    return message["index"] == 0 and "error" in message and message["addresses"] != list(cluster.addresses)


def _problem(cluster, message, here):
    """Why a worker cannot take part, or None."""
    index = message["index"]
    if isinstance(message.get("error"), str):
        return message["error"]
    if message["aib_tf"] != _PROTOCOL:
        return f"Worker {index} has another release of aib_tf than worker 0. Install the same release everywhere."
    if index >= cluster.size:
        return (
            f"Workers differ: worker 0 has {cluster.size} addresses, and there is a worker {index}, which has "
            f"{len(message['addresses'])}. {_REMEDIES['addresses']}"
        )
    if index == 0 or (index in here and here[index][1] != message["token"]):
        return f"There are two workers {index}, both for {cluster.addresses[index]}. Give each worker another index."
    return None


def _facts(hello):
    """What must be equal on all workers: path of names -> value as JSON, where even NaN is equal to itself."""
    return _flattened({"addresses": hello["addresses"], **hello["facts"]})


def _differences(cluster, facts):
    """What is not equal on the workers that are here, as a sentence; empty if all is."""
    if all(each == facts[0] for each in facts.values()):
        return ""
    names = list(dict.fromkeys(name for each in facts.values() for name in each))
    sentences, groups = [], []
    for name in names:
        holders = {}
        for index in sorted(facts):
            holders.setdefault(facts[index].get(name, "missing"), []).append(index)
        if len(holders) > 1:
            values = (_value(value, cluster, indices) for value, indices in holders.items())
            group, *rest = name
            shown = ".".join(rest) if group in _REMEDIES and rest else ".".join(name)
            sentences.append(f"{shown} is {', '.join(values)}")
            groups.append(group)
    more = len(sentences) - _MAX_DIFFERENCES
    listed = "; ".join(sentences[:_MAX_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
    remedies = dict.fromkeys(_REMEDIES.get(group, "They must be equal on all workers.") for group in groups)
    return f"Workers differ: {listed}. {' '.join(remedies)}"


def _value(text, cluster, indices):
    plain = _shortened(text.strip('"'), 120)
    return f"{plain} on {_names(cluster, indices)}"


def _flattened(value, name=()):
    if isinstance(value, dict) and value:
        return {key: text for each in value for key, text in _flattened(value[each], (*name, each)).items()}
    return {name: json.dumps(value, ensure_ascii=False)}


def _missing(cluster, missing, left, timeout):
    parts = []
    if gone := [index for index in missing if index in left]:
        parts.append(f"{_names(cluster, gone)} came, left, and did not come back within {timeout:g} s: look at its log")
    if absent := [index for index in missing if index not in left]:
        parts.append(f"{_names(cluster, absent)} did not come within {timeout:g} s: start it, or look at its log")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _name(cluster, index):
    return f"Worker {index} ({cluster.addresses[index]})"


def _names(cluster, indices, most=3):
    names = [f"worker {index} ({cluster.addresses[index]})" for index in indices[:most]]
    if len(indices) > most:
        names.append(f"{len(indices) - most} more")
    return " and ".join(names)


def _shortened(text, length):
    return text if len(text) <= length else f"{text[:length]}..."


def _line(message):
    return json.dumps(message).encode() + b"\n"


def _connect(cluster, index, deadline):
    host, port = _split(cluster.addresses[index], index)
    connected = socket.create_connection((host, port), timeout=min(5.0, max(deadline - time.monotonic(), 0.1)))
    # A connection to a free local port can get that same port at its own end, and reach itself.
    if connected.getsockname() == connected.getpeername():
        connected.close()
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    return connected


class _Notices:
    """Tells once a minute, from the fifth second on, who is being waited for."""

    def __init__(self):
        self._next = time.monotonic() + 5.0
        self._told = False

    def waiting(self, cluster, indices):
        if time.monotonic() >= self._next:
            _LOG.info("Waiting for %s.", _names(cluster, indices))
            self._next = time.monotonic() + 60.0

    def once(self, message, *arguments):
        if not self._told:
            _LOG.warning(message, *arguments)
            self._told = True


class _Connection:
    """A socket on which JSON objects come, one on each line."""

    def __init__(self, connected):
        connected.setblocking(False)
        self.socket = connected
        self.since = time.monotonic()
        self.heard = False  # anything at all
        self.understood = False  # a whole line
        self._received = b""

    def receive(self):
        """Returns the messages that are whole; ConnectionError if it was closed or says what is no message."""
        try:
            data = self.socket.recv(65536)
        except (BlockingIOError, InterruptedError):
            return []
        if not data:
            raise ConnectionError("closed")
        self.heard = True
        *lines, self._received = (self._received + data).split(b"\n")
        begun = [*lines, *([self._received] if self._received else [])]
        if any(not line.startswith(b"{") or len(line) > _MAX_LINE for line in begun):
            raise ConnectionError("no message")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            raise ConnectionError("no message") from None
        self.understood = self.understood or bool(messages)
        return messages


class _Room:
    """The open sockets of a meeting; leaving it closes them all."""

    def __init__(self, listener):
        self._selector = selectors.DefaultSelector()
        self._listener = listener
        self._connections = []
        if listener is not None:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for connection in list(self._connections):
            self.drop(connection)
        self.close_listener()
        self._selector.close()

    def close_listener(self):
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def add(self, connected):
        connection = _Connection(connected)
        self._connections.append(connection)
        self._selector.register(connected, selectors.EVENT_READ, connection)
        return connection

    def drop(self, connection):
        if connection in self._connections:
            self._connections.remove(connection)
            self._selector.unregister(connection.socket)
            connection.socket.close()

    def say(self, connection, message):
        """Sends a message; who does not take it leaves, as `events` then tells."""
        connection.socket.settimeout(5.0)
        with contextlib.suppress(OSError):
            connection.socket.sendall(_line(message))
        connection.socket.setblocking(False)

    def events(self, until):
        """Waits until a time for something to happen, a second at most.

        Yields:
            (connection, message), or (connection, None) of those that left. These come first: a worker that is started
            again may be there before its predecessor is seen to be gone. Of who is dropped meanwhile comes no more.
        """
        gone, said = [], []
        for key, _ in self._selector.select(min(max(until - time.monotonic(), 0.0), 1.0)):
            if key.data is None:
                with contextlib.suppress(OSError):
                    self.add(self._listener.accept()[0])
                continue
            try:
                said += [(key.data, message) for message in key.data.receive()]
            except OSError:
                gone.append(key.data)
        strangers = [connection for connection in self._connections if not connection.understood]
        before = time.monotonic() - _SILENT_SECONDS
        gone += [each for each in strangers if each.since < before and each not in gone]
        gone += [each for each in strangers[: max(len(strangers) - _MAX_STRANGERS, 0)] if each not in gone]
        for connection in gone:
            self.drop(connection)
        yield from ((connection, None) for connection in gone)
        yield from ((connection, message) for connection, message in said if connection in self._connections)
