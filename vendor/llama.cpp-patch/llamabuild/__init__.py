"""The steps that turn the pinned llama-cpp-python source into patched, installed libraries and tools.

One module a step: ``source`` (fetch, verify, patch), ``toolchain`` (compilers and instruction sets),
``compile`` (CMake and Ninja), ``page`` (llama-server's web page), ``wheels`` (package and install).
``versions`` knows what the results are called, ``shell`` runs the commands they need.
"""
