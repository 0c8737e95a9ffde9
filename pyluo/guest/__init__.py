"""What runs inside a guest: the init script, the worker, and the wire to the host.

Nothing here imports more than pyluo itself and the standard library, but for the guest's network.
"""
