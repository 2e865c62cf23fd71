"""A control with its cluster's authority: certificates, join tokens, tokens, and what ends when one of them does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llorch import pki, tls
from llorch.control import app, routes_trust
from llorch.control.authority import Authority
from llorch.control.state import Control
from llorch.control.token_files import TokenFiles
from llorch.errors import Code, ConfigError, LlorchError
from llorch.tls import CONTROL_NAME, JOIN_NAME, node_name
from llorch.tokens import ID_BYTES, SECRET_BYTES, Kind, Tokens, Wish
from tests.certificates import certificate
from tests.cluster import eventually
from tests.component.command_line import CommandLine
from tests.component.control_harness import TOKENS, pool, settings

DAY = 86_400.0


@dataclass
class Trusted:
    """A control that serves with TLS on loopback, and the ways in."""

    control: Control
    url: str
    port: int
    session: aiohttp.ClientSession
    folder: Path
    log: list[str] = field(default_factory=list)

    @property
    def authority(self) -> Authority:
        assert self.control.access.authority is not None
        return self.control.access.authority

    def pair(self, node_id: str, *, issued: float | None = None, life_s: float = DAY) -> tuple[bytes, bytes]:
        key, now = pki.make_key(), issued or time.time()
        return self.authority.issue_node(
            pki.make_request(key, node_id), node_id, now, life_s, take_over=True
        ), pki.key_pem(key)

    def context(self, pair: tuple[bytes, bytes] | None = None) -> ssl.SSLContext:
        return tls.cluster_client_context(self.authority.trust.bundle_pem, pair)

    async def ask(
        self, method: str, path: str, body: Any = None, *, pair: tuple[bytes, bytes] | None = None,
        name: str | None = None, token: str | None = None, context: ssl.SSLContext | None = None,
    ) -> tuple[int, Any]:  # fmt: skip
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        named = name or (CONTROL_NAME if pair is not None else JOIN_NAME)
        async with self.session.request(
            method,
            self.url + path,
            json=body,
            headers=headers,
            ssl=context or self.context(pair),
            server_hostname=named,
        ) as response:
            raw = await response.read()
            value = json.loads(raw) if "json" in response.content_type else raw
            return response.status, value

    async def admin(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        return await self.ask(method, path, body, token=TOKENS["admin"])

    async def join_token(self, **more: Any) -> str:
        status, made = await self.admin("POST", "/v2/tokens", {"join": True, **more})
        assert status == 201, made
        return str(made["token"])

    async def sign(self, node_id: str, *, token: str | None = None, pair: Any = None) -> tuple[int, Any]:
        csr = pki.make_request(pki.make_key(), node_id).decode()
        return await self.ask("POST", "/v2/nodes/csr", {"node_id": node_id, "csr": csr}, token=token, pair=pair)


@contextlib.asynccontextmanager
async def trusted(folder: Path, **more: Any) -> AsyncIterator[Trusted]:
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session,
        app.serving(settings(**{"tls": "on", "data_dir": str(folder / "c"), **more})) as (control, server),
    ):
        yield Trusted(control, server.url, server.port, session, folder)


def code(answer: tuple[int, Any]) -> tuple[int, str]:
    return answer[0], answer[1]["error"]["code"] if "error" in answer[1] else ""


def registration(node_id: str) -> dict[str, Any]:
    return {"node_id": node_id, "boot_id": "b", "pools": [pool()], "capabilities": {"gpus": []}}


# ---------------------------------------------------------------- certificates


async def test_a_certificate_of_the_cluster_makes_a_node_and_names_it(tmp_path: Path) -> None:
    async with trusted(tmp_path) as control:
        pair = control.pair("a")
        status, lease = await control.ask("POST", "/v2/nodes/register", registration("a"), pair=pair)
        assert status == 200, lease
        assert lease["authorities"] == control.authority.trust.bundle_id
        assert lease["ticket_key"] == control.authority.trust.ticket_key
        beat = {"lease_id": lease["lease_id"], "boot_id": "b", "seq": 1}
        status, answer = await control.ask("POST", "/v2/nodes/a/heartbeat", beat, pair=pair)
        assert (status, answer["authorities"]) == (200, lease["authorities"])
        assert control.control.registry.nodes["a"].certified


async def test_path_body_and_certificate_have_to_agree_on_the_node(tmp_path: Path) -> None:
    async with trusted(tmp_path) as control:
        assert (await control.ask("POST", "/v2/nodes/register", registration("b"), pair=control.pair("b")))[0] == 200
        pair = control.pair("a")
        for method, path, body in (
            ("POST", "/v2/nodes/register", registration("b")),
            ("POST", "/v2/nodes/b/heartbeat", {"pools": []}),
            ("DELETE", "/v2/nodes/b", None),
            ("GET", "/v2/nodes/b/link", None),
            ("POST", "/callbacks/pool-ready", {"node_id": "b", "pool_id": "p0"}),
            ("POST", "/v2/nodes/csr", {"node_id": "b", "csr": pki.make_request(pki.make_key(), "b").decode()}),
        ):
            assert code(await control.ask(method, path, body, pair=pair)) == (403, "FORBIDDEN"), path
        assert "b" in control.control.registry.nodes


async def test_every_route_for_nodes_checks_whose_certificate_it_is() -> None:
    """A route that takes a node's credential and is not in the test above has to be put there."""
    listed = {route.path for route in app.routes() if {"node"} & {scope.value for scope in route.scopes}}
    assert listed == {
        "/v2/nodes/register", "/v2/nodes/{node_id}/heartbeat", "/v2/nodes/{node_id}", "/v2/nodes/{node_id}/link",
        "/callbacks/pool-ready", "/v2/nodes/csr",
    }  # fmt: skip


async def test_a_token_beside_a_certificate_is_not_looked_at(tmp_path: Path) -> None:
    async with trusted(tmp_path) as control:
        answer = await control.ask("GET", "/v2/nodes", pair=control.pair("a"), token=TOKENS["admin"])
        assert code(answer) == (403, "FORBIDDEN")


async def test_another_controls_certificate_is_no_nodes(tmp_path: Path) -> None:
    async with trusted(tmp_path) as control:
        pair = control.authority.control_pair("desk", [], time.time(), DAY)
        answer = await control.ask("POST", "/v2/nodes/register", registration("desk"), pair=pair)
        assert code(answer) == (403, "FORBIDDEN")


def _other_pair(control: Trusted) -> tuple[bytes, bytes]:
    key, other = pki.make_key(), pki.make_key()
    signer = pki.Signer(pki.make_authority(other, time.time()), other)
    return pki.pem_of([signer.issue_node(key.public_key(), "a", time.time(), DAY)]), pki.key_pem(key)


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (lambda control: control.pair("a", issued=time.time() - 3 * DAY), "certificate has expired"),
        (lambda control: control.pair("a", issued=time.time() + DAY), "certificate is not yet valid"),
        (_other_pair, "local issuer certificate"),
        (lambda _control: None, "no client certificate"),
    ],
    ids=["expired", "future", "another authority", "none"],
)
async def test_a_bad_certificate_is_refused_in_the_handshake_with_the_reason_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pair: Callable[[Trusted], Any], reason: str
) -> None:
    async with trusted(tmp_path) as control:
        context = control.context(pair(control))
        with pytest.raises((aiohttp.ClientError, ConnectionError)):
            await control.ask("GET", "/livez", context=context, name=CONTROL_NAME)
        await eventually(lambda: reason in caplog.text, what=caplog.text)
        line = next(record.message for record in caplog.records if reason in record.message)
        assert "auth.failed layer=tls" in line
        assert "peer=127.0.0.1" in line
        _, metrics = await control.ask("GET", "/metrics", token=TOKENS["admin"])
        assert b'llorch_auth_failures_total{layer="tls"}' in metrics


async def test_a_wrong_common_name_is_refused_with_the_reason_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.unit.test_pki import NOW

    async with trusted(tmp_path) as control:
        signer = control.authority.trust.signer
        key = pki.make_key()
        about = ((pki.NameOID.COMMON_NAME, "b"), (pki.NameOID.SERIAL_NUMBER, "1"))
        name = pki.x509.Name([pki.x509.NameAttribute(*one) for one in about])
        made = pki._builder(name, key.public_key(), signer.cert.subject, signer.key.public_key(), NOW, DAY)
        uri = pki.x509.UniformResourceIdentifier("spiffe://llorch/node/a")
        made = made.add_extension(pki.x509.SubjectAlternativeName([uri]), critical=False)
        pair = pki.pem_of([made.sign(signer.key, pki.hashes.SHA256())]), pki.key_pem(key)
        answer = await control.ask("POST", "/v2/nodes/register", registration("a"), pair=pair)
        assert code(answer) == (401, "UNAUTHENTICATED")
        assert "common name and its URI differ" in caplog.text


async def test_a_revoked_node_is_refused_at_once_and_what_it_has_open_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with trusted(tmp_path) as control:
        pair = control.pair("a")
        _, lease = await control.ask("POST", "/v2/nodes/register", registration("a"), pair=pair)
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", control.port, ssl=control.context(pair), server_hostname=CONTROL_NAME
        )
        writer.write(
            f"GET /v2/nodes/a/link HTTP/1.1\r\nHost: c\r\nConnection: Upgrade\r\nUpgrade: llorch-records/1\r\n"
            f"X-Llorch-Lease: {lease['lease_id']}\r\n\r\n".encode()
        )
        assert b" 101 " in await reader.readline()
        Authority.open(control.folder / "c", None, time.time())[0].revoke("a", time.time())  # another process does it
        async with asyncio.timeout(5):
            await reader.read()  # to its end
        writer.close()
        assert code(await control.ask("POST", "/v2/nodes/a/heartbeat", {"pools": []}, pair=pair)) == (
            401,
            "UNAUTHENTICATED",
        )
        assert "the certificate was revoked" in caplog.text
        assert "session.ended principal=node:a" in caplog.text
        assert control.control.links.get("a") is None


# ---------------------------------------------------------------- joining


async def test_a_join_token_gives_one_certificate_for_the_key_of_whoever_asks(tmp_path: Path) -> None:
    async with trusted(tmp_path) as control:
        token = await control.join_token()
        status, answer = await control.sign("a", token=token)
        assert status == 200
        assert pki.common_name(pki.read_certs(answer["certificate"].encode())[0]) == "a"
        assert pki.read_certs(answer["authorities"].encode()) == list(control.authority.trust.bundle)
        assert code(await control.sign("b", token=token)) == (401, "UNAUTHENTICATED")
        assert code(await control.ask("GET", "/v2/nodes", token=token)) == (403, "FORBIDDEN")


async def test_who_did_not_get_the_answer_asks_again_with_the_same_key(tmp_path: Path) -> None:
    async with trusted(tmp_path) as control:
        token, key = await control.join_token(), pki.make_key()
        csr = pki.make_request(key, "a").decode()
        for _ in range(3):
            status, _ = await control.ask("POST", "/v2/nodes/csr", {"node_id": "a", "csr": csr}, token=token)
            assert status == 200
        other = pki.make_request(key, "b").decode()
        assert code(await control.ask("POST", "/v2/nodes/csr", {"node_id": "b", "csr": other}, token=token)) == (
            401, "UNAUTHENTICATED",
        )  # fmt: skip
        assert code(await control.sign("a", token=token)) == (401, "UNAUTHENTICATED")


async def test_a_join_token_opens_no_other_door(tmp_path: Path) -> None:
    async with trusted(tmp_path) as control:
        token = await control.join_token(uses=5)
        for method, path in (("GET", "/v2/nodes"), ("POST", "/v2/nodes/register"), ("GET", "/v1/models")):
            assert code(await control.ask(method, path, {}, token=token)) == (403, "FORBIDDEN")


async def test_of_many_at_once_as_many_join_as_the_token_has_uses(tmp_path: Path) -> None:
    async with trusted(tmp_path) as control:
        token = await control.join_token(uses=3)
        answers = await asyncio.gather(*(control.sign(f"n{number}", token=token) for number in range(10)))
        assert sorted(answer[0] for answer in answers) == [200] * 3 + [401] * 7
        assert len(control.authority.trust.issued) == 3


async def test_nobody_becomes_a_node_that_is_there_but_with_a_token_for_it(tmp_path: Path) -> None:
    async with trusted(tmp_path) as control:
        assert (await control.sign("a", token=await control.join_token()))[0] == 200
        general, bound = await control.join_token(), await control.join_token(node_id="a")
        answer = await control.sign("a", token=general)
        assert code(answer) == (409, "NODE_ID_CONFLICT")
        assert "llorch token join --node a" in answer[1]["error"]["hint"]
        assert (await control.sign("b", token=general))[0] == 200, "and the token is not used up"
        assert code(await control.sign("b2", token=bound)) == (403, "FORBIDDEN")
        assert (await control.sign("a", token=bound))[0] == 200


async def test_a_revoked_node_joins_again_with_a_new_token(tmp_path: Path) -> None:
    async with trusted(tmp_path) as control:
        pair = control.pair("a", issued=time.time() - 10)
        control.authority.revoke("a", time.time() - 5)
        assert code(await control.sign("a", pair=pair)) == (401, "UNAUTHENTICATED")
        assert (await control.sign("a", token=await control.join_token()))[0] == 200
        assert (await control.sign("a", pair=control.pair("a")))[0] == 200


async def test_a_certificate_is_renewed_by_itself_and_for_itself_alone(tmp_path: Path) -> None:
    async with trusted(tmp_path) as control:
        pair = control.pair("a")
        status, answer = await control.sign("a", pair=pair)
        assert (status, pki.common_name(pki.read_certs(answer["certificate"].encode())[0])) == (200, "a")
        assert code(await control.sign("b", pair=pair)) == (403, "FORBIDDEN")


async def test_a_certificate_that_is_revoked_while_it_asks_is_not_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with trusted(tmp_path) as control:
        pair = control.pair("a", issued=time.time() - 10)
        elsewhere = Authority.open(control.folder / "c", None, time.time())[0]

        async def meanwhile(*_: object) -> None:
            elsewhere.revoke("a", time.time())

        monkeypatch.setattr("llorch.control.on_record.certificate_signed", meanwhile)
        assert code(await control.sign("a", pair=pair)) == (401, "UNAUTHENTICATED")
        control.authority.refresh()
        assert "a" not in control.authority.trust.issued


async def test_a_shared_node_token_gives_no_certificate(tmp_path: Path) -> None:
    async with trusted(tmp_path) as control:
        answer = await control.sign("a", token=TOKENS["node"])
        assert code(answer) == (403, "FORBIDDEN")
        assert "llorch token join" in answer[1]["error"]["hint"]


async def test_a_join_token_that_expired_is_wrong(tmp_path: Path) -> None:
    async with trusted(tmp_path) as control:
        _, text = control.control.access.files.new(
            Wish(kind=Kind.JOIN, uses=1, life_s=5), time.time() - 6, control.authority.trust.digest
        )
        control.control.access._make_ring()
        assert code(await control.sign("a", token=text)) == (401, "UNAUTHENTICATED")


async def test_a_full_disk_gives_no_certificate_and_uses_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with trusted(tmp_path) as control:
        token = await control.join_token()

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("llorch.private.write", full)
            assert code(await control.sign("a", token=token)) == (507, "INSUFFICIENT_STORAGE")
            assert code(await control.admin("POST", "/v2/tokens", {})) == (507, "INSUFFICIENT_STORAGE")
        assert (await control.sign("a", token=token))[0] == 200


# ---------------------------------------------------------------- who it is


async def test_one_port_is_the_cluster_to_nodes_and_somebody_else_to_clients(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path / "own")
    async with trusted(tmp_path, tls="auto", tls_cert=str(cert), tls_key=str(key)) as control:
        own = ssl.create_default_context(cafile=str(cert))
        async with control.session.get(f"{control.url}/livez", ssl=own) as response:
            assert response.status == 200
        assert (await control.ask("GET", "/livez", name=JOIN_NAME))[0] == 200
        assert (await control.ask("GET", "/livez", pair=control.pair("a")))[0] == 200
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await control.ask("GET", "/livez", name="desk.example")


async def test_without_a_certificate_of_its_own_clients_are_shown_the_clusters(tmp_path: Path) -> None:
    async with trusted(tmp_path, tls_names=("desk.example", "10.9.8.7")) as control:
        for name in ("127.0.0.1", "localhost", "desk.example", "10.9.8.7"):
            assert (await control.ask("GET", "/livez", name=name))[0] == 200
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await control.ask("GET", "/livez", name="elsewhere.example")


async def test_clients_that_would_speak_http_2_are_answered_in_http_1_1_under_every_name(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path / "own")
    async with trusted(tmp_path, tls="auto", tls_cert=str(cert), tls_key=str(key)) as control:
        own, cluster, node = (
            ssl.create_default_context(cafile=str(cert)),
            control.context(),
            control.context(control.pair("a")),
        )
        for context, name in ((own, "127.0.0.1"), (cluster, JOIN_NAME), (node, CONTROL_NAME)):
            context.set_alpn_protocols(["h2", "http/1.1"])
            _, writer = await asyncio.open_connection("127.0.0.1", control.port, ssl=context, server_hostname=name)
            assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"
            writer.close()


async def test_cacerts_are_there_for_whoever_asks(tmp_path: Path) -> None:
    async with trusted(tmp_path) as control:
        status, pem = await control.ask("GET", "/cacerts", context=tls.cluster_client_context(b"", check=False))
        assert status == 200
        assert pki.matching(pki.read_certs(pem), control.authority.trust.digest) is not None


async def test_a_new_certificate_file_is_shown_without_a_restart_and_a_bad_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cert, key = certificate(tmp_path / "own")
    async with trusted(tmp_path, tls="auto", tls_cert=str(cert), tls_key=str(key)) as control:
        access = control.control.access
        cert.write_text("not a certificate")
        await access.step()
        await access.step()
        assert caplog.text.count("access.unchanged") == 1
        certificate(tmp_path / "own")
        await access.step()
        async with control.session.get(
            f"{control.url}/livez", ssl=ssl.create_default_context(cafile=str(cert))
        ) as response:
            assert response.status == 200


# ---------------------------------------------------------------- rotation


async def test_an_authority_is_rotated_while_nodes_and_clients_go_on(tmp_path: Path) -> None:
    async with trusted(tmp_path) as control:
        old_trust, old_pair = control.context(), control.pair("a")
        old_node = control.context(old_pair)
        elsewhere = Authority.open(control.folder / "c", None, time.time())[0]
        before = control.authority.trust.bundle_id
        elsewhere.rotate(time.time())
        await control.control.access.step()
        assert control.authority.trust.bundle_id != before
        assert (await control.ask("GET", "/livez", context=old_trust, name="127.0.0.1"))[0] == 200, "clients go on"
        csr = {"node_id": "a", "csr": pki.make_request(pki.make_key(), "a").decode()}
        status, answer = await control.ask("POST", "/v2/nodes/csr", csr, context=old_node, name=CONTROL_NAME)
        assert status == 200, "a node renews with what it has"
        assert len(pki.read_certs(answer["authorities"].encode())) == 2
        with pytest.raises(LlorchError, match="older authority: a"):
            elsewhere.finish(time.time())  # the answer may not have arrived
        fresh = control.pair("a")
        assert (await control.ask("GET", "/livez", pair=fresh))[0] == 200
        assert (await control.ask("POST", "/v2/nodes/a/heartbeat", {"pools": []}, pair=fresh))[0] == 404
        await control.control.access.step()
        elsewhere.finish(time.time())
        await control.control.access.step()
        assert (await control.ask("GET", "/livez", pair=control.pair("a")))[0] == 200
        with pytest.raises((aiohttp.ClientError, ConnectionError)):
            await control.ask("GET", "/livez", context=old_node, name=CONTROL_NAME)


# ---------------------------------------------------------------- tokens


async def test_a_token_is_made_used_listed_and_revoked(tmp_path: Path) -> None:
    async with trusted(tmp_path) as control:
        status, made = await control.admin("POST", "/v2/tokens", {"name": "ci", "scopes": ["read"], "expires_s": 60})
        assert (status, made["name"], made["scopes"], made["state"]) == (201, "ci", ["read"], "valid")
        assert (await control.ask("GET", "/v2/nodes", token=made["token"]))[0] == 200
        assert code(await control.ask("GET", "/v1/models", token=made["token"])) == (403, "FORBIDDEN")
        status, listed = await control.admin("GET", "/v2/tokens")
        [row] = listed["tokens"]
        assert (row["id"], row["last_used_s"], row["fingerprint"]) == (made["id"], 0, made["fingerprint"])
        assert made["token"] not in json.dumps(listed)
        assert (await control.admin("DELETE", f"/v2/tokens/{made['id']}"))[1] == {"revoked": [made["id"]]}
        assert (await control.admin("DELETE", f"/v2/tokens/{made['id']}"))[1] == {"revoked": []}
        assert code(await control.ask("GET", "/v2/nodes", token=made["token"])) == (401, "UNAUTHENTICATED")
        assert code(await control.admin("DELETE", "/v2/tokens/nobody")) == (404, "NOT_FOUND")


async def test_what_another_process_does_to_the_tokens_is_in_force_within_seconds(tmp_path: Path) -> None:
    async with trusted(tmp_path) as control:
        files = TokenFiles(control.folder / "c")
        record, text = files.new(Wish(name="ci"), time.time())

        async def status() -> int:
            return (await control.ask("GET", "/v2/nodes", token=text))[0]

        assert await status() == 200, "a new one at once"
        files.revoke(record.id, time.time())

        async def refused() -> bool:
            return await status() == 401

        await eventually(refused, within_s=5)


async def test_a_revoked_token_ends_what_it_is_being_served(tmp_path: Path) -> None:
    async with trusted(tmp_path) as control:
        _, made = await control.admin("POST", "/v2/tokens", {"name": "ci"})
        headers = {"Authorization": f"Bearer {made['token']}"}
        body = {"model": "m", "prompt": "x"}
        await control.ask("POST", "/v2/nodes/register", registration("a"), pair=control.pair("a"))
        # It has no link, so the task has to wait, which commits the answer to a stream.
        async with control.session.post(
            f"{control.url}/v2/tasks", json=body, headers=headers, ssl=control.context(), server_hostname=JOIN_NAME
        ) as response:
            assert response.status == 200
            await control.admin("DELETE", f"/v2/tokens/{made['id']}")
            async with asyncio.timeout(5):
                with pytest.raises(aiohttp.ClientPayloadError):
                    await response.read()


async def test_a_token_for_some_models_is_for_no_other(tmp_path: Path) -> None:
    async with trusted(tmp_path) as control:
        await control.ask("POST", "/v2/nodes/register", registration("a"), pair=control.pair("a"))
        _, made = await control.admin("POST", "/v2/tokens", {"models": ["other"]})
        for path, body in (
            ("/v2/tasks", {"model": "m", "prompt": "x"}),
            ("/v2/placement", {"model": "m", "prompt": "x"}),
            ("/v1/completions", {"model": "m", "prompt": "x"}),
        ):
            answer = await control.ask("POST", path, body, token=made["token"])
            assert (code(answer), answer[1]["error"]["param"]) == ((403, "FORBIDDEN"), "model")
        assert (await control.ask("GET", "/v1/models", token=made["token"]))[1]["data"] == []
        assert code(await control.ask("GET", "/v1/models/m", token=made["token"])) == (404, "MODEL_NOT_FOUND")


@pytest.mark.parametrize("name", ["tokens.json", "pki/authority.pem", "pki/issued.json"])
async def test_files_that_others_may_read_are_refused_at_start_and_kept_out_while_it_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    async with trusted(tmp_path) as control:
        await control.sign("a", token=await control.join_token())
        path = control.folder / "c" / name
        assert path.stat().st_mode & 0o777 == 0o600
        path.write_bytes(path.read_bytes() + b"\n")
        path.chmod(0o640)
        await control.control.access.step()
        assert f"chmod 600 {path}" in caplog.text
        assert (await control.ask("GET", "/v2/nodes", token=TOKENS["admin"]))[0] == 200
    with pytest.raises(ConfigError, match="others may read it"):
        async with trusted(tmp_path):
            pass
    path.chmod(0o600)
    async with trusted(tmp_path):
        pass


async def test_a_control_without_tls_has_no_authority_and_says_so(tmp_path: Path) -> None:
    async with trusted(tmp_path, tls="auto") as control:
        assert control.url.startswith("http://")
        assert not (tmp_path / "c" / "pki").exists()
        for method, path, body, status in (("GET", "/cacerts", None, 404), ("POST", "/v2/tokens", {"join": True}, 409)):
            headers = {"Authorization": f"Bearer {TOKENS['admin']}"}
            async with control.session.request(method, control.url + path, json=body, headers=headers) as response:
                assert response.status == status


def test_the_view_of_a_token_holds_no_digest() -> None:
    _, record, _ = Tokens().add(Wish(), 0.0, bytes(ID_BYTES + SECRET_BYTES))
    assert record.digest.hex() not in json.dumps(routes_trust.token_view(record, {}, 0.0))


def test_a_nodes_name_is_one_that_dns_allows() -> None:
    assert len(node_name("x" * 63)) < 64


# ---------------------------------------------------------------- on record


def on_record(control: Trusted) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (control.folder / "c" / "audit" / "audit.jsonl").read_text().splitlines()]


async def recorded(control: Trusted, event: str, **fields: Any) -> bool:
    return any(one["event"] == event and fields.items() <= one.items() for one in on_record(control))


async def test_what_is_done_to_tokens_and_certificates_is_on_record_and_no_secret_is(tmp_path: Path) -> None:
    async with trusted(tmp_path) as control:
        token = await control.join_token()
        assert (await control.sign("a", token=token))[0] == 200
        _, made = await control.admin("POST", "/v2/tokens", {"name": "ci"})
        await control.admin("DELETE", f"/v2/tokens/{made['id']}")
        elsewhere = TokenFiles(control.folder / "c")  # as `llorch token` does, on the control's own machine
        record, text = elsewhere.new(Wish(name="local"), time.time())
        await control.control.access.step()
        elsewhere.revoke(record.id, time.time())
        Authority.open(control.folder / "c", None, time.time())[0].revoke("a", time.time())
        await control.control.access.step()
        with pytest.raises((aiohttp.ClientError, ConnectionError)):
            await control.ask("GET", "/livez", name=CONTROL_NAME)
        for event, fields in (
            ("token.created", {"principal": "root", "kind": "join"}),
            ("certificate.issued", {"node_id": "a", "peer": "127.0.0.1"}),
            ("token.created", {"principal": "root", "kind": "client", "name": "ci"}),
            ("token.revoked", {"principal": "root", "token_id": made["id"]}),
            ("token.created", {"principal": "local", "token_id": record.id}),
            ("token.revoked", {"principal": "local", "token_id": record.id}),
            ("certificate.revoked", {"principal": "local", "node_id": "a"}),
            ("auth.failed", {"kind": "tls", "reason": "no client certificate"}),
        ):
            await eventually(lambda e=event, f=fields: recorded(control, e, **f), what=f"{event} {fields}")  # type: ignore[misc]
        whole = (control.folder / "c" / "audit" / "audit.jsonl").read_text()
        for secret in (token, made["token"], text, *TOKENS.values()):
            assert secret not in whole


async def test_a_certificate_that_was_made_at_the_command_line_is_on_record_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with trusted(tmp_path) as control:
        assert (await control.sign("a", token=await control.join_token()))[0] == 200
        argv = ("certs", "issue", "far", "--out", str(tmp_path / "far.pem"), "--data-dir", str(control.folder / "c"))
        assert (await CommandLine(monkeypatch, tmp_path)(*argv)).code == 0
        for _ in range(2):
            await control.control.access.step()
        await eventually(lambda: recorded(control, "certificate.issued", node_id="far"), what="it is on record")
        issued = [one for one in on_record(control) if one["event"] == "certificate.issued"]
        made = [(one["node_id"], one["principal"].partition(":")[0]) for one in issued]
        assert made == [("a", "join"), ("far", "local")]


async def test_what_can_not_be_put_on_record_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with trusted(tmp_path) as control:
        token = await control.join_token()
        _, made = await control.admin("POST", "/v2/tokens", {"scopes": ["read"]})

        async def full(*_: object, **__: object) -> None:
            raise LlorchError(Code.INSUFFICIENT_STORAGE, "no room for the record")

        with monkeypatch.context() as patch:
            patch.setattr(control.control.audit, "require", full)
            assert code(await control.sign("a", token=token)) == (507, "INSUFFICIENT_STORAGE")
            assert code(await control.admin("POST", "/v2/tokens", {})) == (507, "INSUFFICIENT_STORAGE")
            revoked = await control.admin("DELETE", f"/v2/tokens/{made['id']}")
            assert (revoked[0], revoked[1]) == (200, {"revoked": [made["id"]]}), "rights are taken away all the same"
        assert code(await control.ask("GET", "/v2/nodes", token=made["token"])) == (401, "UNAUTHENTICATED")
        assert "a" not in control.authority.trust.issued
        assert (await control.sign("a", token=token))[0] == 200


async def test_a_spent_token_and_a_bad_request_put_nothing_on_record_as_allowed(tmp_path: Path) -> None:
    async with trusted(tmp_path, rate_failures=0) as control:
        token = await control.join_token()
        assert (await control.sign("a", token=token))[0] == 200
        for node_id, csr in (("control-room", "x"), ("b", pki.make_request(pki.make_key(), "b").decode())):
            body = {"node_id": node_id, "csr": csr}
            assert (await control.ask("POST", "/v2/nodes/csr", body, token=token))[0] in (400, 401)
        await control.join_token()  # what comes later is there, so what came before is
        await eventually(lambda: len([1 for one in on_record(control) if one["event"] == "token.created"]) == 2)
        assert [one["node_id"] for one in on_record(control) if one["event"] == "certificate.issued"] == ["a"]


async def test_a_leaked_token_is_revoked_by_its_own_text_which_is_written_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    async with trusted(tmp_path) as control:
        _, made = await control.admin("POST", "/v2/tokens", {"scopes": ["read"]})
        text = made["token"]
        assert (await control.ask("DELETE", f"/v2/tokens/{text}", token=text))[0] == 403
        assert (await control.ask("DELETE", f"/v2/tokens/{text}"))[0] == 401
        assert (await control.admin("DELETE", f"/v2/tokens/{text}"))[1] == {"revoked": [made["id"]]}
        assert code(await control.ask("GET", "/v2/nodes", token=text)) == (401, "UNAUTHENTICATED")
        await eventually(lambda: recorded(control, "token.revoked", token_id=made["id"]))
        await eventually(lambda: len([1 for one in on_record(control) if one["event"] == "auth.failed"]) >= 3)
        whole = (control.folder / "c" / "audit" / "audit.jsonl").read_text()
    for where in (whole, caplog.text):
        assert text not in where
        assert text.split(".")[1][:20] not in where


async def test_tokens_without_a_name_are_principals_of_their_own(tmp_path: Path) -> None:
    async with trusted(tmp_path) as control:
        made = [(await control.admin("POST", "/v2/tokens", {}))[1] for _ in range(2)]
        assert len({one["name"] for one in made}) == 2
        assert [one["name"] for one in made] == [one["id"] for one in made]


async def test_a_node_with_a_certificate_is_never_told_the_service_token(tmp_path: Path) -> None:
    async with trusted(tmp_path) as control:
        pair = control.pair("a")
        body = registration("a") | {"address": "http://127.0.0.1:9"}
        answer = await control.ask("POST", "/v2/nodes/register", body, pair=pair)
        assert code(answer) == (422, "UNTRUSTED_ADDRESS")
        assert (await control.ask("POST", "/v2/nodes/register", registration("a"), pair=pair))[0] == 200
        with pytest.raises(LlorchError, match="by https alone"):
            control.control.nodes._request("a", "GET", "http://127.0.0.1:9/v2/pools", {}, b"")


async def test_what_others_did_is_put_in_force_also_where_a_renewal_has_read_it_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with trusted(tmp_path) as control:
        access, noted = control.control.access, list[str]()
        monkeypatch.setattr(access, "noted", lambda event, _fields: noted.append(event))
        elsewhere = Authority.open(control.folder / "c", None, time.time())[0]
        elsewhere.rotate(time.time())
        elsewhere.revoke("b", time.time())
        TokenFiles(control.folder / "c").new(Wish(name="local"), time.time())
        before, token = access.pair, await control.join_token()  # reads the tokens
        assert (await control.sign("a", token=token))[0] == 200  # reads the authority
        await access.step()
        assert access.pair != before, "shown is a certificate of the new authority"
        assert sorted(noted) == ["authority.changed", "certificate.revoked", "token.created"]


async def test_who_is_served_is_ended_on_the_loop_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    async with trusted(tmp_path) as control:
        access = control.control.access
        monkeypatch.setattr(access.sessions, "end", lambda _good: threads.append(threading.get_ident()) or [])
        _, made = await control.admin("POST", "/v2/tokens", {})
        await control.admin("DELETE", f"/v2/tokens/{made['id']}")
        await access.step()
    assert set(threads) == {threading.get_ident()}
