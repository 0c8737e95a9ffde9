"""The kernel's structs and request numbers, declared in C under the kernel's own names.

One file a kernel header. `build_ffi.py` compiles them, and a test compares what the compiler made
of them with the headers that each kernel installs.
"""
