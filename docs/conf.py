# SPDX-License-Identifier: Apache-2.0
# Sphinx settings, after upstream's: MyST pages with autodoc. Built by `make docs`.

import re
from importlib import metadata

from emerging_optimizers.adaptive_muon.options import Options, options_of


project = "emerging-optimizers-adaptive-muon"
author = "The project's contributors"
version = release = metadata.version(project)

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinxcontrib.katex",
]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
html_theme = "furo"
html_title = "Adaptive Muon"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# The integrations' pages need their docstrings only.
autodoc_mock_imports = ["megatron", "nemo", "nemo_automodel", "lightning", "omegaconf", "transformers"]
autodoc_member_order = "bysource"
napoleon_use_ivar = True
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 4

# Browsers draw MathML themselves; KaTeX's HTML would need its style sheet from the network.
katex_options = "output: 'mathml'"


def leave_out_options(app, what, name, obj, options, lines):
    # The page's table has them, from the same record.
    if name.endswith(".AdaptiveMuon"):
        names = "|".join(option.name for option in options_of(Options))
        text = re.sub(
            rf"(?:^    (?:{names}): .*\n(?:^ {{8}}.*\n)*)+",
            "    **options: The options of the table above.\n",
            "\n".join(lines),
            flags=re.M,
        )
        lines[:] = text.split("\n")


def setup(app):
    app.connect("autodoc-process-docstring", leave_out_options, priority=400)  # before napoleon's 500
