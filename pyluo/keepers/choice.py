"""The choice of a keeper."""

from __future__ import annotations

from pyluo.keepers.holder import HolderProcess
from pyluo.keepers.keeper import Keeper, KeeperChoice
from pyluo.keepers.service_manager import ServiceManager

__all__ = ["choose_keeper"]


def choose_keeper(choice: Keeper | KeeperChoice) -> Keeper | None:
    """Return the keeper that a caller named or chose; None for none."""
    if isinstance(choice, Keeper):
        return choice
    if choice is KeeperChoice.NONE:
        return None
    return ServiceManager.of_this_process() or HolderProcess()
