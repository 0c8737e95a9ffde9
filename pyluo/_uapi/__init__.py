"""The kernel's structs and request numbers, declared in C under the kernel's own names.

One file a kernel header. `build_ffi.py` compiles them into `pyluo._ffi`; `layout` reads back what
the compiler made of them, for the comparison with a kernel's own headers.
"""
