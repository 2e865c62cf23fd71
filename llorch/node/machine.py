"""This machine's memory, as pools see it: what a model needs of it, what is free, who else wants it.

Owns the questions that need the facts of GPUs and RAM: whether there is room for a start, or for a second model beside
the first; which pools stand back for a GPU's owner or for the hour; and what engines were measured to take. What the
answers are is decided by `fit` and `owner`. Never starts or stops anything.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path

from llorch.config_pools import PoolSpec
from llorch.messages import Gpu
from llorch.node import fit, ram
from llorch.node import pool_events as ev
from llorch.node.catalog import LocalModel
from llorch.node.engine_start import EngineStart, NoRoom
from llorch.node.gpu import GpuInventory
from llorch.node.owner import Owner
from llorch.node.peaks import PeakKey, Peaks
from llorch.node.plans import Plan
from llorch.node.process_tree import descendants

OWNER, HOURS = "owner", "hours"
