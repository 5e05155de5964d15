#!/usr/bin/env python3
"""Build the patched llama.cpp and install llama-cpp-python over its libraries.

Steps: fetch the pinned source distribution, verify it, unpack it, patch it, configure, build, install.
Every step does nothing where its result is there already. Needs Python 3.10+, a C/C++ compiler and git;
cmake, ninja, scikit-build-core and poetry-core come by pip.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llamabuild import compile as compiling
from llamabuild import portable, source, toolchain, versions, vulkan
from llamabuild.page import CHOICES, Page
from llamabuild.shell import BuildError
from llamabuild.wheels import Wheels

HERE = Path(__file__).resolve().parent

EXAMPLES = """\
examples:
  python vendor/llama.cpp-patch/build.py                 build and install into this interpreter's environment
  python vendor/llama.cpp-patch/build.py --check-patch   does the series still apply?
  python vendor/llama.cpp-patch/build.py --target test-backend-ops
"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--build-dir",
        type=Path,
        default=HERE.parent.parent / "build",
        help="everything made lands here (default: build)",
    )
    parser.add_argument(
        "--sdist", type=Path, help="use this source distribution instead of fetching it; it is verified"
    )
    parser.add_argument("--patch-dir", type=Path, default=HERE, help="folder with series, patches/ and files/")
    parser.add_argument(
        "--python",
        type=Path,
        default=Path(sys.executable),
        help="interpreter of the environment to install into",
    )
    parser.add_argument(
        "--jobs", type=int, default=cpus(), help="compile this many files at once (default: %(default)s)"
    )
    parser.add_argument(
        "--cpu",
        choices=("all", "native"),
        default="all",
        help="all: the CPU code in a variant for each family of CPUs, the best that runs is loaded; "
        "native: in one for this machine alone, which builds faster (default: %(default)s)",
    )
    parser.add_argument("--cuda", action="store_true", help="build the CUDA backend too (needs the CUDA toolkit)")
    parser.add_argument(
        "--cuda-architectures",
        default="",
        metavar="LIST",
        help="with --cuda: what to compile for, such as 89-real or 80;90 (default: ggml's CMakeLists.txt chooses)",
    )
    parser.add_argument(
        "--vulkan",
        choices=vulkan.CHOICES,
        default="auto",
        help="build the Vulkan backend too; auto: where glslc, the headers and the loader are (default: %(default)s)",
    )
    parser.add_argument(
        "--ui",
        choices=CHOICES,
        default="auto",
        help="llama-server's web page, by npm, which fetches what it needs; auto: where npm is, and the server goes "
        "without it if npm fails (default: %(default)s)",
    )
    parser.add_argument(
        "--dist",
        type=Path,
        metavar="DIR",
        help="instead of installing, make wheels here that run on other machines, with trit-gguf and checksums",
    )
    parser.add_argument(
        "--cross", choices=("aarch64",), help="for Linux on another architecture, with its cross compiler"
    )
    parser.add_argument("--target", action="append", help="build only this target, and do not install; may be repeated")
    stop = parser.add_mutually_exclusive_group()
    stop.add_argument("--check-patch", action="store_true", help="only check that the series applies; keep nothing")
    stop.add_argument("--source-only", action="store_true", help="stop after patching")
    stop.add_argument(
        "--is-current",
        type=Path,
        metavar="DIR",
        help="exit with 0 if this folder has the wheels of this commit for this machine, else with 1",
    )
    stop.add_argument(
        "--python-only",
        action="store_true",
        help="compile nothing: install the Python parts (gguf, conversion, bindings), unless a build of this source is "
        "installed already",
    )
    options = parser.parse_args(arguments)
    if options.cross and options.dist is None and not options.target:
        parser.error("what --cross makes cannot be installed here: give --dist")
    if options.dist is not None and (options.cpu == "native" or options.cuda or options.target):
        parser.error("--dist makes wheels for every CPU: leave out --cpu native, --cuda and --target")
    return options


def cpus() -> int:
    """Return the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def build(options: argparse.Namespace) -> None:
    """Run the steps that the options ask for."""
    folder: Path = options.build_dir.resolve()
    patches = source.PatchSet(options.patch_dir)
    if options.sdist is not None:
        source.verify(sdist := options.sdist)
    else:
        sdist = source.fetch(folder / "download", options.python)
    if options.check_patch:
        source.check(sdist, patches, folder)
        print(f"the series applies to {source.PACKAGE} {source.VERSION}: {len(patches.series())} patches")
        return

    changed = source.prepare(sdist, patches, folder / "src")
    print(f"source: {folder / 'src'} ({len(changed)} files changed)")
    if options.source_only:
        return
    wanted = versions.read()
    place = folder / options.cross if options.cross else folder
    wheels = Wheels(wanted, folder / "src", place / "cmake" / "bin", place / "wheel", options.python)
    if options.python_only:
        done = "installed" if wheels.install_python(patches.key()) else "already installed"
        print(f"{source.PACKAGE} without libraries, and gguf: {done} for {options.python}")
        return

    machine = toolchain.cross(options.cross) if options.cross else toolchain.this_machine()
    flags: tuple[str, ...] = ()
    if options.cpu == "native":
        isa = toolchain.probe(machine.compilers.c)
        flags = isa.extra_flags
        print(f"instruction sets announced: {' '.join(isa.announced) or 'baseline'}")
        print(f"flags: native{' ' + ' '.join(flags) + ' (AMX does not work when executed)' if flags else ''}")
    else:
        print("instruction sets: all variants")

    no_vulkan = "not for another machine"
    if not options.cross:
        no_vulkan = vulkan.why_not(options.vulkan, machine.compilers.cxx, cuda=options.cuda)
    print(f"Vulkan: {f'off ({no_vulkan})' if no_vulkan else 'on'}")
    page = Page(options.ui, place / "cmake", folder / "cmake" if options.cross else None)
    tree = folder / "src" / source.LLAMA_CPP
    header = tree / "cmake" / "old-libstdcxx.h" if sys.platform == "linux" else None
    work = compiling.Build(place / "cmake", folder, options.python, machine.compilers, flags, header)
    work.configure(
        tree,
        [
            *machine.cmake,
            *compiling.options(
                all_variants=options.cpu == "all",
                cuda=options.cuda,
                vulkan=not no_vulkan,
                commit=wanted.label,
                cuda_architectures=options.cuda_architectures,
                ui=page.is_wanted,
            ),
        ],
    )
    work.compile(options.target or compiling.TARGETS, options.jobs)
    if options.target:
        return
    print(page.finish(work.log.read_text(encoding="utf-8")))
    if options.dist is not None:
        made = portable.make(options.dist, wheels, patches.key(), machine, work.variants())
        print(f"{options.dist}: {', '.join(path.name for path in made) or 'nothing has changed'}")
        return
    done = "installed" if wheels.install(patches.key()) else "already installed"
    print(f"{source.PACKAGE} and gguf: {done} for {options.python}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = parse(arguments)
    if options.is_current is not None:
        return 0 if portable.is_current(options.is_current) else 1
    try:
        build(options)
    except (BuildError, OSError) as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("build.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
