"""What griffe, which reads the docstrings for the site, does not know of their style and of Keras."""

import re
import textwrap

import griffe

_SECTION = re.compile(
    r"^(Call arguments|Example|Layouts|Reference|Returns|Yields):\n((?:[ ]{4}.*\n|\n)*[ ]{4}.*)", re.MULTILINE
)
# An entry: a name and what it is.
_ENTRY = re.compile(r"^(\w+): ", re.MULTILINE)


# Keras defines what they do, and calls them.
_METHODS_OF_KERAS = ("build", "call", "compute_output_shape", "compute_output_spec", "from_config", "get_config")


class Docstrings(griffe.Extension):
    """Brings sections into Markdown that griffe does not know or lays out badly, and leaves out Keras's methods."""

    def on_instance(self, *, obj, **kwargs):
        """Called for every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = _SECTION.sub(_as_markdown, obj.docstring.value)

    def on_class_members(self, *, cls, **kwargs):
        """Called for every class when its members are known."""
        for name in _METHODS_OF_KERAS:
            cls.members.pop(name, None)


def _as_markdown(match):
    title, body = match[1], textwrap.dedent(match[2]).strip("\n")
    if title == "Example":
        body = f"```{'pycon' if body.startswith('>>>') else 'python'}\n{body}\n```"
    elif title == "Call arguments":
        body = _ENTRY.sub(r"- **`\1`** – ", body)
    return f"**{title}:**\n\n{body}\n"
