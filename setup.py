"""What setup.cfg cannot say: the card's top-level folders ``launch`` and ``data_tools`` install under our own name.

A checkout has them at the top, and so has an editable installation (``make setup``).  A wheel puts them below
``megatron_rest/bundled``, because ``launch`` and ``data_tools`` in site-packages would hide, or be hidden by, somebody
else's; ``megatron_rest.scripts`` finds them there.
"""

import sys

from setuptools import find_namespace_packages, setup

OURS = find_namespace_packages(include=["megatron_rest", "megatron_rest.*"])
TOP = find_namespace_packages(include=["launch", "launch.*", "data_tools", "data_tools.*"])

if "editable_wheel" in sys.argv or "develop" in sys.argv:
    setup(packages=OURS + TOP)
else:
    setup(
        packages=OURS + [f"megatron_rest.bundled.{name}" for name in TOP],
        package_dir={f"megatron_rest.bundled.{name}": name for name in ("launch", "data_tools")},
    )
