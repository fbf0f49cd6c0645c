# SPDX-License-Identifier: Apache-2.0
"""Packaging of the overlay: installs ``emerging_optimizers/adaptive_muon/`` beside upstream's own files."""

import tomllib
from pathlib import Path
from tempfile import TemporaryDirectory

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
# Folders that commands write. One of them may be within the package.
WRITTEN = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["extend-exclude"]
# A wheel holds all that is in its build directory. In build/ there may be modules of an earlier version.
BUILD = TemporaryDirectory()

MEGATRON = ["megatron-core>=0.18.2,<0.21", "psutil"]
NEMO = ["nemo-toolkit[core,asr]>=2.7,<4"]
AUTOMODEL = ["nemo-automodel>=0.7,<0.8"]
HUGGINGFACE = ["transformers>=5,<6", "accelerate>=1.1"]
TEST = ["pytest>=8", "pytest-xdist>=3.7", "hypothesis>=6.100", "numpy", "ruff>=0.9.9", "mypy>=1.13"]
TEST += ["codespell>=2.4", "build", "setuptools", "wheel"]
DOCS = ["sphinx>=8.1", "myst-parser>=4.0", "sphinx-copybutton>=0.5.2", "sphinxcontrib-katex>=0.9.11", "furo"]
DEMO = ["tqdm", "matplotlib"]

setup(
    name="emerging-optimizers-adaptive-muon",
    version="0.1.0",
    description="Adaptive Muon with AdaMuon, NorMuon, NAMO and NAMO-D second moments, for NVIDIA's emerging_optimizers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["muon", "namo", "adamuon", "normuon", "optimizer", "pytorch", "megatron", "nemo"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.12",
    # Upstream owns emerging_optimizers/__init__.py. Only our sub-packages are named, so no wheel or editable install
    # of ours can ever replace that file.
    packages=[
        f"emerging_optimizers.{name}"
        for name in find_packages(
            str(ROOT / "emerging_optimizers"),
            include=["adaptive_muon", "adaptive_muon.*", "adaptive_muon_discovery"],
            exclude=[pattern for name in WRITTEN for pattern in (f"*.{name}", f"*.{name}.*")],
        )
    ],
    options={"build": {"build_base": BUILD.name}},
    # How NeMo knows adaptive_muon without a line of code: Lightning calls it in every Trainer.
    entry_points={
        "lightning.pytorch.callbacks_factory": [
            "adaptive_muon = emerging_optimizers.adaptive_muon_discovery:lightning_callbacks"
        ]
    },
    package_data={"emerging_optimizers.adaptive_muon": ["py.typed"]},
    install_requires=["torch>=2.6", "absl-py", "emerging-optimizers>=0.3,<0.6"],
    extras_require={
        "megatron": MEGATRON,
        "nemo": NEMO,
        "automodel": AUTOMODEL,
        "huggingface": HUGGINGFACE,
        "test": TEST + DEMO,
        "docs": DOCS,
        "demo": DEMO,
    },
)
