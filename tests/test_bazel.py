"""The Bazel build says what custom_ops/compile.py says, where it has to say it again."""

import ast
import pathlib

OPS = pathlib.Path(__file__).resolve().parent.parent / "custom_ops"
OP = OPS / "nearest_anchor"
BUILD = ast.parse((OP / "BUILD").read_text(encoding="utf-8"))  # Starlark is a part of Python

# --force_pic in .bazelrc stands for it.
GIVEN_BY_BAZEL = {"-fPIC"}


def assigned(module, name):
    """Returns the value that a module gives to a name at its top level."""
    (value,) = [
        statement.value
        for statement in module.body
        if isinstance(statement, ast.Assign) and statement.targets[0].id == name
    ]
    return ast.literal_eval(value)


def test_bazel_compiles_with_the_flags_of_compile_py():
    flags = assigned(ast.parse((OPS / "compile.py").read_text(encoding="utf-8")), "FLAGS")
    assert set(assigned(BUILD, "COPTS")) == set(flags) - GIVEN_BY_BAZEL


def test_every_rule_that_compiles_uses_these_flags():
    calls = [node for node in ast.walk(BUILD) if isinstance(node, ast.Call)]
    rules = [{each.arg: each.value for each in call.keywords} for call in calls]
    compiling = [rule for rule in rules if "srcs" in rule]
    assert len(compiling) > 0
    for rule in compiling:
        assert getattr(rule.get("copts"), "id", None) == "COPTS", ast.literal_eval(rule["name"])


def test_bazel_names_every_source_file():
    files = {path.name for path in OP.glob("*.cc")}
    named = {node.value for node in ast.walk(BUILD) if isinstance(node, ast.Constant)}
    assert files <= named
