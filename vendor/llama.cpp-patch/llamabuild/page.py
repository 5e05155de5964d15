"""llama-server's web page, which npm builds from the pinned source while llama.cpp is compiled."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from .shell import BuildError, error_line, run

CHOICES = ("auto", "on", "off")
NPM = {
    "npm_config_audit": "false",
    "npm_config_fund": "false",
    "npm_config_prefer_offline": "true",
    "npm_config_update_notifier": "false",
}
"""Environment variables that keep npm from asking the network for more than it needs."""

_FOLDER = Path("tools", "ui")
_FAILURE = re.compile(r"^-- UI: (npm .*(?:failed|missing).*)$", re.MULTILINE)


class Page:
    """The page of one build folder.

    Attributes:
        is_wanted: whether CMake is to let npm build it.
    """

    def __init__(self, choice: str, build: Path, other: Path | None = None) -> None:
        """Decide.

        Args:
            choice: one of CHOICES; ``auto`` is ``on`` where npm works, or where the page is built already.
            build: CMake's folder.
            other: that of a build for another machine, whose page is the same.

        Raises:
            BuildError: the page must be there, and npm does not work.
        """
        self._folder = build / _FOLDER
        self._is_required = choice == "on"
        self._why_not = "--ui off"
        if choice != "off":
            if other is not None and not self._is_built() and (other / _FOLDER / "dist").exists():
                shutil.copytree(other / _FOLDER / "dist", self._folder / "dist", dirs_exist_ok=True)
            self._why_not = "" if self._is_built() else _obstacle()
        self.is_wanted = not self._why_not
        if self._is_required and not self.is_wanted:
            raise BuildError(f"llama-server cannot have its web page: {self._why_not}")
        if not self.is_wanted:  # CMake takes what is there, however it came there
            shutil.rmtree(self._folder / "dist", ignore_errors=True)

    def _is_built(self) -> bool:
        return (self._folder / "dist" / "index.html").exists()

    def finish(self, log: str) -> str:
        """Return a line that says whether llama-server has the page, once it is linked; remove npm's 700 MB.

        Args:
            log: what the build printed.

        Raises:
            BuildError: the page must be there, and is not.
        """
        if self.is_wanted and self._is_built():
            shutil.rmtree(self._folder / "ui-src", ignore_errors=True)
            return "llama-server's web page: inside"
        why = self._why_not
        if self.is_wanted:
            *_, failure = None, *_FAILURE.finditer(log)
            why = f"{failure[1]}: {_reason(log[failure.end() :])}" if failure else "npm made none"
        if self._is_required:
            raise BuildError(f"llama-server has no web page: {why}")
        return f"llama-server's web page: none ({why})"


def _reason(output: str) -> str:
    return error_line(output).removeprefix("--").strip().removeprefix("stderr: ")


def _obstacle() -> str:
    """Why npm can build nothing here; "" if it can. Without a network it would find out after minutes."""
    npm = shutil.which("npm")
    if npm is None:
        return "npm is not on PATH; install Node.js 20.19 or later"
    try:
        run([npm, "view", "vite", "version"], env=os.environ | NPM | {"npm_config_fetch_retries": "0"})
    except BuildError as error:
        return f"{error}; check the network and npm's registry"
    return ""
