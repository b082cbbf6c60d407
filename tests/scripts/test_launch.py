"""The launcher starts workers on this machine, shows what they say, and leaves none behind."""

import contextlib
import fcntl
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = str(Path(__file__).resolve().parents[2] / "scripts" / "launch.py")
LONG = 120.0  # seconds; only a hang reaches them
INDEX = 'import json, os, signal, subprocess, sys, time\nindex = json.loads(os.environ["TF_CONFIG"])["task"]["index"]\n'


@pytest.fixture
def program(tmp_path):
    """Writes the program of a worker, which finds its number in `index`."""

    def write(text):
        path = tmp_path / "worker program.py"
        path.write_text(INDEX + text)
        return str(path)

    return write


@contextlib.contextmanager
def launched(*arguments, stdout=subprocess.PIPE, **environment):
    environment = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    process = subprocess.Popen(
        [sys.executable, LAUNCH, *map(str, arguments)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
        # What runs the tests may ignore it, as nohup does, and a process inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def launch(*arguments, **environment):
    """Runs the launcher to its end: its exit code, the lines of stdout, and stderr."""
    with launched(*arguments, **environment) as process:
        output, errors = process.communicate(timeout=LONG)
    return process.returncode, output.splitlines(), errors.decode()


def lines_of(output, index):
    prefix = b"[worker %d] " % index
    return [line.removeprefix(prefix) for line in output if line.startswith(prefix)]


def wait_for_lines(process, *expected):
    """Reads stdout until each of these lines has come, in any order."""
    missing = set(expected)
    while missing:
        line = process.stdout.readline()
        assert line, process.stderr.read().decode()
        missing.discard(line.rstrip())


def test_each_worker_gets_its_place_a_port_and_its_share_of_the_cores(program):
    names = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "PYTHONUNBUFFERED", "TF_CONFIG")
    path = program(f"print(json.dumps([{{name: os.environ[name] for name in {names}}}, sys.argv[1:]]))")
    code, output, errors = launch(
        "--workers=3", "--", path, "--", "a b", "--workers=9", TF_NUM_INTRAOP_THREADS="7", OMP_NUM_THREADS=None
    )
    assert (code, errors) == (0, "")
    share = str(max(len(os.sched_getaffinity(0)) // 3, 1)) if hasattr(os, "sched_getaffinity") else None
    ports = set()
    for index in range(3):
        ((environment, arguments),) = map(json.loads, lines_of(output, index))
        assert arguments == ["--", "a b", "--workers=9"]
        config = json.loads(environment["TF_CONFIG"])
        assert config["task"] == {"type": "worker", "index": index}
        addresses = config["cluster"]["worker"]
        assert len(set(addresses)) == 3 and all(address.startswith("localhost:") for address in addresses)
        ports.add(tuple(addresses))
        assert environment["TF_NUM_INTRAOP_THREADS"] == "7"  # of the user
        assert environment["PYTHONUNBUFFERED"] == "1"
        assert share is None or environment["OMP_NUM_THREADS"] == share
    assert len(ports) == 1


def test_any_command_is_run_as_it_is_without_an_input(program):
    code, output, _ = launch("--workers=1", "--", "sh", "-c", 'cat; echo "$0 $*"', "a  b", "*")
    assert (code, output) == (0, [b"[worker 0] a  b *"])


def test_output_comes_whole_line_by_line_whatever_is_in_it(program):
    path = program(
        "out = sys.stdout.buffer\n"
        "for number in range(300):\n"
        "    out.write(b'%d ' % number + bytes([index + 128]) * 5000 + b'\\n')\n"
        "out.write(b'10%\\r20%\\r30%\\r\\n\\xff\\0\\n\\nlast')\n"
        "sys.stderr.write('trouble')\n"
    )
    code, output, errors = launch("--workers=3", "--", path)
    assert code == 0
    assert sorted(errors.splitlines()) == [f"[worker {index}] trouble" for index in range(3)]
    for index in range(3):
        lines = lines_of(output, index)
        assert lines[:300] == [b"%d " % number + bytes([index + 128]) * 5000 for number in range(300)]
        assert lines[300:] == [b"10%", b"20%", b"30%", b"\xff\0", b"", b"last"]
    assert len(output) == 3 * 306


def test_a_line_without_an_end_does_not_fill_the_memory(program):
    path = program("sys.stdout.write('a' * 1_000_000)")
    code, output, _ = launch("--workers=1", "--", path)
    lines = lines_of(output, 0)
    assert code == 0
    assert b"".join(lines) == b"a" * 1_000_000 and max(map(len, lines)) < 200_000


def test_lines_are_shown_when_they_come(program):
    path = program("print('here')\ntime.sleep(1000)")
    with launched("--workers=2", "--", path) as process:
        wait_for_lines(process, b"[worker 0] here", b"[worker 1] here")


WAITING = """
def stop(number, frame):
    print(signal.Signals(number).name)
    sys.exit(int(sys.argv[1]) if number == signal.SIGTERM else 130)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
print("ready")
while True:
    time.sleep(1)
"""


@pytest.mark.parametrize(
    ("sent", "told", "code"),
    [(signal.SIGTERM, b"SIGTERM", 75), (signal.SIGINT, b"SIGINT", 130), (signal.SIGHUP, b"SIGTERM", 75)],
    ids=["SIGTERM", "SIGINT", "SIGHUP"],
)
def test_a_signal_goes_to_all_workers_once_and_their_exit_code_is_passed_on(sent, told, code, program):
    with launched("--workers=2", "--restarts=3", "--", program(WAITING), 75) as process:
        wait_for_lines(process, b"[worker 0] ready", b"[worker 1] ready")
        process.send_signal(sent)
        output, errors = process.communicate(timeout=LONG)
    assert process.returncode == code
    assert sorted(output.splitlines()) == [b"[worker 0] " + told, b"[worker 1] " + told]
    assert b"starting all workers again" not in errors


def test_a_second_signal_kills_the_workers(program):
    path = program("signal.signal(signal.SIGTERM, lambda *_: print('no'))\nprint('ready')\nwhile True: time.sleep(1)")
    with launched("--workers=2", "--restarts=3", "--", path) as process:
        wait_for_lines(process, b"[worker 0] ready", b"[worker 1] ready")
        process.send_signal(signal.SIGTERM)
        wait_for_lines(process, b"[worker 0] no", b"[worker 1] no")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=LONG)
    assert process.returncode == 128 + signal.SIGTERM


def test_the_exit_code_is_that_of_the_worker_that_failed_and_not_of_those_that_noticed(program, tmp_path):
    flag = tmp_path / "noticed"
    path = program(
        f"flag = {str(flag)!r}\n"
        "if index == 1:\n"
        "    open(flag, 'w').close()\n"
        "    sys.exit(75)\n"  # its peer is gone: it is sooner than the peer itself
        "if index == 0:\n"
        "    while not os.path.exists(flag): time.sleep(0.01)\n"
        "    time.sleep(0.3)\n"
        "    sys.exit(3)\n"
    )
    code, _, errors = launch("--workers=3", "--restarts=2", "--", path)
    assert code == 3
    assert "worker 1 ended with exit code 75" in errors and "worker 0 ended with exit code 3" in errors
    assert "starting all workers again" not in errors


def test_workers_that_stay_behind_a_failed_one_are_ended_first_gently(program, tmp_path):
    flag = tmp_path / "deaf"
    path = program(
        f"flag = {str(flag)!r}\n"
        "if index == 1:\n"
        "    signal.signal(signal.SIGTERM, lambda *_: print('no'))\n"
        "    open(flag, 'w').close()\n"
        "if index == 0:\n"
        "    while not os.path.exists(flag): time.sleep(0.01)\n"
        "    sys.exit(2)\n"
        "while True: time.sleep(1)"
    )
    code, output, errors = launch("--workers=3", "--grace=0.5", "--", path)
    assert (code, output) == (2, [b"[worker 1] no"])
    assert [line for line in errors.splitlines() if "has not ended" in line] == [
        "launch.py: worker 1 has not ended 0.5 s later: SIGTERM",
        "launch.py: worker 2 has not ended 0.5 s later: SIGTERM",
        "launch.py: worker 1 has not ended 0.5 s later: SIGKILL",
    ]


# A run that goes on where it was: the file counts the starts of worker 0.
COUNTING = """
path = sys.argv[1]
if index == 0:
    with open(path, "a") as file:
        file.write("x")
starts = 0
while not starts:
    starts = len(open(path).read()) if os.path.exists(path) else 0
print("start", starts)
"""


@pytest.mark.parametrize(
    ("last", "restarts", "code", "starts"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 3, 0, 2),
        ("sys.exit(75)", 3, 0, 2),
        ("sys.exit(75)", 0, 75, 1),
        ("sys.exit(1)", 3, 1, 1),
        ("sys.exit(130)", 3, 130, 1),
    ],
)
def test_all_workers_start_again_only_after_one_was_lost(last, restarts, code, starts, program, tmp_path):
    path = program(COUNTING + f"if index == 0 and starts == 1: {last}\n")
    arguments = ["--workers=2", f"--restarts={restarts}", "--", path, tmp_path / "starts"]
    actual, _, errors = launch(*arguments)
    assert (actual, len((tmp_path / "starts").read_text())) == (code, starts), errors
    assert ("launch.py: starting all workers again (1 of 3)" in errors) == (starts == 2)


def test_a_worker_that_is_always_lost_ends_the_restarts(program, tmp_path):
    path = program(COUNTING + "if index == 0: os.kill(os.getpid(), signal.SIGKILL)\n")
    code, _, errors = launch("--workers=2", "--restarts=2", "--", path, tmp_path / "starts")
    assert (code, len((tmp_path / "starts").read_text())) == (137, 3)
    assert errors.count("worker 0 was killed by SIGKILL") == 3


# Every process of a worker holds a lock on a file of its own, which shows when all of them are gone.
HOLDING = """
import fcntl
lock = open(f"{sys.argv[1]}{index}", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
subprocess.Popen([sys.executable, "-c", "import time; print('child', flush=True); time.sleep(1000)"],
                 pass_fds=[lock.fileno()])
"""


def wait_until_gone(*paths):
    end = time.monotonic() + LONG
    for path in paths:
        with open(path, "w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    assert time.monotonic() < end
                    time.sleep(0.02)


@pytest.mark.parametrize("kill", [os.kill, os.killpg], ids=["alone", "with its process group"])
def test_no_process_outlives_a_launcher_that_was_killed(kill, program, tmp_path):
    locks = tmp_path / "lock"
    with launched("--workers=2", "--", program(HOLDING + "time.sleep(1000)"), locks) as process:
        wait_for_lines(process, b"[worker 0] child", b"[worker 1] child")
        kill(process.pid, signal.SIGKILL)
        process.wait(LONG)
        wait_until_gone(f"{locks}0", f"{locks}1")


def test_what_a_worker_leaves_behind_ends_with_it(program, tmp_path):
    locks = tmp_path / "lock"
    path = program(HOLDING + "print('done')")
    code, output, _ = launch("--workers=2", "--", path, locks)
    assert code == 0 and b"[worker 0] done" in output
    wait_until_gone(f"{locks}0", f"{locks}1")


def test_the_workers_end_in_peace_when_nobody_reads_what_they_say(program):
    reader, writer = os.pipe()
    path = program(
        "asked = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: asked.append(1))\n"
        "after = 0\n"
        "while after < 30:\n"
        "    print('line')\n"
        "    time.sleep(0.01)\n"
        "    after += len(asked)\n"
        "sys.exit(75)"
    )
    with os.fdopen(reader, "rb") as output, launched("--workers=2", "--", path, stdout=writer) as process:
        os.close(writer)
        heard = set()
        while len(heard) < 2:  # both are ready for a signal
            heard.add(output.readline())
        output.close()
        _, errors = process.communicate(timeout=LONG)
    assert process.returncode == 75, errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Put the command of a worker behind --"),
        (["--"], "Put the command of a worker behind --"),
        (["--workers=2", "worker.py"], "unrecognized arguments: worker.py"),
        (["--workers=0", "--", "true"], "`workers` must be an integer from 1 up. Received: workers=0"),
        (["--workers=two", "--", "true"], "invalid int value: 'two'"),
        (["--restarts=-1", "--", "true"], "`restarts` must be an integer from 0 up. Received: restarts=-1"),
        (["--grace=nan", "--", "true"], "`grace` must be a number of seconds, 0 or more. Received: grace=nan"),
        (["--", "missing/train.py"], "There is no such script. Received: command='missing/train.py'"),
        (["--", "no-such-command"], "There is no such command. Received: command='no-such-command'"),
    ],
)
def test_bad_input_is_named_and_nothing_is_started(arguments, message):
    code, output, errors = launch(*arguments)
    assert (code, output) == (2, [])
    assert message in errors


def test_the_launcher_imports_no_tensorflow():
    program = (
        "import runpy, sys\nsys.argv = ['launch.py', '--', 'true']\n"
        f"try: runpy.run_path({LAUNCH!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'tensorflow', 'keras', 'numpy', 'aib_tf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=LONG)


@pytest.mark.parametrize(
    ("gpus", "count", "visible"),
    [(0, 2, [None, None]), (4, 2, ["0,1", "2,3"]), (3, 2, ["0", "1"]), (1, 2, ["-1", "-1"])],
)
def test_workers_share_the_gpus_of_the_machine_alike(tmp_path, gpus, count, visible):
    launcher = runpy.run_path(LAUNCH)
    folder = tmp_path / "gpus"
    if gpus:
        folder.mkdir()
        for number in range(gpus):
            (folder / f"0000:0{number}:00.0").mkdir()
    launcher["shares"].__globals__["NVIDIA_GPUS"] = str(folder)
    assert [launcher["shares"](index, count).get("CUDA_VISIBLE_DEVICES") for index in range(count)] == visible
