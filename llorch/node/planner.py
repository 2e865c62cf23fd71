"""Plans for the pools of the settings, on this machine: at the start, when the settings change, and once more later.

Owns the look at which engines there are, and what becomes of a pool that can't be planned: at the start the others
serve all the same, in settings that are read anew none of it counts. Blocking, for seconds: engines are asked.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Collection

from llorch.config import NodeSettings
from llorch.config_pools import PoolSpec
from llorch.errors import ConfigError
from llorch.logs import Log
from llorch.node.catalog import Catalog, check_ref
from llorch.node.engines.auto import EngineFacts
from llorch.node.engines.detect import detect
from llorch.node.modelref import DEMO
from llorch.node.plans import MODELLESS, Plan, plan_pool, refused

log = Log("node.planner")


class Planner:
    def __init__(self, settings: NodeSettings, catalog: Catalog, gpus: frozenset[int]) -> None:
        self._settings = settings
        self._catalog = catalog
        self._gpus = gpus
        self._specs: tuple[PoolSpec, ...] = ()

    def plans(self, settings: NodeSettings, wished: Collection[str] = ()) -> list[Plan]:
        """At the start. Raises ConfigError if there are pools and none can be planned; but for those of `wished`, where
        an operator asked for something else than the settings say.
        """
        self._specs = tuple(settings.effective_pools())
        facts = self._facts(self._specs)
        plans: list[Plan] = []
        errors: list[ConfigError] = []
        for spec in self._specs:
            try:
                plans.append(self.plan(spec, facts))
            except ConfigError as error:
                errors.append(error)
                plans.append(refused(spec, error))
        if errors and len(errors) == len(plans) and not any(spec.id in wished for spec in self._specs):
            raise errors[0]
        for refusal in errors:
            log.error("pool.refused", reason=refusal.message, hint=refusal.hint)
        return plans

    def other(self, settings: NodeSettings) -> list[Plan] | None:
        """In settings that were read anew; None if the pools are as they were. Raises ConfigError for any of them.

        Nothing is settled by that: whatever else there is may yet be refused. `settled` follows.
        """
        specs = tuple(settings.effective_pools())
        if specs == self._specs:
            return None
        facts = self._facts(specs)
        return [self.plan(spec, facts) for spec in specs]

    def settled(self, settings: NodeSettings) -> None:
        """These are in force."""
        self._specs = tuple(settings.effective_pools())

    async def again(self, spec: PoolSpec) -> Plan:
        """One that could not be planned. Raises ConfigError if it still can't."""
        return await asyncio.to_thread(lambda: self.plan(spec, self._facts((spec,))))

    def plan(self, spec: PoolSpec, facts: EngineFacts) -> Plan:
        """One pool, with what is known of the engines here. Raises ConfigError."""
        allow_cpu = self._settings.allow_cpu or self._settings.dev
        return plan_pool(spec, facts, self._check, gpus=self._gpus, allow_cpu=allow_cpu)

    def _check(self, ref: str) -> None:
        """Of what lies on this machine, whether it can be served; what has to be fetched is seen when it is needed."""
        check_ref(ref)
        if ref == DEMO or ref.startswith("file:"):
            self._catalog.find(ref)

    def _facts(self, specs: tuple[PoolSpec, ...]) -> EngineFacts:
        if all(spec.engine in MODELLESS for spec in specs):
            return EngineFacts(python=sys.executable)
        return detect(self._settings.llama_server, env=os.environ, look_for_gpus=bool(self._gpus))
