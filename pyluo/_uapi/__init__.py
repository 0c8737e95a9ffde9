"""The kernel's structs and request numbers, declared in C under the kernel's own names.

There is one file per kernel header. `build_ffi.py` compiles the files; a test compares the compiled
structs, constants and request numbers with the headers that each tested kernel installs.
"""
