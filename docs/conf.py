"""Sphinx's configuration of the manual; `make docs` builds it into build/docs."""

from __future__ import annotations

import re
import types
from importlib import import_module
from importlib.metadata import version as installed_version
from typing import TYPE_CHECKING

from sphinx.util import logging

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

# The packages of the reference; each name that they export must be in it.
API = ["", *(f".{name}" for name in (
    "handoff", "iommufd", "kexec", "kho", "kvm", "network", "probe", "update", "vfio", "vm",
))]  # fmt: skip

project = "pyluo"
version = release = installed_version("pyluo")
project_copyright = "the pyluo authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_argparse_cli"]
exclude_patterns = ["*.py"]
nitpicky = False

myst_heading_anchors = 3
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]
napoleon_use_ivar = True
add_module_names = False

html_theme = "furo"
html_title = f"pyluo {version}"
html_static_path = ["static"]
html_copy_source = False


def setup(app: Sphinx) -> None:
    """Connect what Sphinx calls while it reads the pages."""
    app.connect("source-read", _link_to_the_pages_of_examples)
    app.connect("env-check-consistency", _warn_of_what_is_not_in_the_reference)


def _link_to_the_pages_of_examples(app: Sphinx, name: str, source: list[str]) -> None:
    """Replace links to the folders of examples, for whoever reads the manual in the repository."""
    source[0] = re.sub(
        r"\]\(\.\./\.\./examples/(\w+)(/README\.md)?\)", r"](../examples/\1.md)", source[0]
    )


def _warn_of_what_is_not_in_the_reference(app: Sphinx, environment: BuildEnvironment) -> None:
    described = environment.domains["py"].data["objects"]
    for package in API:
        module = import_module(f"pyluo{package}")
        for name in module.__all__:
            is_module = isinstance(getattr(module, name), types.ModuleType)
            if not is_module and f"{module.__name__}.{name}" not in described:
                logging.getLogger("pyluo").warning("no page has %s.%s", module.__name__, name)
