"""Workers are found in the environment, and meet on real sockets before TensorFlow starts."""

import contextlib
import errno
import json
import logging
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import tensorflow as tf

from aib_tf.training import cluster as module
from aib_tf.training.cluster import Cluster, ClusterError, MissingWorkerError, find, meet

TWO = ["node1:2222", "node2:2222"]
LONG = 120.0  # seconds; only a hang reaches them


def tf_config(jobs, kind="worker", index=0):
    return {"TF_CONFIG": json.dumps({"cluster": jobs, "task": {"type": kind, "index": index}})}


# ---- finding


@pytest.mark.parametrize(
    ("environment", "addresses", "index"),
    [
        (tf_config({"worker": TWO}), TWO, 0),
        (tf_config({"worker": TWO}, index=1), TWO, 1),
        (tf_config({"worker": TWO}, index="1"), TWO, 1),
        (tf_config({"chief": TWO[:1], "worker": TWO[1:]}, kind="chief"), TWO, 0),
        (tf_config({"chief": TWO[:1], "worker": TWO[1:]}), TWO, 1),
        (tf_config({"chief": TWO[:1]}, kind="chief"), TWO[:1], 0),
        (tf_config({"worker": ["[::1]:2222", "[fe80::1%eth0]:1"]}), ["[::1]:2222", "[fe80::1%eth0]:1"], 0),
    ],
)
def test_tf_config_names_the_workers_and_its_chief_is_worker_0(environment, addresses, index):
    assert find(environment) == Cluster(tuple(addresses), index)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "TF_CONFIG is not JSON"),
        ("[" * 100_000, "TF_CONFIG is not JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "has no cluster"),
        ('{"cluster": []}', "has no cluster"),
        ('{"cluster": {"worker": []}}', "has no worker"),
        ('{"cluster": {"worker": "node1:2222"}}', "no list of addresses for the job worker"),
        ('{"cluster": {"worker": {"0": "node1:2222"}}}', "no list of addresses for the job worker"),
        ('{"cluster": {"worker": [2222]}}', "no list of addresses for the job worker"),
        ('{"cluster": {"worker": ["a:1"], "ps": ["b:1"]}}', "has the job ps"),
        ('{"cluster": {"worker": ["a:1"], "evaluator": ["b:1"]}}', "has the job evaluator"),
        ('{"cluster": {"chief": ["a:1", "b:1"]}}', "has 2 chiefs"),
        ('{"cluster": {"worker": ["a:1"]}}', "does not say which worker this is"),
        ('{"cluster": {"worker": ["a:1"]}, "task": {"index": 0}}', "does not say which worker this is"),
        (tf_config({"worker": ["a:1"]}, kind="evaluator")["TF_CONFIG"], "a task of type 'evaluator'"),
        (tf_config({"worker": ["a:1"]}, kind="chief")["TF_CONFIG"], "the cluster has 0 of this type"),
        (tf_config({"worker": ["a:1"]}, index=1)["TF_CONFIG"], "from 0 to 0"),
        (tf_config({"worker": ["a:1"]}, index=-1)["TF_CONFIG"], "from 0 to 0"),
        (tf_config({"worker": ["a:1"]}, index=True)["TF_CONFIG"], "from 0 to 0"),
        (tf_config({"worker": ["a:1"]}, index=None)["TF_CONFIG"], "from 0 to 0"),
        (tf_config({"worker": ["a"]})["TF_CONFIG"], "The address of worker 0 has no port"),
        (tf_config({"worker": ["[::1]"]})["TF_CONFIG"], "The address of worker 0 has no port"),
        (tf_config({"worker": ["a:1", "b:"]})["TF_CONFIG"], "The port of worker 1 must be a number from 1 to 65535"),
        (tf_config({"worker": ["a:0"]})["TF_CONFIG"], "The port of worker 0 must be a number"),
        (tf_config({"worker": ["a:65536"]})["TF_CONFIG"], "The port of worker 0 must be a number"),
        (tf_config({"worker": ["a:http"]})["TF_CONFIG"], "The port of worker 0 must be a number"),
        (tf_config({"worker": ["::1:2222"]})["TF_CONFIG"], "The host of worker 0"),
        (tf_config({"worker": ["grpc://a:2222"]})["TF_CONFIG"], "The host of worker 0"),
        (tf_config({"worker": [":2222"]})["TF_CONFIG"], "The host of worker 0"),
        (tf_config({"worker": ["a:1", "A:1"]})["TF_CONFIG"], "Worker 0 and worker 1 have the same address"),
    ],
)
def test_each_damage_of_tf_config_is_named_with_what_was_received(text, message):
    with pytest.raises(ClusterError) as caught:
        find({"TF_CONFIG": text})
    assert message in str(caught.value) and "TF_CONFIG" in str(caught.value)
    assert " Received: " in str(caught.value)


def test_a_cluster_needs_a_worker():
    with pytest.raises(ClusterError, match="at least one worker"):
        Cluster((), 0)


def test_tensorflow_reads_the_tf_config_of_a_cluster(monkeypatch):
    cluster = find(tf_config({"chief": TWO[:1], "worker": TWO[1:]}))
    assert (cluster.size, cluster.address, cluster.is_chief) == (2, "node2:2222", False)
    monkeypatch.setenv("TF_CONFIG", cluster.tf_config())
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    assert resolver.cluster_spec().as_dict() == {"worker": TWO}
    assert (resolver.task_type, resolver.task_id) == ("worker", 1)


def slurm(nodes="n[1-2]", per_node="1(x2)", tasks=2, rank=0, **others):
    return {
        "SLURM_JOB_ID": "1000",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_TASKS_PER_NODE": per_node,
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_PROCID": str(rank),
        **others,
    }


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("n[1-2]", ["n1", "n2"]),
        ("n[9-10]", ["n9", "n10"]),  # the order of Slurm, not of the alphabet
        ("n[08-10,12]", ["n08", "n09", "n10", "n12"]),
        ("b,a", ["b", "a"]),
        ("login,gpu-[1,3].cluster", ["login", "gpu-1.cluster", "gpu-3.cluster"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
    ],
)
def test_slurm_nodes_are_read_in_the_order_of_slurm(nodes, hosts):
    found = find(slurm(nodes, f"1(x{len(hosts)})", len(hosts), rank=1))
    assert [address.rpartition(":")[0] for address in found.addresses] == hosts
    assert found.index == 1


def test_slurm_tasks_of_one_node_get_ports_of_their_own():
    environment = slurm("n[1-3]", "2,1(x2)", 4, 2, SLURM_NODEID="1", SLURM_LOCALID="0", CUDA_VISIBLE_DEVICES="3")
    before = dict(environment)
    found = find(environment)
    hosts, ports = zip(*(address.split(":") for address in found.addresses), strict=True)
    assert hosts == ("n1", "n1", "n2", "n3")
    assert int(ports[1]) == int(ports[0]) + 1
    assert (ports[2], ports[3]) == (ports[0], ports[0])
    assert environment == before


def test_slurm_jobs_and_steps_that_run_at_a_time_have_other_ports():
    def first_port(job, step):
        found = find(slurm(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step)))
        return int(found.addresses[0].split(":")[1])

    jobs = {first_port(job, 0) for job in range(10**6, 10**6 + 300)}
    assert len(jobs) == 300
    assert min(jobs) >= 10_000 and max(jobs) + 64 < 32_768  # below what Linux gives to outgoing connections
    assert min(abs(a - b) for a in jobs for b in jobs if a != b) == 64
    assert first_port(1000, 0) != first_port(1000, 1) != first_port(1001, 0)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"TF_CONFIG": " "},
        # The shell of sbatch: a job, but no step.
        {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-2]"},
        {"JOB_COMPLETION_INDEX": "3", "HOSTNAME": "sweep-3"},
    ],
)
def test_one_process_alone_is_no_cluster(environment):
    assert find(environment) is None


@pytest.mark.parametrize(
    "environment",
    [slurm("n1", "1", 1), {"AIB_TF_WORKERS": "1", "JOB_COMPLETION_INDEX": "0", "HOSTNAME": "digits-0"}],
)
def test_a_step_or_a_job_of_one_task_is_a_cluster_of_one(environment):
    assert (find(environment).size, find(environment).index) == (1, 0)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (slurm(tasks="two"), "SLURM_STEP_NUM_TASKS must be a whole number"),
        (slurm(rank=""), "SLURM_PROCID must be a whole number"),
        (slurm(SLURM_JOB_ID=""), "SLURM_JOB_ID must be a whole number"),
        (slurm(nodes=""), "do not fit together"),
        (slurm(nodes="n[1-3]"), "do not fit together"),
        (slurm(rank=2), "do not fit together"),
        (slurm(nodes="n[a-b]"), "list of nodes cannot be read"),
        (slurm(per_node="2(y3)"), "tasks per node cannot be read"),
        (slurm("n[1-2]", "2(x2)", 4, 1, SLURM_NODEID="1", SLURM_LOCALID="0"), "srun --distribution=block"),
    ],
)
def test_what_slurm_says_and_cannot_be_is_named(environment, message):
    with pytest.raises(ClusterError, match=message) as caught:
        find(environment)
    assert " Received: SLURM_" in str(caught.value)


@pytest.mark.parametrize(
    ("more", "addresses"),
    [
        ({}, ["digits-0.digits:2222", "digits-1.digits:2222"]),
        (
            {"HOSTNAME": "digits-1.workers.default.svc.cluster.local", "AIB_TF_SERVICE": "workers"},
            ["digits-0.workers:2222", "digits-1.workers:2222"],
        ),
        ({"AIB_TF_PORT": "4000"}, ["digits-0.digits:4000", "digits-1.digits:4000"]),
    ],
)
def test_an_indexed_job_of_kubernetes_names_its_pods(more, addresses):
    environment = {"AIB_TF_WORKERS": "2", "JOB_COMPLETION_INDEX": "1", "HOSTNAME": "digits-1", **more}
    assert find(environment) == Cluster(tuple(addresses), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"AIB_TF_WORKERS": "many"}, "AIB_TF_WORKERS must be a whole number"),
        ({"JOB_COMPLETION_INDEX": ""}, "completionMode: Indexed"),
        ({"JOB_COMPLETION_INDEX": "2"}, "JOB_COMPLETION_INDEX must be a whole number from 0 to 1"),
        ({"HOSTNAME": "node7.example.com"}, "Use no hostNetwork"),
        ({"AIB_TF_PORT": "0"}, "AIB_TF_PORT must be a whole number"),
    ],
)
def test_what_kubernetes_says_and_cannot_be_is_named(change, message):
    environment = {"AIB_TF_WORKERS": "2", "JOB_COMPLETION_INDEX": "1", "HOSTNAME": "digits-1"}
    with pytest.raises(ClusterError, match=message) as caught:
        find(environment | change)
    assert " Received: " in str(caught.value)


def test_tf_config_comes_before_slurm_and_slurm_before_kubernetes():
    kubernetes = {"AIB_TF_WORKERS": "2", "JOB_COMPLETION_INDEX": "1", "HOSTNAME": "digits-1"}
    assert find(kubernetes | slurm()).addresses[0].startswith("n1:")
    assert find(kubernetes | slurm() | tf_config({"worker": TWO})).addresses == tuple(TWO)


# ---- meeting


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(module, "_BIND_SECONDS", 0.2)
    monkeypatch.setattr(module, "_RETRY_SECONDS", 0.05)


@pytest.fixture
def short_grace(monkeypatch):
    """For meetings that somebody stays away from although there is trouble to hear of."""
    monkeypatch.setattr(module, "_GRACE_SECONDS", 1.5)


@pytest.fixture
def addresses():
    """Makes addresses on this machine whose ports are free, and not among those of outgoing connections."""

    def make(count, host="127.0.0.1"):
        ports = []
        while len(ports) < count:
            port = random.randrange(20_000, 32_000)
            with contextlib.suppress(OSError), socket.create_server(("", port)):
                ports.append(port)
        return tuple(f"{host}:{port}" for port in dict.fromkeys(ports)) if len(set(ports)) == count else make(count)

    return make


def outcomes(*workers, timeout=LONG, delays=None):
    """Lets workers, (cluster, facts) each, meet in threads; None or the error of each."""

    def worker(cluster, facts, delay):
        time.sleep(delay)
        try:
            meet(cluster, facts, timeout)
        except ClusterError as error:
            return error
        return None

    with ThreadPoolExecutor(len(workers)) as pool:
        futures = [
            pool.submit(worker, *each, delay)
            for each, delay in zip(workers, delays or [0.0] * len(workers), strict=True)
        ]
        return [future.result(timeout=LONG) for future in futures]


def one_text(errors, kind=ClusterError):
    """The message of errors that must all be of one kind and say the same."""
    assert [type(error) for error in errors] == [kind] * len(errors), errors
    (text,) = {str(error) for error in errors}
    return text


def port_of(address):
    return int(address.rpartition(":")[2])


def listening(address):
    return socket.create_server(("127.0.0.1", port_of(address)))


def connected(address):
    """A connection to a worker as soon as it listens."""
    end = time.monotonic() + LONG
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port_of(address)), timeout=LONG)
        except ConnectionRefusedError:
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.mark.parametrize(
    "delays", [[0, 0, 0], [0.6, 0, 0.3], [0, 0.6, 0.3]], ids=["together", "chief last", "chief first"]
)
def test_workers_meet_in_any_order_and_leave_their_ports_free(delays, addresses):
    names = addresses(3)
    facts = {"versions": {"tensorflow": "2.21.0"}, "config": {"image_size": (32, 32), "beta": float("nan")}}
    assert outcomes(*((Cluster(names, index), facts) for index in range(3)), delays=delays) == [None] * 3
    for name in names:
        with listening(name):
            pass


def test_a_cluster_of_one_meets_at_once(addresses):
    assert outcomes((Cluster(addresses(1), 0), {})) == [None]


def test_ipv6_addresses_meet_where_the_machine_has_them(addresses):
    hosts = ["127.0.0.1"]
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        hosts.append("[::1]")
    for host in hosts:
        names = addresses(2, host)
        assert outcomes((Cluster(names, 0), {}), (Cluster(names, 1), {})) == [None, None]


def test_workers_meet_where_ipv6_is_turned_off(addresses, monkeypatch):
    names = addresses(2)
    create_server = socket.create_server

    def without_ipv6(address, *, family=socket.AF_INET, **options):
        if family == socket.AF_INET6:
            raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
        return create_server(address, family=family, **options)

    monkeypatch.setattr(socket, "create_server", without_ipv6)
    assert outcomes((Cluster(names, 0), {}), (Cluster(names, 1), {})) == [None, None]


def test_a_host_name_may_resolve_later(addresses, monkeypatch):
    names = tuple(f"digits-{index}.workers:{port_of(name)}" for index, name in enumerate(addresses(2)))
    resolve, failures = socket.getaddrinfo, iter(range(2))

    def getaddrinfo(host, *arguments, **options):
        if host == "digits-0.workers":
            if next(failures, None) is not None:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            host = "127.0.0.1"
        return resolve(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert outcomes((Cluster(names, 0), {}), (Cluster(names, 1), {})) == [None, None]
    assert next(failures, None) is None


def test_workers_with_other_versions_are_all_told_which_and_what_to_do(addresses):
    a, b, c = names = addresses(3)
    versions = ["2.21.0", "2.18.1", "2.21.0"]
    text = one_text(
        outcomes(*((Cluster(names, i), {"versions": {"tensorflow": versions[i], "keras": "3"}}) for i in range(3)))
    )
    assert text == (
        f"Workers differ: tensorflow is 2.21.0 on worker 0 ({a}) and worker 2 ({c}), 2.18.1 on worker 1 ({b}). "
        "Install the same versions everywhere."
    )


def test_workers_with_other_settings_are_told_each_of_them(addresses):
    names = addresses(2)
    first = {"config": {"data": {"batch_size": 64}, "epochs": 3, "tags": "7"}, "note": 1}
    second = {"config": {"data": {"batch_size": 32}, "epochs": 3, "tags": 7}}
    text = one_text(outcomes((Cluster(names, 0), first), (Cluster(names, 1), second)))
    for part in (
        "data.batch_size is 64 on worker 0",
        "32 on worker 1",
        "tags is 7",
        "note is 1",
        "missing on worker 1",
    ):
        assert part in text
    assert "epochs" not in text
    assert text.endswith("They must be equal on all workers.")


def test_workers_with_other_lists_of_addresses_are_told(addresses, short_grace):
    a, b, c = addresses(3)
    text = one_text(outcomes((Cluster((a, b), 0), {}), (Cluster((a, b, c), 1), {})))
    assert text.startswith("Workers differ: addresses is [") and c in text
    assert text.endswith("Give every worker the same list of addresses.")
    text = one_text(outcomes((Cluster((a, b), 0), {}), (Cluster((a, b, c), 2), {})))
    assert "worker 0 has 2 addresses, and there is a worker 2, which has 3" in text


def test_two_workers_with_one_index_are_all_told(addresses, short_grace):
    a, b, c, d = addresses(4)
    workers = [(Cluster((a, b, c), 0), {}), (Cluster((a, b, c), 1), {}), (Cluster((a, d, c), 1), {})]
    text = one_text(outcomes(*workers))
    assert text == f"There are two workers 1, both for {b}. Give each worker another index."


@pytest.mark.parametrize("index", [0, 1])
def test_of_a_busy_port_all_workers_are_told(index, addresses):
    names = addresses(3)
    with listening(names[index]):
        text = one_text(outcomes(*((Cluster(names, each), {}) for each in range(3))))
    port = port_of(names[index])
    assert f"Worker {index} ({names[index]}) cannot start: its port {port} is in use" in text
    assert "Stop what listens there" in text and text.endswith(f"Received: address={names[index]!r}")


def test_a_second_worker_0_on_the_same_machine_is_told_and_so_are_all(addresses, short_grace):
    names = addresses(2)
    text = one_text(outcomes((Cluster(names, 0), {}), (Cluster(names, 0), {}), delays=[0, 0.5]))
    assert "cannot start" in text and "a second worker 0" in text


def test_the_chief_of_another_run_on_our_port_does_not_disturb_us(addresses, short_grace):
    a, b, c = addresses(3)
    with ThreadPoolExecutor(1) as pool:
        chief = pool.submit(outcomes, (Cluster((a, b), 0), {}))
        connected(a).close()
        (other,) = outcomes((Cluster((a, c), 0), {}))
        assert outcomes((Cluster((a, b), 1), {})) == [None]
        assert chief.result(LONG) == [None]
    assert "is in use" in str(other)


def test_a_port_that_is_not_allowed_is_named(monkeypatch, short_grace):
    def create_server(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket, "create_server", create_server)
    with pytest.raises(ClusterError, match=r"cannot be opened on its machine .*: Permission denied. Give"):
        meet(Cluster(("127.0.0.1:80",), 0), {})


def test_a_worker_that_does_not_come_is_named_to_all(addresses):
    names = addresses(4)
    text = one_text(outcomes((Cluster(names, 0), {}), (Cluster(names, 1), {}), timeout=4.0), MissingWorkerError)
    assert text == (
        f"Worker 2 ({names[2]}) and worker 3 ({names[3]}) did not come within 4 s: start it, or look at its log."
    )


def test_a_worker_without_a_chief_names_it(addresses):
    names = addresses(2)
    text = one_text(outcomes((Cluster(names, 1), {}), timeout=1.0), MissingWorkerError)
    assert text == (
        f"Worker 0 ({names[0]}) did not come within 1 s (Connection refused): start it, or look at its log."
    )


def test_strangers_on_the_port_are_dropped_and_do_no_harm(addresses, monkeypatch):
    monkeypatch.setattr(module, "_SILENT_SECONDS", 1.0)
    names = addresses(2)
    hello = {"aib_tf": 1, "index": 1, "token": "", "addresses": list(names), "facts": {}}
    wrong = [hello | change for change in ({"index": "1"}, {"index": True}, {"facts": []}, {"addresses": 3})]
    nonsense = [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\xff\n",
        b'{"aib_tf": 1\n',
        b"[1]\n",
        b"{" * 200_000 + b"\n",
        b'{"' + b"a" * (module._MAX_LINE + 1),
        b"\n\n",
        b"{}\n",
        b"{}\n" + json.dumps(hello).encode() + b"\n",
        *(json.dumps(each).encode() + b"\n" for each in wrong),
    ]
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        chief = pool.submit(outcomes, (Cluster(names, 0), {}))
        strangers = []
        for data in [*nonsense, b"", b'{"half"']:
            stranger = stack.enter_context(connected(names[0]))
            with contextlib.suppress(ConnectionError):  # dropped while it still talks
                stranger.sendall(data)
            strangers.append(stranger)
        for stranger in strangers:
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1000) == b""
        assert not chief.done()
        assert outcomes((Cluster(names, 1), {})) == [None]
        assert chief.result(LONG) == [None]


def test_more_silent_strangers_than_there_is_room_for_make_way(addresses, monkeypatch):
    monkeypatch.setattr(module, "_MAX_STRANGERS", 4)
    monkeypatch.setattr(module, "_SILENT_SECONDS", 10 * LONG)
    names = addresses(2)
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        chief = pool.submit(outcomes, (Cluster(names, 0), {}))
        strangers = [stack.enter_context(connected(names[0])) for _ in range(8)]
        assert [stranger.recv(1) for stranger in strangers[:4]] == [b""] * 4
        assert outcomes((Cluster(names, 1), {})) == [None]
        assert chief.result(LONG) == [None]


def test_what_is_no_worker_on_the_chiefs_port_is_waited_out(addresses, caplog):
    names = addresses(2)
    with caplog.at_level(logging.INFO, "aib_tf"), ThreadPoolExecutor(1) as pool:
        with listening(names[0]) as earlier:  # the server of an earlier run
            worker = pool.submit(outcomes, (Cluster(names, 1), {}))
            visitor, _ = earlier.accept()
            with visitor:
                visitor.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        assert outcomes((Cluster(names, 0), {})) == [None]
        assert worker.result(LONG) == [None]
    assert f"What listens on the port of Worker 0 ({names[0]}) is no worker" in caplog.text


def test_what_stays_on_the_chiefs_port_is_named_at_the_end(addresses):
    names = addresses(2)
    with listening(names[0]) as other, ThreadPoolExecutor(1) as pool:
        worker = pool.submit(outcomes, (Cluster(names, 1), {}), timeout=3.0)
        while not worker.done():
            other.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                visitor, _ = other.accept()
                with visitor:
                    visitor.sendall(b"\0\0\0")
        (error,) = worker.result()
    assert "what listens there is no worker of aib_tf" in one_text([error], MissingWorkerError)


@pytest.mark.parametrize("ours", [True, False], ids=["of our run", "of another run"])
def test_who_looks_for_worker_0_at_another_worker_is_told(ours, addresses):
    names = addresses(3)
    theirs = names if ours else (names[1], names[2])
    hello = {"aib_tf": 1, "index": 2, "token": "t", "addresses": list(theirs), "facts": {}}
    with ThreadPoolExecutor(1) as pool:
        worker = pool.submit(outcomes, (Cluster(names, 1), {}), timeout=LONG if ours else 2.0)
        with connected(names[1]) as astray:
            astray.sendall(json.dumps(hello).encode() + b"\n")
            answer = read_line(astray)
        text = one_text(worker.result(LONG), ClusterError if ours else MissingWorkerError)
    assert answer["status"] == "stop"
    assert f"The address of worker 0 ({theirs[0]}) has led worker 2 to worker 1. Start each" in answer["reason"]
    assert (text == answer["reason"]) == ours


# A worker in a process of its own. TensorFlow is not imported: that nothing here needs it is part of the test.
WORKER = """
import importlib.util, logging, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without it
logging.basicConfig(level=logging.INFO)
specification = importlib.util.spec_from_file_location("cluster", sys.argv[1])
cluster = importlib.util.module_from_spec(specification)
sys.modules["cluster"] = cluster
specification.loader.exec_module(cluster)
assert "tensorflow" not in sys.modules
print("ready", flush=True)
cluster.meet(cluster.Cluster(tuple(sys.argv[3:]), int(sys.argv[2])), {}, 100.0)
"""


@contextlib.contextmanager
def process(names, index):
    command = [sys.executable, "-c", WORKER, module.__file__, str(index), *names]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert started.stdout.readline() == "ready\n"
        yield started
    finally:
        started.kill()
        started.communicate()


def wait_for(condition):
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_a_worker_that_dies_while_waiting_may_come_back(number, addresses, caplog, monkeypatch):
    names = addresses(3)
    come = threading.Event()
    original = module._problem
    monkeypatch.setattr(module, "_problem", lambda *arguments: (come.set(), original(*arguments))[1])
    with caplog.at_level(logging.INFO, "aib_tf"), ThreadPoolExecutor(1) as pool:
        chief = pool.submit(outcomes, (Cluster(names, 0), {}))
        with process(names, 1) as worker:
            assert come.wait(LONG)
            worker.send_signal(number)
            _, errors = worker.communicate(timeout=LONG)
            assert worker.returncode == -number
            assert "KeyboardInterrupt" in errors or number == signal.SIGKILL
        wait_for(lambda: f"Worker 1 ({names[1]}) has left; waiting for it to come back." in caplog.text)
        assert outcomes((Cluster(names, 1), {}), (Cluster(names, 2), {})) == [None, None]
        assert chief.result(LONG) == [None]


def test_a_worker_that_dies_while_waiting_and_stays_away_is_named(addresses):
    names = addresses(3)
    hello = {"aib_tf": 1, "index": 1, "token": "t", "addresses": list(names), "facts": {}}
    with ThreadPoolExecutor(1) as pool:
        chief = pool.submit(outcomes, (Cluster(names, 0), {}), timeout=4.0)
        with connected(names[0]) as worker:
            worker.sendall(json.dumps(hello).encode() + b"\n")
            assert read_line(worker)["status"] == "waiting"
        text = one_text(chief.result(LONG), MissingWorkerError)
    assert f"Worker 1 ({names[1]}) came, left, and did not come back within 4 s: look at its log" in text
    assert f"worker 2 ({names[2]}) did not come within 4 s: start it" in text


def test_a_chief_that_dies_while_the_others_wait_may_come_back(addresses, caplog):
    names = addresses(2)
    with caplog.at_level(logging.INFO, "aib_tf"), ThreadPoolExecutor(1) as pool:
        with listening(names[0]) as first:
            worker = pool.submit(outcomes, (Cluster(names, 1), {}))
            connection, _ = first.accept()
            with connection:
                assert read_line(connection)["index"] == 1
                connection.sendall(b'{"aib_tf": 1, "status": "waiting", "seconds": 1}\n')
        assert outcomes((Cluster(names, 0), {})) == [None]
        assert worker.result(LONG) == [None]
    assert f"Worker 0 ({names[0]}) has left; waiting for it to come back." in caplog.text


def read_line(connection):
    with connection.makefile() as lines:
        return json.loads(lines.readline())
