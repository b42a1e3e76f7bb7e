"""Installs Lathe: `make setup`, or `pip install -c constraints.txt -e .` in an environment of your own."""

from pathlib import Path

from setuptools import find_packages, setup

ROOMS = ["engine", "models", "data", "checkpoint_tools", "examples"]
README = Path(__file__).parent / "README.md"

setup(
    name="lathe",
    version="0.1.0",
    description="Exact Megatron-style parallel finetuning of language models, one CPU to thousands of GPUs",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The Lathe authors",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=[pattern for room in ROOMS for pattern in (room, f"{room}.*")]),
    package_data={
        "data.preparation": ["*.css"],
        "engine.reporting": ["*.css"],
        "examples": ["chat_templates/*", "prompts/*", "recipes/*"],
        "examples.demo": ["*.json"],
    },
    entry_points={"console_scripts": ["lathe = examples.lathe:main"]},
    # Exact where a minor version breaks us, ranges elsewhere; constraints.txt says what was tested.
    install_requires=[
        "torch>=2.11,<2.14",
        "megatron-core==0.16.1",
        "transformers>=5.17,<6",
        "tokenizers>=0.22",
        "sentencepiece>=0.2",
        "protobuf>=4",
        "huggingface-hub>=1.0",
        "datasets>=4.0",
        "pyarrow>=18",
        "safetensors>=0.6",
        "numpy>=2.0",
        "xxhash>=3.5",
        "jinja2>=3.1",
        "tyro>=1.0,<2",
        "pyyaml>=6.0",
        "rich>=14",
        "tensorboard>=2.19",
        "psutil>=6.0",
        "math-verify>=0.8",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]>=2.10,<2.13"],
        "eval": ["vllm"],
        "track": ["wandb>=0.20"],
        "bench": ["trl==1.16.*", "accelerate>=1.10", "liger-kernel>=0.5"],
        "dev": [
            "pytest>=8.3",
            "pytest-xdist>=3.8",
            "hypothesis>=6.130",
            "ruff",
            "mypy",
            "types-PyYAML",
            "pre-commit>=4.0",
        ],
    },
)
