"""Slot memories: an external memory of N words that heads write and read, by content, by usage and by order."""

from metamem.memory.slots.dnc import DNC
from metamem.memory.slots.ntm import NTM, NTMOptions
from metamem.memory.slots.options import DenseOptions, SlotOptions

__all__ = ["DNC", "NTM", "DenseOptions", "NTMOptions", "SlotOptions"]
