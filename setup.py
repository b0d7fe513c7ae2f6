"""Puts recipes/ and launch/ into wheels, as nlscale/share; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHARED = ("recipes", "launch")
OF_A_CLONE = ("install.sh", "quickstart.sh")


class build_with_share(build_py):
    """An installation in place reads these folders where they stand."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder in SHARED:
                target = Path(self.build_lib, "nlscale", "share", folder)
                shutil.rmtree(target, ignore_errors=True)  # of an earlier build
                shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*OF_A_CLONE))


setup(cmdclass={"build_py": build_with_share})
