"""Slot memories: an external memory of N words that heads write and read, by content, by usage and by order."""

from metamem.memory.slots.dnc import DNC, DNCOptions
from metamem.memory.slots.episodic import Episodic, EpisodicOptions
from metamem.memory.slots.key_value import KeyValue
from metamem.memory.slots.ntm import NTM, NTMOptions
from metamem.memory.slots.options import DenseOptions, ReadOptions, SlotOptions, WriteOptions
from metamem.memory.slots.sam import SAM
from metamem.memory.slots.sdnc import SDNC, SDNCOptions
from metamem.memory.slots.sparse_memory import NearestOptions, SparseOptions
from metamem.memory.slots.window import Window

__all__ = [
    # memories
    "DNC",
    "NTM",
    "SAM",
    "SDNC",
    "Episodic",
    "KeyValue",
    "Window",
    # their options, from the most general on
    "ReadOptions",
    "WriteOptions",
    "SlotOptions",
    "DenseOptions",
    "DNCOptions",
    "NTMOptions",
    "NearestOptions",
    "SparseOptions",
    "SDNCOptions",
    "EpisodicOptions",
]
