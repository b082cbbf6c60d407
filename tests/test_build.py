"""What custom_ops/compile.py and setup.py make of the compilers, the TensorFlow and the settings that they find.

The compilers here are scripts that note how they were called; `make test-wheel` builds with the real ones.
"""

import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile

import pytest

import aib_tf

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIBRARY = "_nearest_anchor_op.so"
NUMPY_MODULE = "nearest_anchor_numpy" + sysconfig.get_config_var("EXT_SUFFIX")
DECLARED = re.search(r'"(tensorflow>=.*?)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
BOTH = sorted(["_build.json", LIBRARY, NUMPY_MODULE])

COMPILER = """
echo "$*" >>"{log}"
case "$*" in *"$REFUSED"*) echo "In file included from here,"; echo "there:3: error: no such thing"; exit 1;; esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && echo "{name} $*" >"$2"; shift; done
"""
CXX = '#!/bin/sh\n[ "$1" = --version ] && echo "fake {version}" && exit\n' + COMPILER
NVCC = (
    """#!/bin/sh
case "$*" in
  *-dryrun*) echo '#$ INCLUDES="-I{home}/include"'; echo '#$ LIBRARIES= "-L{home}/lib/stubs" "-L{home}/lib"'; exit;;
  *--version*) echo "release 99.1, V99.1.2"; exit;;
  *--list-gpu-arch*) echo compute_80; echo compute_90; echo compute_130; exit;;
esac
"""
    + COMPILER
)


class Toolchain:
    """compile.py beside a copy of the sources, and compilers that only note their arguments."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        self.output, self.log = folder / "output", folder / "log"
        self.sources = folder / "tree" / "custom_ops" / "nearest_anchor"
        shutil.copytree(ROOT / "custom_ops", folder / "tree" / "custom_ops")
        specification = importlib.util.spec_from_file_location("compile", folder / "tree" / "custom_ops" / "compile.py")
        self.compile = importlib.util.module_from_spec(specification)
        monkeypatch.setitem(sys.modules, "compile", self.compile)  # dataclasses look there
        specification.loader.exec_module(self.compile)
        self.find_tensorflow = self.compile.find_tensorflow
        self.use_tensorflow("2.21.0")
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.delenv("AIB_TF_CUDA_ARCHITECTURES", raising=False)
        monkeypatch.setenv("AIB_TF_CUDA", "0")
        monkeypatch.setenv("REFUSED", "nothing is refused")
        monkeypatch.setenv("PATH", str(folder / "bin"))
        self.add("include/Python.h", "")
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder / "include"))
        self.use_compiler("1.0")

    def add(self, path, text):
        path = self.folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)

    def use_tensorflow(self, version):
        flags = ("-DFROM_TENSORFLOW",), ("-L/tensorflow", "-l:libtensorflow_framework.so.2")
        found = self.compile.TensorFlow(version, f"v{version}-0", 1, "/tensorflow/include", *flags)
        self.monkeypatch.setattr(self.compile, "find_tensorflow", lambda: found)

    def use_compiler(self, version):
        self.add("bin/c++", CXX.format(name="c++", version=version, log=self.log))

    def use_nvcc(self):
        self.add("cuda/include/cuda_runtime.h", "")
        self.add("cuda/lib/libcudart_static.a", "")
        self.add("bin/nvcc", NVCC.format(name="nvcc", home=self.folder / "cuda", log=self.log))
        self.monkeypatch.setenv("AIB_TF_CUDA", "auto")

    def refuse(self, words):
        self.monkeypatch.setenv("REFUSED", words)

    def build(self, **arguments):
        """Returns the record, what was compiled as source -> command, and what was linked as file -> arguments."""
        self.log.unlink(missing_ok=True)
        record = self.compile.build(self.output, **arguments)
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        compiled = {re.search(r" -c \S*nearest_anchor_(\S+)", line)[1]: line for line in lines if " -c " in line}
        linked = {pathlib.Path(line.split()[-1]).name: line.split() for line in lines if " -c " not in line}
        return record, compiled, linked

    def files(self):
        return sorted(path.name for path in self.output.iterdir())


@pytest.fixture
def toolchain(tmp_path, monkeypatch):
    return Toolchain(tmp_path, monkeypatch)


def test_library_and_module_are_compiled_from_their_sources_and_described(toolchain):
    record, compiled, linked = toolchain.build()
    assert sorted(compiled) == ["kernel.cc", "op.cc", "pybind.cc", "xla.cc"]
    assert ["FROM_TENSORFLOW" in compiled[source] for source in ("op.cc", "xla.cc", "kernel.cc", "pybind.cc")] == [
        True,
        True,
        False,
        False,
    ]
    assert all("-ffp-contract=off" in command for command in compiled.values())
    assert sorted(linked) == [LIBRARY, NUMPY_MODULE]
    assert "-l:libtensorflow_cc.so.2" in linked[LIBRARY]
    assert not any("tensorflow" in argument for argument in linked[NUMPY_MODULE])

    assert toolchain.files() == BOTH
    assert record == json.loads((toolchain.output / "_build.json").read_text(encoding="utf-8"))
    assert record["tensorflow"] == {"version": "2.21.0", "git_version": "v2.21.0-0", "cxx11_abi": 1}
    assert (record["cuda"], record["problem"]) == (None, None)
    for name, file in (("library", LIBRARY), ("numpy_module", NUMPY_MODULE)):
        contents = (toolchain.output / file).read_bytes()
        checksum = hashlib.sha256(contents).hexdigest()
        assert record[name] == {"file": file, "size": len(contents), "sha256": checksum}


def test_only_what_changed_is_compiled_again(toolchain):
    def compiled_after(change):
        change()
        return sorted(toolchain.build()[1])

    def edit(name):
        path = toolchain.sources / name
        return lambda: path.write_text(path.read_text(encoding="utf-8") + "//\n", encoding="utf-8")

    everything = compiled_after(lambda: None)
    assert compiled_after(lambda: None) == []
    assert compiled_after(edit("nearest_anchor_op.cc")) == ["op.cc"]
    assert compiled_after(edit("nearest_anchor_loops.h")) == ["kernel.cc"]
    assert compiled_after(edit("nearest_anchor.h")) == everything
    assert compiled_after(lambda: toolchain.use_tensorflow("2.20.0")) == ["op.cc", "xla.cc"]
    assert compiled_after(lambda: toolchain.use_compiler("2.0")) == everything
    assert compiled_after(lambda: shutil.rmtree(toolchain.output)) == []
    assert toolchain.files() == BOTH


def test_without_a_compiler_the_remedy_is_noted_and_nothing_old_stays(toolchain, capsys):
    toolchain.build()
    toolchain.add(f"output/{LIBRARY}.partial", "of a build that was killed")
    toolchain.add("output/nearest_anchor_numpy.cpython-39-x86_64-linux-gnu.so", "of another Python")
    (toolchain.folder / "bin" / "c++").unlink()
    record = toolchain.compile.build(toolchain.output)
    assert toolchain.files() == ["_build.json"]
    assert re.search(r"no C\+\+ compiler .* install one .*g\+\+.* install aib_tf again\.$", record["problem"])
    assert record["problem"] in capsys.readouterr().out
    assert [record[name] for name in ("tensorflow", "cuda", "library", "numpy_module")] == [None] * 4


def test_without_tensorflow_the_module_for_numpy_is_built_all_the_same(toolchain, monkeypatch):
    def nowhere():
        raise toolchain.compile.UnavailableError("There is no TensorFlow.")

    monkeypatch.setattr(toolchain.compile, "find_tensorflow", nowhere)
    record, _, _ = toolchain.build()
    assert toolchain.files() == ["_build.json", NUMPY_MODULE]
    assert (record["tensorflow"], record["library"], record["problem"]) == (None, None, "There is no TensorFlow.")
    monkeypatch.setitem(sys.modules, "pybind11", None)
    toolchain.use_nvcc()
    record, _, _ = toolchain.build()
    assert [record[name] for name in ("tensorflow", "cuda", "library", "numpy_module")] == [None] * 4
    assert re.fullmatch(r"There is no TensorFlow\. There is no pybind11 .*", record["problem"])


@pytest.mark.parametrize(("missing", "module"), [("Python.h", None), ("pybind11", "pybind11")])
def test_without_what_the_module_for_numpy_needs_the_library_is_built_all_the_same(
    toolchain, monkeypatch, missing, module
):
    if module:
        monkeypatch.setitem(sys.modules, module, None)
    else:
        (toolchain.folder / "include" / missing).unlink()
    record, _, _ = toolchain.build()
    assert toolchain.files() == ["_build.json", LIBRARY]
    assert f"There is no {missing} for {sys.executable}" in record["problem"]


def test_an_error_in_a_source_names_it_shows_the_last_lines_and_leaves_its_product_out(toolchain, capsys):
    toolchain.refuse("-c custom_ops/nearest_anchor/nearest_anchor_xla.cc")
    record, _, _ = toolchain.build()
    assert toolchain.files() == ["_build.json", NUMPY_MODULE]
    assert record["problem"] == (
        "custom_ops/nearest_anchor/nearest_anchor_xla.cc does not compile with fake 1.0, TensorFlow 2.21.0 v2.21.0-0: "
        "no such thing."
    )
    assert "In file included from here,\nthere:3: error: no such thing\n" in capsys.readouterr().out


def test_an_error_of_the_linker_names_the_product(toolchain):
    toolchain.refuse("-l:libtensorflow_cc.so.2")
    record, _, _ = toolchain.build()
    assert toolchain.files() == ["_build.json", NUMPY_MODULE]
    assert record["problem"] == "_nearest_anchor_op.so does not link: no such thing."


def test_strict_stops_at_an_error_and_keeps_the_last_good_build(toolchain):
    before, _, _ = toolchain.build()
    (toolchain.sources / "nearest_anchor_op.cc").write_text("wrong", encoding="utf-8")
    toolchain.refuse("nearest_anchor_op.cc -o")
    with pytest.raises(
        toolchain.compile.CompilerError, match=r"nearest_anchor_op\.cc does not compile .*no such thing"
    ):
        toolchain.build(strict=True)
    assert toolchain.files() == BOTH
    assert json.loads((toolchain.output / "_build.json").read_text(encoding="utf-8")) == before


@pytest.mark.parametrize("stopped_at", [LIBRARY, NUMPY_MODULE, "_build.json"])
def test_a_stopped_build_leaves_nothing_that_counts_as_built(toolchain, monkeypatch, stopped_at):
    toolchain.build()
    rename = pathlib.Path.replace

    def stop(path, target):
        if path.name == f"{stopped_at}.partial":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        toolchain.build()
    assert "_build.json" not in toolchain.files()
    monkeypatch.undo()


def test_cuda_is_compiled_for_its_architectures_and_linked_before_the_cuda_of_tensorflow(toolchain):
    toolchain.use_nvcc()
    record, compiled, linked = toolchain.build()
    assert record["cuda"] == {"architectures": ["sm_80", "sm_90", "compute_90"], "nvcc": "99.1.2"}
    assert "-gencode=arch=compute_90,code=sm_90" in compiled["kernel.cu.cc"]
    assert "--fmad=false" in compiled["kernel.cu.cc"]
    assert "-DGOOGLE_CUDA=1" in compiled["op.cc"]
    assert all("-DAIB_TF_CUDA=1" in compiled[source] for source in ("op.cc", "xla.cc", "pybind.cc", "kernel.cu.cc"))
    runtime = str(toolchain.folder / "cuda" / "lib" / "libcudart_static.a")
    for arguments in linked.values():
        assert "-Wl,--exclude-libs,ALL" in arguments
        assert next(each for each in arguments if each.startswith("-l") or each == runtime) == runtime


def test_architectures_are_those_that_are_asked_for(toolchain, monkeypatch):
    toolchain.use_nvcc()
    monkeypatch.setenv("AIB_TF_CUDA_ARCHITECTURES", "90a;80")
    assert toolchain.build()[0]["cuda"]["architectures"] == ["sm_90a", "sm_80", "compute_90a"]
    assert toolchain.build(architectures="130")[0]["cuda"]["architectures"] == ["sm_130", "compute_130"]


def test_cuda_is_left_out_where_it_is_not_wanted(toolchain, monkeypatch):
    toolchain.use_nvcc()
    record, compiled, _ = toolchain.build(cuda="0")
    assert (record["cuda"], record["problem"]) == (None, None)
    assert not any("CUDA" in command for command in compiled.values())


def test_an_error_of_nvcc_leaves_only_the_cuda_part_out(toolchain):
    toolchain.use_nvcc()
    toolchain.refuse("nearest_anchor_kernel.cu.cc")
    record, _, linked = toolchain.build()
    assert record["cuda"] is None
    assert toolchain.files() == BOTH
    assert "The CUDA part is left out. custom_ops/nearest_anchor/nearest_anchor_kernel.cu.cc" in record["problem"]
    assert not any("libcudart" in argument for arguments in linked.values() for argument in arguments)


def test_an_error_that_cuda_has_no_part_in_is_not_blamed_on_it(toolchain):
    toolchain.use_nvcc()
    toolchain.refuse("nearest_anchor_kernel.cc")
    record, _, _ = toolchain.build()
    assert "CUDA" not in record["problem"]
    assert record["problem"].startswith("custom_ops/nearest_anchor/nearest_anchor_kernel.cc does not compile")


def test_demanded_cuda_is_an_error_where_it_cannot_be(toolchain, monkeypatch):
    monkeypatch.setenv("CUDACXX", "no-nvcc")
    with pytest.raises(toolchain.compile.UnavailableError, match=r"no nvcc \(CUDACXX=no-nvcc .* AIB_TF_CUDA=0"):
        toolchain.build(cuda="1")
    assert not toolchain.log.exists()  # before anything is compiled
    monkeypatch.delenv("CUDACXX")
    toolchain.use_nvcc()
    toolchain.refuse("nearest_anchor_kernel.cu.cc")
    with pytest.raises(toolchain.compile.CompilerError, match=r"kernel\.cu\.cc does not compile"):
        toolchain.build(cuda="1")
    (toolchain.folder / "cuda" / "lib" / "libcudart_static.a").unlink()
    with pytest.raises(toolchain.compile.UnavailableError, match=r"libcudart_static\.a"):
        toolchain.build(cuda="1")
    assert not toolchain.output.exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"cuda": "yes"}, "AIB_TF_CUDA must be 0, 1 or auto. Received: yes"),
        ({"architectures": "sm_80"}, "AIB_TF_CUDA_ARCHITECTURES must be numbers such as 80;90. Received: sm_80"),
    ],
)
def test_other_settings_are_refused(toolchain, setting, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        toolchain.build(**setting)


def test_c_plus_plus_tests_share_the_kernel_with_the_library_unless_sanitized(toolchain):
    def commands(folder, *arguments):
        toolchain.log.unlink(missing_ok=True)
        toolchain.compile.build_tests(toolchain.folder / folder, *arguments)
        assert sorted(path.name for path in (toolchain.folder / folder).iterdir()) == [
            "nearest_anchor_cuda_test",
            "nearest_anchor_test",
        ]
        return toolchain.log.read_text(encoding="utf-8").splitlines()

    toolchain.build()
    plain = commands("plain")
    assert not any("-c custom_ops/nearest_anchor/nearest_anchor_kernel.cc" in command for command in plain)
    sanitized = commands("sanitized", "address,undefined")
    assert len(sanitized) == 5
    assert all("-fsanitize=address,undefined" in command for command in sanitized)
    toolchain.use_nvcc()
    on_device = [command for command in commands("device", "", "1") if "cuda_test" in command]
    assert ["-gencode" in command for command in on_device] == [True, False]
    assert "libcudart_static.a" in on_device[1]
    toolchain.use_compiler("2.0")
    toolchain.refuse("nearest_anchor_test.cc")
    with pytest.raises(toolchain.compile.CompilerError, match="nearest_anchor_test"):
        commands("plain")


@pytest.mark.parametrize(
    ("installed", "in_build_environment", "asked", "required"),
    [
        ("2.20.0", "", "-E", []),
        ("2.20.0", "2.21.0", "-E", []),
        ("", "2.21.0", "-c", [DECLARED]),
        ("2.17.1", "2.21.0", "-c", [DECLARED]),
        ("2.30.0", "2.30.0", "-c", [DECLARED]),
    ],
)
def test_the_tensorflow_that_stays_is_compiled_for(toolchain, installed, in_build_environment, asked, required):
    """The answers of `python -E`, which sees what is installed, and of `python`, which sees the build environment."""
    answer = json.dumps(["2.20.0", "v2.20.0-0", 1, "/include", ["-I/include", "-DX"], ["-lx"]])
    interpreter = f"""#!/bin/sh
        case "$*" in
            -E*importlib.metadata*) echo "{installed}";;
            *importlib.metadata*) echo "{in_build_environment}";;
            *) [ "$1" = "{asked}" ] || exit 1; echo a greeting of TensorFlow; echo '{answer}';;
        esac"""
    toolchain.add("bin/python", interpreter)
    toolchain.monkeypatch.setattr(sys, "executable", str(toolchain.folder / "bin" / "python"))
    assert toolchain.find_tensorflow() == toolchain.compile.TensorFlow(
        "2.20.0", "v2.20.0-0", 1, "/include", ("-DX",), ("-lx",)
    )
    assert toolchain.compile.required_tensorflow() == required


@pytest.fixture
def tree(tmp_path):
    """A copy of what a package is built from, with what an earlier build has left in it."""
    tree = tmp_path / "package"
    tree.mkdir()
    for name in ("aib_tf", "custom_ops"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_build.json"))
    for name in ("CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tree)
    for path in (f"aib_tf/ops/{LIBRARY}", "aib_tf/ops/_build.json", f"custom_ops/nearest_anchor/{LIBRARY}"):
        (tree / path).write_text("of an earlier build", encoding="utf-8")
    return tree


def run(tree, *command, **environment):
    environment = {
        name: value for name, value in os.environ.items() if name not in ("CXX", "AIB_TF_CUDA")
    } | environment
    return subprocess.run([sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True)


def test_it_installs_without_a_compiler_and_says_so(tree, tmp_path):
    options = ("--no-deps", "--no-build-isolation", "--no-index", "-v", "--target", str(tmp_path / "site"))
    installed = run(tree, "-m", "pip", "install", *options, ".", PATH=str(tmp_path))
    assert installed.returncode == 0, installed.stderr
    assert "There is no C++ compiler" in installed.stdout + installed.stderr
    assert list((tmp_path / "site").rglob("*.so")) == []
    program = "import aib_tf; print(aib_tf.__file__, aib_tf.ops.implementation())"
    used = run(tmp_path, "-c", program, PYTHONPATH=str(tmp_path / "site"), AIB_TF_OPS="")
    assert used.stdout.startswith(str(tmp_path / "site")), used.stderr
    assert "There is no C++ compiler" in used.stdout


def test_an_editable_install_builds_in_place(tree, tmp_path):
    result = run(tree, "setup.py", "-q", "build_ext", "--inplace", PATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert not (tree / "aib_tf" / "ops" / LIBRARY).exists()
    assert "no C++ compiler" in json.loads((tree / "aib_tf" / "ops" / "_build.json").read_text())["problem"]


def test_demanded_cuda_that_is_not_there_ends_the_build_with_one_line(tree, toolchain):
    result = run(tree, "setup.py", "-q", "build_ext", AIB_TF_CUDA="1", CUDACXX="no-nvcc")
    assert result.returncode != 0
    assert re.search(r"^error: .*no nvcc.*AIB_TF_CUDA=0\.$", result.stderr, re.MULTILINE), result.stderr
    assert "Traceback" not in result.stderr


def test_source_archive_has_all_sources_and_nothing_that_was_built(tree):
    result = run(tree, "setup.py", "-q", "sdist")
    assert result.returncode == 0, result.stderr
    (archive,) = (tree / "dist").iterdir()
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "custom_ops").rglob("*.*")}
    assert {name for name in sources if name.endswith((".py", ".h", ".cc"))} <= names
    assert {"pyproject.toml", "setup.py", "aib_tf/ops/nearest_anchor.py"} <= names
    assert [name for name in names if name.endswith((".so", "_build.json"))] == []


def test_build_environment_gets_what_compile_asks_for(tree):
    program = (
        "import sys; sys.path.insert(0, 'custom_ops'); sys.argv = ['setup.py']\n"
        "import backend, compile\n"
        "compile.required_tensorflow = lambda: ['tensorflow']\n"
        "print(backend.get_requires_for_build_wheel(), backend.get_requires_for_build_editable(),"
        " backend.get_requires_for_build_sdist())"
    )
    result = run(tree, "-c", program)
    assert result.stdout.splitlines()[-1] == "['tensorflow'] ['tensorflow'] []", result.stderr


def test_here_both_are_built_where_a_compiler_is():
    folder = pathlib.Path(aib_tf.__file__).parent / "ops"
    record = json.loads((folder / "_build.json").read_text(encoding="utf-8"))
    if any(map(shutil.which, ("c++", "g++", "clang++"))):
        assert record["library"] is not None, record["problem"]
        assert record["numpy_module"] is not None, record["problem"]
    else:
        assert "no C++ compiler" in record["problem"]
