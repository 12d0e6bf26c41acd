"""Package metadata of megamult: supported ranges here, tested pins in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).with_name("README.md")

setup(
    name="megamult",
    version="0.1.0",
    description="Learnable row and column multipliers for matrix layers, on Megatron-Core and DeepSpeed",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["megamult", "megamult.*"]),
    package_data={"megamult": ["py.typed"]},
    python_requires=">=3.11",
    # No Apex: torch's fused kernels do its work, and the `apex` of the package index is another project.
    install_requires=[
        "torch>=2.7.1,<3",  # before: process groups that are bound to their GPU hang (pytorch issue 153960)
        # One minor version each: we rely on how ZeRO hands gradients and partitions to a client optimizer...
        "deepspeed>=0.19.8,<0.20",
        # ... and on how Megatron's layers shard; 0.17 needs Python 3.12.
        "megatron-core>=0.16.1,<0.17",
        "numpy>=1.26",
        "sentencepiece>=0.2,<0.3",
        "tokenizers>=0.21,<0.24",
        "jsonargparse[signatures]>=4.49,<5",
        "PyYAML>=6",
        "safetensors>=0.5",
        "tensorboard>=2.15",
        "tqdm>=4.66",
        "ninja>=1.11",  # builds DeepSpeed's operators at their first use
    ],
    extras_require={
        "corpora": ["zstandard>=0.22", "pyarrow>=15"],  # inputs of prepare_data.py: zstd, Parquet
        "export": ["transformers>=5,<6", "protobuf>=4"],
        "wandb": ["wandb>=0.27,<1"],  # monitor.wandb
        "reproduce": ["matplotlib>=3.8,<4"],
        "test": [
            *("pytest>=8", "pytest-xdist>=3.8", "hypothesis>=6.100"),
            *("ruff>=0.12", "mypy>=1.15", "types-PyYAML"),
            *("transformers>=5,<6", "protobuf>=4", "matplotlib>=3.8,<4"),
            *("zstandard>=0.22", "pyarrow>=15"),
            "wandb>=0.27,<1",
            "triton<4",  # CUDA builds of torch bring theirs; interprets and compiles kernels without a GPU
        ],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
