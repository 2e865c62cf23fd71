"""A stand-in for a node, as far as staging goes: a catalog and a stager in a process of their own, that may be killed.

`python -m tests.standins.staging_process DATA ORDER`: a StageOrder as JSON, or `-` for what an earlier run left. Prints
one line of JSON when it is done: the model, or the error.
"""

from __future__ import annotations

import asyncio
import json
import sys

from llorch.errors import LlorchError
from llorch.messages import decode_object, parse
from llorch.node.catalog import Catalog
from llorch.node.peers import Peers
from llorch.node.staging import Stager, StagingLimits
from llorch.wishes import StageOrder


async def run(data: str, order: str) -> dict[str, object]:
    catalog = Catalog(data)
    token = "service-token-of-the-test-0123456789"
    async with Stager(catalog, "here", StagingLimits(), Peers(service_tokens=lambda: [token])) as stager:
        if order == "-":
            [wish] = [entry.order for entry in catalog.entries() if entry.state == "staging"]
            assert wish is not None
        else:
            wish = parse(StageOrder, decode_object(order.encode()))
        try:
            found = await stager.ensure(wish, lambda text: print(text, file=sys.stderr, flush=True))
        except LlorchError as error:
            return error.to_wire()
        return {"id": found.id, "path": str(found.path), "sha256": found.sha256, "size_bytes": found.size_bytes}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(sys.argv[1], sys.argv[2]))), flush=True)
