"""How Sphinx builds the documentation: `make docs`."""

import builtins
import pkgutil
import sys
from importlib.metadata import version as installed_version

from docutils import nodes
from docutils.nodes import Element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PyXRefRole
from sphinx.environment import BuildEnvironment

project = "portico"
author = "the portico authors"
copyright = f"2026, {author}"
version = release = installed_version("portico")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"portico {release}"

# `name` in a docstring is the name of something; it links where the documentation has an entry.
default_role = "name"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

LIBRARY = "https://docs.python.org/3/library"


class NameRole(PyXRefRole):
    """A name in single backticks: a link where there is an entry, plain code where none is."""

    def process_link(
        self,
        env: BuildEnvironment,
        refnode: Element,
        has_explicit_title: bool,
        title: str,
        target: str,
    ) -> tuple[str, str]:
        """Make a reference to any Python object, which may stay unresolved."""
        title, target = super().process_link(env, refnode, has_explicit_title, title, target)
        refnode["refdomain"], refnode["reftype"] = "py", "obj"
        refnode["portico-optional"] = True
        return title, target.removesuffix("()")


def leave_colons_alone(
    app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]
) -> None:
    """Keep napoleon from reading the words before a colon as the type of an attribute.

    It looks for one in the first line only, so an empty comment takes that place.
    """
    del app, name, value, options
    if what in {"attribute", "data", "property"}:
        lines[:0] = ["..", ""]


def resolve_missing(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> Element | None:
    """Link a name of the standard library, after looking that it is there.

    Sphinx's own way, intersphinx, needs the network at every build.
    """
    del app, env
    if node.get("refdomain") == "py":
        target = node["reftarget"]
        page = standard_library_page(target)
        if page is not None:
            reference = nodes.reference("", "", internal=False, refuri=page)
            reference.append(content)
            return reference
        # A private name, such as a type variable, has no entry, and needs none.
        if node.get("portico-optional") or target.rpartition(".")[2].startswith("_"):
            return content
    return None


def standard_library_page(name: str) -> str | None:
    """The place that documents a name such as ``socket.socket.bind``; None when there is none."""
    if name in sys.stdlib_module_names:
        return f"{LIBRARY}/{name}.html#module-{name}"
    if hasattr(builtins, name):
        value = getattr(builtins, name)
        is_error = isinstance(value, type) and issubclass(value, BaseException)
        page = "exceptions" if is_error else "stdtypes" if isinstance(value, type) else "constants"
        return f"{LIBRARY}/{page}.html#{name}"
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError):
        return None
    # The longest part of the name that is a module has the page.
    module = name.rpartition(".")[0]
    while module not in sys.modules:
        module = module.rpartition(".")[0]
    is_standard = module.partition(".")[0] in sys.stdlib_module_names
    return f"{LIBRARY}/{module}.html#{name}" if is_standard else None


def setup(app: Sphinx) -> None:
    """Register what is defined above."""
    app.add_role("name", NameRole(innernodeclass=nodes.literal))
    app.connect("autodoc-process-docstring", leave_colons_alone, priority=400)
    app.connect("missing-reference", resolve_missing)
