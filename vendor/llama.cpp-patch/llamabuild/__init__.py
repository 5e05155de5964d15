"""The steps that turn the pinned llama-cpp-python source into patched, installed libraries and tools.

One module a step: ``source`` (fetch, verify, patch), ``toolchain`` (compilers and instruction sets),
``compile`` (CMake and Ninja), ``wheels`` (package and install). ``shell`` runs the commands they need.
"""
