"""The code that runs inside a guest: the init process, the worker, and the wire to the host.

In this package, a *jump* is the kexec of a live update: the old kernel starts the new one. A *life*
is one boot of the guest: it begins with the cold boot or with a jump, and ends with the next jump.
Processes and open descriptors do not outlast a life.

The package imports only pyluo itself and the standard library, except for `network`, which also
needs pyroute2.
"""
