"""Launchers: where the cells of an ablation run.

- `local`  a process a cell on this machine
- `ray`    a task a cell, in a process of its own, on the machines of a Ray cluster

All give the same rows. A launcher takes a cell when it has room for it, so that a search can choose it by all that has
finished before; what it gives is written by the one process that runs the ablation.
"""

from metamem.analysis.launchers.base import Finished, Launcher, Sweep
from metamem.analysis.launchers.local import Local
from metamem.analysis.launchers.ray import Ray, import_ray
from metamem.config.errors import UserError, suggest

LAUNCHERS: dict[str, type[Local] | type[Ray]] = {"local": Local, "ray": Ray}


def launcher(name: str, address: str | None = None) -> Launcher:
    """The launcher of a name; `address` is that of the cluster to join, where a launcher joins one. Raises UserError
    for a name that there is none of, and where what it needs is not installed."""
    if name not in LAUNCHERS:
        raise UserError(f"there is no launcher {name!r}{suggest(name, LAUNCHERS)}")
    if name == "ray":
        import_ray()
        return Ray(address)
    if address is not None:
        raise UserError(f"the launcher {name!r} joins no cluster: --address is of --launcher ray")
    return LAUNCHERS[name]()


__all__ = ["LAUNCHERS", "Finished", "Launcher", "Local", "Ray", "Sweep", "launcher"]
