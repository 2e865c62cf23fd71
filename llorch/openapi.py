"""The OpenAPI 3.1 document of a role, made from its route table: what is served and what is described can't differ."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from llorch.auth import Scope
from llorch.errors import Code
from llorch.web import Route


class Description:
    """The document of one role, made when somebody first asks for it: its schemas take longer than all other routes."""

    def __init__(self, *, title: str, version: str) -> None:
        self.routes: Sequence[Route] = ()
        self._title = title
        self._version = version
        self._document: dict[str, Any] | None = None

    def document(self) -> dict[str, Any]:
        """Of `routes`, which has to be assigned by then. Takes tens of milliseconds once: for a thread."""
        if self._document is None:
            self._document = openapi(self.routes, title=self._title, version=self._version)
        return self._document


def openapi(routes: Sequence[Route], *, title: str, version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a route table."""
    paths: dict[str, Any] = {}
    schemas: dict[str, Any] = {}
    for route in routes:
        path = re.sub(r"\{(\w+):[^}]*\}", r"{\1}", route.path)
        operation: dict[str, Any] = {
            "summary": route.summary,
            "responses": {
                str(route.status): {"description": "done", "content": {route.returns: {}}},
                "default": {
                    "description": "an error",
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                },
            },
            "security": [] if route.scope is Scope.OPEN else [{"bearer": [scope.value]} for scope in route.scopes],
        }
        names = re.findall(r"\{(\w+)\}", path)
        if names:
            operation["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
            ]
        if route.body is not None:
            schema = route.body.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(schema.pop("$defs", {}))
            schemas[route.body.__name__] = schema
            reference = {"$ref": f"#/components/schemas/{route.body.__name__}"}
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
        paths.setdefault(path, {})[route.method.lower()] = operation
    schemas["Error"] = _ERROR_SCHEMA
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version, "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}},
    }


_ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "type", "retriable", "request_id"],
            "properties": {
                "code": {"enum": [code.value for code in Code]},
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "retriable": {"type": "boolean"},
                "retry_after_ms": {"type": "integer"},
                "hint": {"type": "string"},
                "task_id": {"type": "string"},
                "request_id": {"type": ["string", "null"]},
                "details": {"type": "object"},
            },
        }
    },
}
