"""The package list: `stare_megatron` with its subpackages and the text of docs/ and examples/ that its commands print;
`patches/` as `stare_megatron_patches`.

pyproject.toml cannot say both "find these" and "and this one, under another name"; everything else is there.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["stare_megatron*"]),
        "stare_megatron.docs",
        "stare_megatron.examples",
        "stare_megatron_patches",
    ],
    package_dir={
        "stare_megatron.docs": "docs",
        "stare_megatron.examples": "examples",
        "stare_megatron_patches": "patches",
    },
)
