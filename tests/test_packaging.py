"""The package declares what it imports, and the lock files pin what it declares."""

import ast
import importlib.metadata
import pathlib
import re
import subprocess
import sys

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import aib_tf

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
RUNTIME = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
DEVELOPMENT = [Requirement(line) for line in PROJECT["dependency-groups"]["dev"]]

LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
PYTHONS_OF_LOCK = {
    "docs.txt": range(10, 14),
    "lock.txt": range(10, 14),
    "jax.txt": range(10, 14),
    "loaders.txt": range(10, 14),
    "oldest.txt": range(10, 13),
}

# Import name -> name on the package index, where they differ.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "absl": "absl-py",
    "grpc": "grpcio",
    "sklearn": "scikit-learn",
    "tensorflow_serving": "tensorflow-serving-api",
    "yaml": "pyyaml",
}
# Needed without being imported by name.
INDIRECT = {"tensorboard": "tf.summary", "importlib-resources": "TensorFlow Datasets, when it downloads"}


def pins(lock, minor):
    """Returns name -> version of what a lock file installs with Python 3.<minor> on Linux."""
    environment = default_environment() | {
        "python_version": f"3.{minor}",
        "python_full_version": f"3.{minor}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
    }
    found = {}
    for line in (ROOT / "requirements" / lock).read_text(encoding="utf-8").splitlines():
        if line[:1] not in ("", " ", "#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate(environment):
                name = canonicalize_name(requirement.name)
                assert name not in found, f"{lock} pins {name} twice for Python 3.{minor}"
                (specifier,) = requirement.specifier
                assert specifier.operator == "==", f"{lock}: {line} is no exact version"
                found[name] = specifier.version
    return found


def imported_distributions(folder):
    """Returns distribution -> a file that imports it, of all third parties, for a folder."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            else:
                continue
            for module in (name.partition(".")[0] for name in modules):
                own = module == "aib_tf" or (ROOT / folder / f"{module}.py").exists()
                if module not in sys.stdlib_module_names and not own:
                    found[DISTRIBUTIONS.get(module, module.replace("_", "-"))] = path
    return found


def test_installed_version_is_the_one_of_the_source():
    assert importlib.metadata.version("aib-tf") == aib_tf.__version__


def test_installed_requirements_are_the_declared_ones():
    installed = [Requirement(line) for line in importlib.metadata.requires("aib-tf")]
    assert {str(requirement) for requirement in installed} == {str(each) for each in RUNTIME}


def test_every_import_of_the_library_and_the_scripts_is_declared():
    declared = {canonicalize_name(requirement.name) for requirement in RUNTIME}
    used = imported_distributions("aib_tf") | imported_distributions("scripts")
    assert {name: path for name, path in used.items() if name not in declared} == {}


def test_every_declared_dependency_is_used():
    used = imported_distributions("aib_tf") | imported_distributions("scripts") | INDIRECT
    assert {canonicalize_name(requirement.name) for requirement in RUNTIME} - used.keys() == set()


def test_every_lock_is_checked_here():
    assert [path.name for path in LOCKS] == sorted(PYTHONS_OF_LOCK)


@pytest.mark.parametrize("lock", ["lock.txt", "oldest.txt"])
def test_lock_satisfies_what_is_declared(lock):
    for minor in PYTHONS_OF_LOCK[lock]:
        pinned = pins(lock, minor)
        for requirement in RUNTIME + DEVELOPMENT:
            marker = requirement.marker
            if marker and not marker.evaluate({"python_version": f"3.{minor}"}):
                continue
            name = canonicalize_name(requirement.name)
            assert name in pinned, f"{lock} has no {name} for Python 3.{minor}; run `make lock`"
            assert requirement.specifier.contains(pinned[name]), (
                f"{lock} has {name} {pinned[name]} for Python 3.{minor}, declared is {requirement}"
            )


def test_build_requirements_are_development_requirements_too():
    """So that the package builds with `--no-build-isolation` in an environment made from a lock."""
    declared = {canonicalize_name(requirement.name): requirement for requirement in DEVELOPMENT}
    for requirement in map(Requirement, PROJECT["build-system"]["requires"]):
        (bound,) = declared[canonicalize_name(requirement.name)].specifier
        assert requirement.specifier.contains(bound.version)


def test_oldest_lock_has_the_lower_bound_of_every_runtime_dependency():
    for minor in PYTHONS_OF_LOCK["oldest.txt"]:
        pinned = pins("oldest.txt", minor)
        for requirement in RUNTIME:
            (bound,) = [each for each in requirement.specifier if each.operator == ">="]
            version = pinned[canonicalize_name(requirement.name)]
            assert bound.contains(version)
            assert re.fullmatch(re.escape(bound.version) + r"(\.0)*", version), (
                f"oldest.txt has {requirement.name} {version}, the bound is {bound}"
            )


def test_jax_lock_adds_to_the_main_lock_without_overriding_it():
    for minor in PYTHONS_OF_LOCK["jax.txt"]:
        added = pins("jax.txt", minor)
        assert {"jax", "jaxlib"} <= added.keys()
        assert added.keys() & pins("lock.txt", minor).keys() == set()


def test_loaders_lock_has_openvino_and_the_oldest_tensorflow_of_each_python():
    for minor in PYTHONS_OF_LOCK["loaders.txt"]:
        pinned = pins("loaders.txt", minor)
        assert "openvino" in pinned
        if minor in PYTHONS_OF_LOCK["oldest.txt"]:
            oldest = pins("oldest.txt", minor)["tensorflow"]
            assert pinned["tensorflow"].rpartition(".")[0] == oldest.rpartition(".")[0]


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_lock_names_no_address_and_no_index(path):
    text = path.read_text(encoding="utf-8")
    assert "://" not in text
    assert re.findall(r"^\s*(?:-f|-i|--\S*index\S*|--find-links).*", text, re.MULTILINE) == []


def test_version_is_read_without_importing_the_package(tmp_path):
    (tmp_path / "aib_tf").mkdir()
    source = f'__version__ = "{aib_tf.__version__}"\nraise SystemExit("imported")\n'
    (tmp_path / "aib_tf" / "__init__.py").write_text(source, encoding="utf-8")
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "README.md").touch()
    command = [sys.executable, "setup.py", "--quiet", "--version"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == aib_tf.__version__
