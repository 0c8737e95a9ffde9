"""The code that runs inside a guest: the init process, the worker, and the wire to the host.

It imports only pyluo itself and the standard library, except for the guest's network.
"""
