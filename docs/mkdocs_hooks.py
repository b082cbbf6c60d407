"""What makes the site of the repository's pages, for mkdocs.yml: its links, its README and its notebook.

Pages are written to be read in the repository, where a link names a file. On the site the README is the home page, and
the notebook is a page like the others.
"""

import ast
import base64
import json
import logging
import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from mkdocs.plugins import event_priority, get_plugin_logger
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
# File of the repository -> page of the site, for those that are no Markdown in docs/.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "custom_ops/README.md": "custom_ops.md",
    "docs/tutorial.ipynb": "tutorial.md",
}
_FILES = {page: path for path, page in PAGES.items()}

_logger = get_plugin_logger("aib_tf")
# Code, which stays as it is; a link, its text and its target; or the sign that could start a tag of HTML.
_CODE_OR_LINK = re.compile(
    r"^(?P<fence>```+).*?^(?P=fence) *$|^ {4}[^\n]*$|(?P<ticks>`+)[^`].*?(?P=ticks)|"
    r"(?P<start>!?\[(?P<text>[^\[\]]*)\]\()(?P<target>[^()\s]+)\)|(?P<less><)",
    re.DOTALL | re.MULTILINE,
)


def on_startup(command, dirty):
    """Shows a build's warnings and errors alone; --quiet would also keep the warnings from --strict."""
    if command == "build":
        logging.getLogger("mkdocs").setLevel(logging.WARNING)


@event_priority(100)  # before the plugins, which read the pages
def on_files(files, config):
    """Adds the pages that are no Markdown in docs/."""
    for path, page in PAGES.items():
        source = ROOT / path
        if source.suffix == ".ipynb":
            text, pictures = _page_of_notebook(json.loads(source.read_text(encoding="utf-8")), source.stem)
            for name, content in pictures.items():
                files.append(File.generated(config, name, content=content))
        else:
            text = source.read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


@event_priority(100)
def on_page_markdown(markdown, page, config, files):
    """Leads the links of a page, which name files of the repository, to the pages of the site.

    A link to a file that is no part of the site leads into the repository that `repo_url` in mkdocs.yml names. Where
    it names none, the text of the link stays without it. The pages hold no HTML: <p, q> is an inner product, as on
    GitHub.
    """
    here = page.file.src_uri
    source = _FILES.get(here, f"docs/{here}")

    def translated(match):
        if match["less"]:
            return "&lt;"
        target = match["target"]
        if target is None or re.match(r"[a-z]+:|#|/", target):
            return match[0]
        path, hash_sign, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if path in PAGES or path.startswith("docs/"):
            path = posixpath.relpath(PAGES.get(path, path.removeprefix("docs/")), posixpath.dirname(here) or ".")
            return f"{match['start']}{path}{hash_sign}{anchor})"
        if not (ROOT / path).exists():
            _logger.warning("%s links to %s, which is not there", source, target)
        if config.repo_url:
            return f"{match['start']}{config.repo_url.rstrip('/')}/blob/HEAD/{path}{hash_sign}{anchor})"
        return match["text"]

    return _CODE_OR_LINK.sub(translated, markdown)


def on_page_content(html, page, config, files):
    """Checks that a page of the reference has all that its package exports."""
    module = re.fullmatch(r"api/(\w+)\.md", page.file.src_uri)
    if module and module[1] != "index":
        for name in _exports(ROOT / "aib_tf" / module[1]):
            if not re.search(rf'<h\d id="([\w.]+\.)?{name}"|<code>{name}</code>', html):
                _logger.warning("%s does not describe aib_tf.%s.%s", page.file.src_uri, module[1], name)


def _exports(module):
    """The names in `__all__` of a package or module, or its public definitions where it has none."""
    file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
    names = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return ast.literal_eval(node.value)
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            names.append(node.name)
    return names


def _page_of_notebook(notebook, name):
    """A notebook -> Markdown, and the pictures that it shows: name of a file -> PNG."""
    parts, pictures = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                picture = f"{name}_{len(pictures) + 1}.png"
                pictures[picture] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![what the lines above draw]({picture})")
            else:
                text = "".join(output["text"] if output["output_type"] == "stream" else data["text/plain"])
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts), pictures


def on_post_build(config):
    """Checks all links of the pages as they were written, and that none of them asks another server for anything."""
    site = Path(config.site_dir)
    pages = {path: _Page(path) for path in sorted(site.rglob("*.html"))}
    pages.pop(site / "404.html", None)  # shown at any address, so that its links start at the root of a server
    for path, page in pages.items():
        name = path.relative_to(site)
        for address in page.loaded:
            if re.match(r"(\w+:)?//", address):
                _logger.warning("%s asks another server for %s", name, address)
        for address in {*page.loaded, *page.links}:
            if re.match(r"\w+:|//", address):
                continue
            file, _, anchor = unquote(address).partition("#")
            target = (path.parent / file).resolve() if file else path
            if not target.is_file():
                _logger.warning("%s links to %s, which is not there", name, address)
            elif anchor and target in pages and anchor not in pages[target].anchors:
                _logger.warning("%s links to %s, which has no such place", name, address)


class _Page(HTMLParser):
    """What a page links to, what a browser loads for it, and the places in it that can be linked to."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.anchors = [], [], {"__top"}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs.get("id"), attrs.get("name")}
        if "src" in attrs:
            self.loaded.append(attrs["src"])
        if tag == "link" and attrs.get("rel") in ("stylesheet", "icon", "preconnect"):
            self.loaded.append(attrs["href"])
        elif tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
