"""What the routes of a control share: one value, made by app.py, found under one key. No behaviour."""

from __future__ import annotations

import asyncio
import datetime
from dataclasses import dataclass, field

from aiohttp import web

from llorch.audit import Audit
from llorch.control.access import Access
from llorch.control.admission import Admission
from llorch.control.dispatch import Dispatcher
from llorch.control.distrust import Distrust
from llorch.control.links import Links
from llorch.control.metrics import ControlMetrics
from llorch.control.node_client import NodeClient
from llorch.control.recovery import Recovery
from llorch.control.registry import Registry
from llorch.control.replay import Replays
from llorch.control.roster import Roster
from llorch.control.stager import Stager
from llorch.doors import Doors
from llorch.quotas import Quotas
from llorch.tasks import Guard


@dataclass(slots=True)
class Control:
    registry: Registry
    dispatcher: Dispatcher
    links: Links
    nodes: NodeClient
    metrics: ControlMetrics
    guard: Guard
    recovery: Recovery
    roster: Roster
    replays: Replays
    quotas: Quotas
    doors: Doors
    access: Access
    admission: Admission
    audit: Audit
    distrust: Distrust
    stager: Stager
    max_body_bytes: int
    slow_reader_timeout_s: float
    heartbeat_interval_s: float
    offline_after_s: float
    stopping: asyncio.Event = field(default_factory=asyncio.Event)


CONTROL = web.AppKey("control", Control)


def wall_time() -> str:
    """Now, for people: RFC 3339, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
