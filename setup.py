"""Only what pyproject.toml cannot say: how the extension module is made."""

import sysconfig

from setuptools import setup

# A free-threaded Python has no stable ABI before 3.15, and cffi builds for its version alone.
STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    cffi_modules=["build_ffi.py:ffibuilder"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE_ABI else {},
)
