#!/usr/bin/env python3
"""What the kind of the calibration text matters: KL divergence on several texts, calibrated on several others.

    bench/texts.py --calibrate wt2.valid.txt --text wiki.test.raw

Makes the base without a lattice (dither.py) and TRIT2 files of it by gptq, calibrated on the text of tritconv, on the
text given, on both together, and on half as much of the first with as much that the model writes itself. They are
compared on the other text given, on modules of Python's standard library and on the dialogues of the chatterbot-corpus
package. What the same programs have made already from the same files is not made again.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import yaml

from command import exit_status
from made import make
from programs import BUILD, ROOT
from quality import make_base, run
from tritconv.calibration.bundled import PATH as BUNDLED
from tritcore.console import out
from tritcore.errors import TritError

sys.path.insert(0, str(ROOT / "models"))
from fetch import FetchError, download

_DIALOGUES = "chatterbot-corpus==1.3.3"
_MODULES = (
    "argparse",
    "ast",
    "datetime",
    "decimal",
    "difflib",
    "doctest",
    "email.message",
    "inspect",
    "pickle",
    "typing",
)


def main() -> None:
    """Make what is missing, and print a table."""
    options = _options()
    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    base, checkpoint = make_base(folder)
    half = options.tokens // 2
    given = options.calibrate
    calibrations: dict[str, list[object]] = {
        "tritconv's": ["--calibrate", BUNDLED],
        given.name: ["--calibrate", given],
        f"tritconv's and {given.name}": ["--calibrate", BUNDLED, "--calibrate", given],
        "tritconv's, half of the tokens by the model itself": ["--calib-own", half],
    }
    files = {}
    for number, (label, words) in enumerate(calibrations.items()):
        files[label] = folder / f"text-{number}.gguf"
        tokens = half if "--calib-own" in words else options.tokens
        method = ["--depth", 2, "--method", "gptq", "--embed-type", "q8_0", "--calib-tokens", tokens]
        command = ["-m", "tritconv", "hf-to-gguf", checkpoint, "--force", "-o", files[label], *method, *words]
        make([files[label]], command, [checkpoint, *(word for word in words if isinstance(word, Path))], run)
    texts = {options.text.name: options.text, "Python": folder / "python.txt", "dialogues": folder / "dialogues.txt"}
    texts["Python"].write_text(_programs(), encoding="utf-8")
    texts["dialogues"].write_text(_dialogues(), encoding="utf-8")
    found = {name: _divergences(base, path, files, options.chunks, folder) for name, path in texts.items()}
    out.print(_table(list(files), found), markup=False, soft_wrap=True)


def _programs() -> str:
    """Modules of Python's standard library, none of which is in the text of tritconv. Raises TritError."""
    sources = []
    for name in _MODULES:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            raise TritError(f"this Python has no module {name}: use another one")
        sources.append(Path(found.origin).read_text(encoding="utf-8"))
    return "\n\n".join(sources)


def _dialogues() -> str:
    """The English conversations of a package, one remark in a line. Raises TritError."""
    with tempfile.TemporaryDirectory() as name:
        try:
            wheel = download(_DIALOGUES, Path(name))
        except FetchError as error:
            raise TritError(str(error)) from error
        with zipfile.ZipFile(wheel) as archive:
            members = sorted(path for path in archive.namelist() if "/english/" in path and path.endswith(".yml"))
            parts = [yaml.safe_load(archive.read(member))["conversations"] for member in members]
    conversations = [one for part in parts for one in part]
    return "\n\n".join("\n".join(f"- {remark}" for remark in one) for one in conversations)


def _divergences(base: Path, text: Path, files: Mapping[str, Path], chunks: int, folder: Path) -> dict[str, str]:
    """Mean KL divergence of each file from the base, on a text. Raises TritError."""
    report = folder / f"on-{text.stem}.json"
    run(
        [
            *("-m", "tritrun", "compare", "--base", base, "--text", text, "--work", folder / f"work-{text.stem}"),
            *("--chunks", chunks, "--no-speed", "--json", report),
            *(f"{label}={path}" for label, path in files.items()),
        ]
    )
    rows = json.loads(report.read_text(encoding="utf-8"))["models"]
    means = {row["label"]: row["divergence"]["mean"] for row in rows if row["divergence"]}
    return {label: f"{means[label]['value']:.4f} ± {means[label]['error']:.4f}" for label in files}


def _table(files: list[str], found: Mapping[str, Mapping[str, str]]) -> str:
    lines = [f"| calibrated on | {' | '.join(found)} |", f"|{'---|' * (len(found) + 1)}"]
    lines += [f"| {' | '.join([name, *(figures[name] for figures in found.values())])} |" for name in files]
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", type=Path, required=True, metavar="FILE", help="a text to calibrate on")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="another text, to evaluate on")
    parser.add_argument("--tokens", type=int, default=65536, metavar="N", help="to calibrate on (default: %(default)s)")
    parser.add_argument("--chunks", type=int, default=24, metavar="N", help="of 512 tokens (default: %(default)s)")
    parser.add_argument("--output", "-o", type=Path, default=BUILD / "bench" / "texts", metavar="FOLDER")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_status(main))
