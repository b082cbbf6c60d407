"""Compiles the native side of aib_tf: the TensorFlow op library, the NumPy module and the C++ tests.

    python custom_ops/compile.py --output=aib_tf/ops
    python custom_ops/compile.py --output=DIR --tests --sanitize=address,undefined

setup.py, the Makefile and the tests call this file; what a compiler is told stands here and nowhere else. It needs the
standard library, and pybind11 for the NumPy module. TensorFlow is asked for its flags in a process of its own.

AIB_TF_CUDA (or --cuda) is 1 to demand the CUDA part, 0 to leave it out, auto to build it where nvcc is.
AIB_TF_CUDA_ARCHITECTURES (or --cuda_architectures), e.g. "80;90", says for which devices. CXX and CUDACXX name the
compilers, where the first on PATH is not the one to take.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = pathlib.PurePath("custom_ops", "nearest_anchor")
OBJECTS = ROOT / ".build" / "objects"

LIBRARY = "_nearest_anchor_op.so"
NUMPY_MODULE = "nearest_anchor_numpy"
TESTS = ("nearest_anchor_test", "nearest_anchor_cuda_test")
RECORD = "_build.json"

# The oldest and the newest release of TensorFlow that pyproject.toml lets in.
TENSORFLOW = ((2, 18), (2, 21))

# Turing; Ampere and Ada; Hopper. Later devices translate the code for the newest of them when they first load it.
ARCHITECTURES = ("75", "80", "90")

# a * b + c is never contracted, so that the results are the same on every instruction set. NDEBUG is how TensorFlow is
# built, whose headers it changes.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
CUDA_FLAGS = ("-std=c++17", "-O3", "--fmad=false", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall")
SANITIZED = ("-std=c++17", "-O1", "-g", "-ffp-contract=off", "-fno-omit-frame-pointer", "-Wall", "-Wextra", "-Werror")


class UnavailableError(Exception):
    """Something that compiling needs is not here. The message is a sentence that names the remedy."""


class CompilerError(Exception):
    """A compiler did not accept its input. The message is a sentence with its first error."""

    def __init__(self, message, output):
        first = re.search(r"(?:(?:error|fatal) *: *(?!ld returned)|(?=undefined |cannot find ))(.+)", output)
        reason = first[1] if first else (output.strip().splitlines() or ["no message"])[-1]
        super().__init__(f"{message}: {reason.rstrip('.')}.")


@dataclasses.dataclass(frozen=True)
class Compiler:
    command: tuple
    version: str


@dataclasses.dataclass(frozen=True)
class Cuda:
    nvcc: str
    version: str
    architectures: tuple
    include: str
    runtime: str


@dataclasses.dataclass(frozen=True)
class TensorFlow:
    version: str
    git_version: str
    cxx11_abi: int
    include: str
    flags: tuple
    link_flags: tuple


@dataclasses.dataclass(frozen=True)
class Unit:
    """A source file and how it is compiled.

    Attributes:
        source: the name of the file in SOURCES.
        command: the compiler and the flags that decide about the result.
        identity: the versions of what the command and the folders in `places` stand for.
        places: the flags that name folders elsewhere, which differ from one environment to the next.
    """

    source: str
    command: tuple
    identity: tuple
    places: tuple = ()


@dataclasses.dataclass(frozen=True)
class Product:
    file: str
    units: tuple
    link_flags: tuple


# What there is to compile with, and for.


def find_compiler():
    if platform.system() != "Linux":
        raise UnavailableError(f"The ops of aib_tf are compiled on Linux only, and this is {platform.system()}.")
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else ["c++", "g++", "clang++"]:
        program, *arguments = shlex.split(name)
        if found := shutil.which(program):
            return Compiler((found, *arguments), _output([found, *arguments, "--version"]).splitlines()[0])
    looked_for = f"CXX={chosen} is no program" if chosen else "c++, g++ and clang++ are not on PATH"
    raise UnavailableError(
        f"There is no C++ compiler ({looked_for}): install one (Debian and Ubuntu: apt install g++), "
        "then install aib_tf again."
    )


def find_cuda(mode, architectures):
    """Returns the CUDA compiler, or None where it is not wanted, or neither there nor demanded."""
    if mode == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    chosen = os.environ.get("CUDACXX")
    candidates = [chosen] if chosen else ["nvcc", *(os.path.join(home, "bin", "nvcc") for home in homes if home)]
    nvcc = next(filter(None, map(shutil.which, candidates)), None)
    if nvcc is None:
        if mode == "auto" and not chosen:
            return None
        raise UnavailableError(
            f"There is no nvcc ({f'CUDACXX={chosen} is no program' if chosen else 'it is not on PATH'}), which the "
            "CUDA part needs: install the CUDA toolkit, name its nvcc in CUDACXX, or set AIB_TF_CUDA=0."
        )
    # What nvcc would do. It names the folders of the toolkit, which distributions put in different places.
    plan = _output([nvcc, "-dryrun", "-x", "cu", "-c", os.devnull])
    includes = [path for path in re.findall(r'"-I([^"]+)"', plan) if os.path.exists(f"{path}/cuda_runtime.h")]
    runtimes = [f"{path}/libcudart_static.a" for path in re.findall(r'"-L([^"]+)"', plan)]
    runtimes = [path for path in runtimes if os.path.exists(path)]
    if not (includes and runtimes):
        raise UnavailableError(
            f"{nvcc} comes without {'libcudart_static.a' if includes else 'cuda_runtime.h'}, which the CUDA part "
            "needs: install the whole CUDA toolkit, or set AIB_TF_CUDA=0."
        )
    version = _output([nvcc, "--version"])
    version = (re.findall(r"V([\d.]+)", version) or version.splitlines())[0]
    if not architectures:
        known = re.findall(r"compute_(\d+)", _output([nvcc, "--list-gpu-arch"]))
        architectures = [each for each in ARCHITECTURES if each in known] or known[-1:]
    return Cuda(nvcc, version, tuple(architectures), includes[0], runtimes[0])


@functools.cache
def find_tensorflow():
    """Asks TensorFlow how to compile for it: the one that is installed where aib_tf is going to be.

    pip builds in an environment of its own, which it puts into PYTHONPATH; `python -E` does not see it and finds what
    is installed for good. Where that is no TensorFlow, or one that pip is about to replace, the build environment has
    the right one, because custom_ops/backend.py asks for it.
    """
    versions = {options: _tensorflow_version(*options) for options in (("-E",), ())}
    there = [options for options, version in versions.items() if version]
    if not there:
        raise UnavailableError(f"There is no TensorFlow for {sys.executable}: install it, then install aib_tf again.")
    options = next((each for each in there if _is_supported(versions[each])), there[-1])
    result = _python(
        *options,
        "-c",
        "import json, tensorflow as tf\n"
        "v, s = tf.version, tf.sysconfig\n"
        "flags = s.get_include(), s.get_compile_flags(), s.get_link_flags()\n"
        "print(json.dumps([v.VERSION, v.GIT_VERSION, s.CXX11_ABI_FLAG, *flags]))",
    )
    if result.returncode:
        raise UnavailableError(
            f"TensorFlow {versions[options]} of {sys.executable} cannot be imported "
            f"({result.stderr.strip().splitlines()[-1]}): repair it, then install aib_tf again."
        )
    version, git_version, cxx11_abi, include, flags, link_flags = json.loads(result.stdout.splitlines()[-1])
    flags = tuple(flag for flag in flags if not flag.startswith("-I"))
    return TensorFlow(version, git_version, cxx11_abi, include, flags, tuple(link_flags))


def required_tensorflow():
    """Returns the requirement for a build environment: none where TensorFlow is, or where nothing can be compiled."""
    try:
        find_compiler()
    except UnavailableError:
        return []
    version = _tensorflow_version("-E")
    if version and _is_supported(version):
        return []
    (oldest_major, oldest_minor), (newest_major, newest_minor) = TENSORFLOW
    return [f"tensorflow>={oldest_major}.{oldest_minor},<{newest_major}.{newest_minor + 1}"]


def _tensorflow_version(*options):
    program = "import importlib.metadata as m; print(*(each.version for each in m.distributions(name='tensorflow')))"
    return _python(*options, "-c", program).stdout.partition(" ")[0].strip()


def _is_supported(version):
    oldest, newest = TENSORFLOW
    return oldest <= tuple(map(int, re.match(r"(\d+)\.(\d+)", version).groups())) <= newest


def _python(*arguments):
    return _run([sys.executable, *arguments], ROOT / SOURCES)


def _output(command):
    result = _run(command)
    if result.returncode or not result.stdout + result.stderr:
        last = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        raise UnavailableError(f"`{shlex.join(command)}` fails ({last}): repair it, then install aib_tf again.")
    return result.stdout + result.stderr


def _run(command, folder=None):
    # Messages in English: errors are looked for in them.
    environment = os.environ | {"LC_ALL": "C", "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace")


# What is made, and of what.


def _library(compiler, cuda):
    tensorflow = find_tensorflow()
    # The headers of TensorFlow include headers of these two without their folder.
    folders = ("", "/external/highwayhash", "/external/farmhash_archive/src")
    # Messages in these headers hold the path to them, which is different for every build in isolation.
    mapped = f"-ffile-prefix-map={tensorflow.include}=tensorflow/include"
    units = [
        _unit(
            source,
            compiler,
            FLAGS + tensorflow.flags + (("-DGOOGLE_CUDA=1",) if cuda else ()),
            cuda,
            (f"TensorFlow {tensorflow.version} {tensorflow.git_version}",),
            (*(f"-isystem{tensorflow.include}{folder}" for folder in folders), mapped),
        )
        for source in ("nearest_anchor_xla.cc", "nearest_anchor_op.cc")
    ]
    # libtensorflow_cc has what the XLA lowerings call. There is no run path: TensorFlow is loaded before this library,
    # and where it is not, opening has to fail and not to load another one. A symbol that nobody has is an error here.
    others = (flag.replace("_framework", "_cc") for flag in tensorflow.link_flags if flag.startswith("-l"))
    link_flags = ("-shared", *tensorflow.link_flags, *others, "-Wl,-z,defs")
    return Product(LIBRARY, (*units, *_kernel(compiler, cuda)), _cuda_runtime(cuda) + link_flags)


def _numpy_module(compiler, cuda):
    try:
        import pybind11
    except ImportError:
        raise UnavailableError(
            f"There is no pybind11 for {sys.executable}, which the module for NumPy arrays needs: "
            "run `pip install pybind11`, then install aib_tf again."
        ) from None
    includes = dict.fromkeys(sysconfig.get_path(name) for name in ("include", "platinclude"))
    if not any(os.path.exists(f"{path}/Python.h") for path in includes):
        raise UnavailableError(
            f"There is no Python.h for {sys.executable}, which the module for NumPy arrays needs: "
            "install it (Debian and Ubuntu: apt install python3-dev), then install aib_tf again."
        )
    unit = _unit(
        "nearest_anchor_pybind.cc",
        compiler,
        FLAGS,
        cuda,
        (f"Python {platform.python_version()}{sys.abiflags}", f"pybind11 {pybind11.__version__}"),
        [f"-isystem{path}" for path in (*includes, pybind11.get_include())],
    )
    file = NUMPY_MODULE + sysconfig.get_config_var("EXT_SUFFIX")
    return Product(file, (unit, *_kernel(compiler, cuda)), (*_cuda_runtime(cuda), "-shared", "-pthread"))


def _test(name, compiler, cuda, sanitizers):
    flags, link_flags = FLAGS, ("-pthread",)
    if sanitizers:
        link_flags += (f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all")
        flags = SANITIZED + link_flags
    kernel, *_ = _kernel(compiler, flags=flags)
    if name != "nearest_anchor_cuda_test":
        return Product(name, (_unit(f"{name}.cc", compiler, flags), kernel), link_flags)
    # This one includes the CUDA kernels. Without nvcc it brings what it takes to run them on the host.
    if cuda:
        unit = _cuda_unit(f"{name}.cc", compiler, cuda, ("--expt-relaxed-constexpr",))
    else:
        # At -O3, g++ warns of variables that are set; the kernels are here to be right, not fast.
        less = () if sanitizers else ("-O2",)
        unit = _unit(f"{name}.cc", compiler, (*flags, *less, "-DAIB_TF_CUDA=1", "-Wno-unknown-pragmas"))
    return Product(name, (unit, kernel), _cuda_runtime(cuda) + link_flags)


def _unit(source, compiler, flags, cuda=None, identity=(), places=()):
    identity = (compiler.version, *identity)
    if cuda:
        flags = (*flags, "-DAIB_TF_CUDA=1")
        identity = (*identity, f"CUDA {cuda.version}")
        places = (*places, f"-isystem{cuda.include}")
    return Unit(source, compiler.command + tuple(flags), identity, tuple(places))


def _cuda_unit(source, compiler, cuda, flags=()):
    # NVCC_CCBIN is nvcc's own way to name the host compiler, for those who need an older one.
    host = () if os.environ.get("NVCC_CCBIN") else ("-ccbin", compiler.command[0])
    targets = (f"-gencode=arch={target.replace('sm', 'compute')},code={target}" for target in _targets(cuda))
    command = (cuda.nvcc, *host, *CUDA_FLAGS, *flags, "-DAIB_TF_CUDA=1", "--threads=0", *targets, "-x", "cu")
    return Unit(source, command, (compiler.version, f"CUDA {cuda.version}"))


def _kernel(compiler, cuda=None, flags=FLAGS):
    units = [_unit("nearest_anchor_kernel.cc", compiler, flags)]
    if cuda:
        units.append(_cuda_unit("nearest_anchor_kernel.cu.cc", compiler, cuda))
    return units


def _targets(cuda):
    """Returns machine code for each architecture, and for later ones the newest in a form that is translated there."""
    newest = max(cuda.architectures, key=lambda architecture: int(re.match(r"\d+", architecture)[0]))
    return [*(f"sm_{architecture}" for architecture in cuda.architectures), f"compute_{newest}"]


def _cuda_runtime(cuda):
    # The archive goes before every library, because TensorFlow exports functions of the same names, of another version
    # of CUDA. And nothing of it is visible from outside, where other libraries bring their own.
    return (cuda.runtime, "-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread") if cuda else ()


# Making it.


def build(output, cuda=None, architectures=None, strict=False):
    """Compiles what can be compiled here into a folder, with a _build.json that says what that is and what is missing.

    A build that is stopped leaves no part of a file, and no file that _build.json does not describe.

    Args:
        output: the folder.
        cuda: "0", "1" or "auto"; None for what AIB_TF_CUDA says.
        architectures: e.g. "80;90"; None for what AIB_TF_CUDA_ARCHITECTURES says.
        strict: whether an error in a source file is raised, instead of being noted in _build.json.

    Returns:
        What is in _build.json.

    Raises:
        CompilerError: if a compiler reports an error under `strict`, or CUDA is demanded.
        UnavailableError: if CUDA is demanded and something that compiling needs is not here.
        ValueError: if `cuda` or `architectures` is none of the above.
    """
    mode, architectures = _settings(cuda, architectures)
    with tempfile.TemporaryDirectory() as folder:
        made, cuda, problems = _make_all(mode, architectures, folder)
        for problem in problems:
            if mode == "1" or (strict and isinstance(problem, CompilerError)):
                raise problem
        record = _write_record(folder, made, cuda, problems)
        _install(made.values(), pathlib.Path(folder, RECORD), pathlib.Path(output))
    for file in made.values():
        print(f"Wrote {pathlib.Path(output, file.name)}")
    if problems:
        print(f"aib_tf works without what could not be compiled. {record['problem']}")
    return record


def describe(output):
    """Writes the _build.json of what another build system made, without CUDA, and put into a folder."""
    files = {"library": LIBRARY, "numpy_module": NUMPY_MODULE + sysconfig.get_config_var("EXT_SUFFIX")}
    _write_record(output, {name: pathlib.Path(output, file) for name, file in files.items()})


def _write_record(folder, made, cuda=None, problems=()):
    record = {
        "tensorflow": _described_tensorflow() if "library" in made else None,
        "cuda": {"architectures": _targets(cuda), "nvcc": cuda.version} if cuda and made else None,
        "library": _described(made.get("library")),
        "numpy_module": _described(made.get("numpy_module")),
        "problem": " ".join(map(str, problems)) or None,
    }
    pathlib.Path(folder, RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def build_tests(output, sanitizers="", cuda=None, architectures=None):
    """Compiles the C++ tests into a folder.

    Args:
        output: the folder.
        sanitizers: those of the compiler, e.g. "address,undefined".
        cuda: "1" for CUDA tests that need a device; otherwise they run on the host.
        architectures: as for `build`.

    Raises:
        CompilerError: if a compiler reports an error.
        UnavailableError: if something that compiling needs is not here.
        ValueError: if `cuda` or `architectures` is none of the above.
    """
    mode, architectures = _settings(cuda or "0", architectures)
    compiler, cuda = find_compiler(), find_cuda(mode, architectures)
    plans = {name: functools.partial(_test, name, compiler, cuda, sanitizers) for name in TESTS}
    with tempfile.TemporaryDirectory() as folder:
        made, problems = _make(plans, compiler, folder)
        if problems:
            raise problems[0]
        pathlib.Path(output).mkdir(parents=True, exist_ok=True)
        for file in made.values():
            _place(file, pathlib.Path(output))


def _settings(cuda, architectures):
    mode = cuda or os.environ.get("AIB_TF_CUDA") or "auto"
    if mode not in ("0", "1", "auto"):
        raise ValueError(f"AIB_TF_CUDA must be 0, 1 or auto. Received: {mode}")
    architectures = architectures or os.environ.get("AIB_TF_CUDA_ARCHITECTURES") or ""
    if not re.fullmatch(r"(\d+[af]?([;,]\d+[af]?)*)?", architectures):
        raise ValueError(f"AIB_TF_CUDA_ARCHITECTURES must be numbers such as 80;90. Received: {architectures}")
    return mode, re.findall(r"\w+", architectures)


def _make_all(mode, architectures, folder):
    """Returns name -> file of what could be made, CUDA if it took part, and what stood in the way of the rest."""
    try:
        compiler = find_compiler()
    except UnavailableError as missing:
        return {}, None, [missing]

    def make(cuda):
        plans = {"library": _library, "numpy_module": _numpy_module}
        return _make({name: functools.partial(plan, compiler, cuda) for name, plan in plans.items()}, compiler, folder)

    try:
        cuda = find_cuda(mode, architectures)
    except UnavailableError as missing:
        if mode == "1":
            raise
        made, problems = make(cuda=None)
        return made, None, [missing, *problems]
    made, problems = make(cuda)
    errors = [str(problem) for problem in problems if isinstance(problem, CompilerError)]
    if cuda and errors and mode == "auto":
        cuda = None
        made, problems = make(cuda)
        # An error that is there without CUDA too is not CUDA's.
        errors = [error for error in errors if error not in map(str, problems)]
        problems = [UnavailableError(f"The CUDA part is left out. {error}") for error in errors[:1]] + problems
    return made, cuda, problems


def _make(plans, compiler, folder):
    """Returns name -> file of what could be made, and the errors that stood in the way of the rest."""
    products, problems, made = {}, [], {}
    for name, plan in plans.items():
        try:
            products[name] = plan()
        except UnavailableError as missing:
            problems.append(missing)
    units = dict.fromkeys(unit for product in products.values() for unit in product.units)
    OBJECTS.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = dict(zip(units, pool.map(_object, units), strict=True))
    errors = [each for each in objects.values() if isinstance(each, CompilerError)]
    for name, product in products.items():
        files = [objects[unit] for unit in product.units]
        if not any(isinstance(file, CompilerError) for file in files):
            file = pathlib.Path(folder, product.file)
            error = _call([*compiler.command, *files, *product.link_flags, "-o", file], f"{file.name} does not link")
            if error:
                errors.append(error)
            else:
                made[name] = file
    return made, problems + errors


def _object(unit):
    """Compiles, unless that was done before with the same outcome. Returns the object file or the CompilerError."""
    how = _hash(repr((unit.command, unit.identity)).encode())[:16]
    file = OBJECTS / f"{unit.source}-{how}-{_hash(_contents(unit.source))[:16]}.o"
    if not file.exists():
        source = SOURCES / unit.source
        print(f"Compiling {source}", flush=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        message = f"{source} does not compile with {', '.join(unit.identity)}"
        error = _call([*unit.command, *unit.places, "-c", source, "-o", partial], message)
        if error:
            return error
        for outdated in OBJECTS.glob(f"{unit.source}-{how}-*.o"):
            outdated.unlink(missing_ok=True)
        partial.replace(file)
    return file


def _contents(source):
    """Returns the contents of a source file and of all that it includes of its folder."""
    names, contents = [source], []
    for name in names:
        contents.append((ROOT / SOURCES / name).read_bytes())
        included = re.findall(rb'^ *#include "(nearest_anchor.*?)"', contents[-1], re.MULTILINE)
        names += dict.fromkeys(each.decode() for each in included if each.decode() not in names)
    return b"\0".join(contents)


def _hash(contents):
    return hashlib.sha256(contents).hexdigest()


def _call(command, message):
    """Returns None, or a CompilerError. Prints the end of what the compiler prints, be it errors or warnings."""
    result = _run(command, ROOT)
    output = result.stdout + result.stderr
    if output.strip():
        print("\n".join(output.rstrip().splitlines()[-20:]), flush=True)
    return CompilerError(message, output) if result.returncode else None


def _described(file):
    # Opening a damaged library can end the process: who opens it compares these first.
    if file is None:
        return None
    contents = file.read_bytes()
    return {"file": file.name, "size": len(contents), "sha256": _hash(contents)}


def _described_tensorflow():
    tensorflow = find_tensorflow()
    return {name: getattr(tensorflow, name) for name in ("version", "git_version", "cxx11_abi")}


def _install(files, record, output):
    output.mkdir(parents=True, exist_ok=True)
    # While there is no record, nothing counts as built.
    for pattern in (RECORD, LIBRARY, f"{NUMPY_MODULE}.*.so", "*.partial"):
        for outdated in output.glob(pattern):
            outdated.unlink(missing_ok=True)
    for file in [*files, record]:
        _place(file, output)


def _place(file, output):
    """Copies a file under another name and renames it, so that there is all of it or nothing."""
    partial = output / f"{file.name}.partial"
    shutil.copy(file, partial)
    partial.replace(output / file.name)


def main():
    parser = argparse.ArgumentParser(description="Compiles the native side of aib_tf.")
    parser.add_argument("--output", required=True, help="the folder of the results")
    parser.add_argument("--cuda", choices=["auto", "0", "1"], help="whether to build the CUDA part [AIB_TF_CUDA, auto]")
    parser.add_argument("--cuda_architectures", help='e.g. "80;90" [AIB_TF_CUDA_ARCHITECTURES]')
    parser.add_argument("--strict", action="store_true", help="stop at an error, instead of leaving that part out")
    parser.add_argument("--describe", action="store_true", help="only write the _build.json of what is in --output")
    parser.add_argument("--tests", action="store_true", help="compile the C++ tests instead")
    parser.add_argument("--sanitize", default="", help='with --tests, e.g. "address,undefined"')
    options = parser.parse_args()
    try:
        if options.describe:
            describe(options.output)
        elif options.tests:
            build_tests(options.output, options.sanitize, options.cuda, options.cuda_architectures)
        else:
            build(options.output, options.cuda, options.cuda_architectures, options.strict)
    except (CompilerError, UnavailableError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
