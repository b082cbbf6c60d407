"""What Bazel 4 would download, written here in a few lines: the names of rules that it carries inside.

A current Bazel gets the real repositories through MODULE.bazel.
"""

def _written_repository_impl(repository_ctx):
    repository_ctx.file("WORKSPACE", 'workspace(name = "%s")\n' % repository_ctx.name)
    for path, content in repository_ctx.attr.files.items():
        repository_ctx.file(path, content)

_written_repository = repository_rule(
    implementation = _written_repository_impl,
    attrs = {"files": attr.string_dict(mandatory = True, doc = "path -> content")},
)

def _native(rules):
    return "".join(["%s = native.%s\n" % (rule, rule) for rule in rules])

_PY_RUNTIME_PAIR = """\
load("@bazel_tools//tools/python:toolchain.bzl", _py_runtime_pair = "py_runtime_pair")

py_runtime_pair = _py_runtime_pair
"""

def native_rules():
    """Defines the repositories rules_cc, rules_python, rules_java and remote_coverage_tools."""
    _written_repository(
        name = "rules_cc",
        files = {
            "cc/BUILD": "",
            "cc/defs.bzl": _native(["cc_binary", "cc_library", "cc_test", "cc_toolchain", "cc_toolchain_suite"]),
        },
    )
    _written_repository(
        name = "rules_python",
        files = {
            "python/BUILD": "",
            "python/defs.bzl": _PY_RUNTIME_PAIR + _native(["py_library", "py_runtime", "py_test"]),
        },
    )

    # Bazel reads its toolchains of Java whenever it looks for one of any language.
    _written_repository(
        name = "rules_java",
        files = {
            "java/BUILD": "",
            "java/defs.bzl": _native(["java_import", "java_runtime", "java_toolchain"]),
        },
    )

    # Every test depends on it; only `bazel coverage`, which this leaves without, would run it.
    _written_repository(
        name = "remote_coverage_tools",
        files = {"BUILD": 'filegroup(name = "coverage_report_generator", visibility = ["//visibility:public"])\n'},
    )
