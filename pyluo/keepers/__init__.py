"""Keepers: what keeps the sessions of a process that may end at any moment.

A session dies with its last descriptor. A keeper has another descriptor of it: the service manager,
in the descriptor store of the service, or a holder process.
"""
