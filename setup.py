import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# Read, not imported: nothing that the package needs is installed yet
INIT = (ROOT / "sb3_algd" / "__init__.py").read_text(encoding="utf-8")
(VERSION,) = re.findall(r'^__version__ = "(.+)"', INIT, re.MULTILINE)
# Package: folder. Both are data of sb3_algd.zoo
DATA = {"sb3_algd.zoo.zoo_configs": "zoo_configs", "sb3_algd.zoo.trained_agents": "trained_agents"}

# Where the project is published; none is known before it is
REPOSITORY = "".join(
    re.findall(r'^repository-code: "(.+)"', (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
)

SAFETY = [
    # What safety-gymnasium needs at import through our adapter. The package itself is missing on purpose: its only release
    # pins gymnasium==0.28.1, mujoco==2.3.3 and pygame==2.1.0, which no resolver can install beside Stable-Baselines3 2.9.
    # It works when it is installed alone, `pip install --no-deps safety-gymnasium==1.0.0`.
    # Before 1.1.1 a Dict space sorts its keys, and observations had another order
    "gymnasium[mujoco]>=1.1.1,<2",
    # Tested with 3.1.0, 3.17.0 and 4.0.0
    "mujoco>=3.1,<4.1",
    "xmltodict>=0.13",
    "pyyaml>=6.0",
    "imageio>=2.27",
]
ZOO = [
    "rl_zoo3>=2.9,<3",
    # With Trial.set_constraint
    "optuna>=5.0",
    # rl_zoo3 imports these without declaring them: requests in enjoy, pandas in the report of an optimisation, the next three
    # in its plots, tensorboard for -tb and --track.
    "requests",
    "pandas",
    "seaborn",
    "scipy",
    "matplotlib>=3.8",
    "tensorboard>=2.9.1",
    # The window in which Gymnasium shows what enjoy plays
    "pygame>=2.1.3",
    # What push_to_hub uploads beside the zip
    "safetensors>=0.4",
]
# Exporting needs all of them, playing an exported policy only onnxruntime
DEPLOY = [
    "onnx>=1.17",
    "onnxscript>=0.5",
    "onnxruntime>=1.20",
    "safetensors>=0.4",
]
# Runs of sb3-algd compare on several machines
CLUSTER = [
    "distributed>=2024.8",
]
DOCS = [
    "sphinx>=8",
    # With myst-parser; shows notebooks
    "myst-nb>=1.3",
    "furo",
    "sphinx-copybutton",
]
TESTS = [
    "pytest>=8",
    "pytest-cov",
    "pytest-xdist",
    # Values of arguments
    "hypothesis>=6.100",
    # Tuning with a database
    "psycopg[binary]>=3.2",
    "pymysql>=1.1",
    "mypy>=1.9",
    "ruff>=0.9",
    "black>=26.1",
    "types-pyyaml",
    "types-tqdm",
    "sb3-contrib>=2.9,<3",
    "matplotlib>=3.8",
    "pyyaml>=6.0",
    # Statistics of the benchmarks
    "scipy>=1.15",
    "tensorboard>=2.9.1",
    # SB3's progress bar
    "tqdm",
    "rich",
    *CLUSTER,
    # The notebooks of the documentation
    "nbclient>=0.10",
    "ipykernel>=6",
    # What is uploaded
    "build",
    "setuptools>=77",
    "twine>=6",
]
EXTRAS = {"safety": SAFETY, "zoo": ZOO, "deploy": DEPLOY, "cluster": CLUSTER, "docs": DOCS, "tests": TESTS}


def long_description() -> str:
    """:return: The README, with links to the published repository: a package index shows it elsewhere."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if REPOSITORY:
        text = re.sub(r"(!\[[^]]*]\()(?!https?:)", rf"\1{REPOSITORY}/raw/main/", text)
        text = re.sub(r"(]\()(?!https?:|#)", rf"\1{REPOSITORY}/blob/main/", text)
    return text


def project_urls() -> dict[str, str]:
    """:return: Links that a package index shows."""
    urls = {"Paper": "https://arxiv.org/abs/2602.02924"}
    if REPOSITORY:
        urls.update(Homepage=REPOSITORY, Issues=f"{REPOSITORY}/issues", Changelog=f"{REPOSITORY}/blob/main/CHANGELOG.md")
    return urls


setup(
    name="sb3_algd",
    version=VERSION,
    description="Safe reinforcement learning with diffusion policies (ALGD) for Stable-Baselines3",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author="sb3_algd contributors",
    license_expression="MIT",
    license_files=["LICENSE"],
    keywords="safe-reinforcement-learning constrained diffusion-policy stable-baselines3 gymnasium pytorch",
    # Alone, because importing it must not import the package, which needs PyTorch
    py_modules=["sb3_algd_runtime"],
    packages=[*find_packages(include=["sb3_algd", "sb3_algd.*"]), *DATA],
    # What users want to find and edit is at the top of the repository; installed, it is part of the package
    package_dir=DATA,
    package_data={"sb3_algd": ["py.typed"], **{package: ["**/*"] for package in DATA}},
    entry_points={"console_scripts": ["sb3-algd = sb3_algd.cli:main"]},
    python_requires=">=3.10",
    install_requires=[
        "stable-baselines3>=2.9,<3",
        # Stable-Baselines3 brings these three; the bounds are the ones that our own code needs.
        "torch>=2.8,<3",
        "gymnasium>=1.0,<2",
        "numpy>=1.26,<3",
        # Settings of sb3-algd compare
        "pyyaml>=6.0",
    ],
    extras_require={**EXTRAS, "all": sorted({package for packages in EXTRAS.values() for package in packages})},
    project_urls=project_urls(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
