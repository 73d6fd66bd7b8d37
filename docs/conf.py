"""Settings of Sphinx for the documentation site: ``make doc``."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
(release,) = re.findall(
    r'^__version__ = "(.+)"', (ROOT / "sb3_algd" / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE
)
version = release
project = "sb3_algd"
author = "sb3_algd contributors"
project_copyright = f"2026, {author}"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build"]
# Notebooks come with their outputs; the tests run them
nb_execution_mode = "off"

# Pages are read on GitHub as well: the same formulas, and links to headings as GitHub names them
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_class_signature = "mixed"
# The pages of the zoo and of the safety tasks can be built without the extras
autodoc_mock_imports = [
    package
    for package in ("rl_zoo3", "optuna", "sqlalchemy", "huggingface_sb3", "safety_gymnasium", "mujoco", "matplotlib")
    if importlib.util.find_spec(package) is None
]

html_theme = "furo"
html_title = f"sb3_algd {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
copybutton_exclude = ".linenos, .gp, .go"
# GitHub shows a level that is left out as well
suppress_warnings = ["myst.header"]
