"""llama-server's web page, which npm builds from the pinned source while llama.cpp is compiled."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from .shell import BuildError, error_line

CHOICES = ("auto", "on", "off")
_FOLDER = Path("tools", "ui")
_FAILURE = re.compile(r"^-- UI: (npm .*(?:failed|missing).*)$", re.MULTILINE)


class Page:
    """The page of one build folder.

    Attributes:
        is_wanted: whether CMake is to let npm build it.
    """

    def __init__(self, choice: str, build: Path) -> None:
        """Decide.

        Args:
            choice: one of CHOICES; ``auto`` is ``on`` where npm is on PATH, or where the page is built already.
            build: CMake's folder.

        Raises:
            BuildError: the page must be there, and npm is not.
        """
        self._folder = build / _FOLDER
        can_have = shutil.which("npm") is not None or self._is_built()
        if choice == "on" and not can_have:
            raise BuildError("npm not found on PATH; install Node.js 20.19 or later, or leave the page out: --ui off")
        self.is_wanted = choice != "off" and can_have
        self._is_required = choice == "on"
        self._why_not = "--ui off" if choice == "off" else "npm is not on PATH"
        if not self.is_wanted:  # CMake takes what is there, however it came there
            shutil.rmtree(self._folder / "dist", ignore_errors=True)

    def _is_built(self) -> bool:
        return (self._folder / "dist" / "index.html").exists()

    def take(self, build: Path) -> None:
        """Take the page that another CMake's folder has, if there is one: it is the same for every machine."""
        built = build / _FOLDER / "dist"
        if self.is_wanted and not self._is_built() and (built / "index.html").exists():
            shutil.copytree(built, self._folder / "dist", dirs_exist_ok=True)

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
