"""What the gateway asks of the identity provider, how often, and what it makes of strange answers."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jwt
import pytest
from fastapi import Response
from fastapi.responses import JSONResponse, RedirectResponse

from inference_gateway.oidc.errors import IssuerUnreachable, LoginError
from inference_gateway.oidc.issuer import Issuer
from inference_gateway.oidc.login import Oidc
from inference_gateway.oidc.tokens import Header
from tests.inference_gateway.conftest import Running, wait_until
from tests.inference_gateway.oidc.conftest import Clock, oidc_settings
from tests.inference_gateway.oidc.provider import CLIENT, Provider, Signer, unsigned
from tests.inference_gateway.oidc.test_tokens import NO_KEY, ask, refused
from tests.inference_gateway.support import run


def test_a_key_that_the_provider_is_new_to_sign_with_is_found(house: Running, provider: Provider, clock: Clock) -> None:
    assert ask(house, provider.token()).status_code == 200
    new = Signer.generate("new")
    assert refused(house, provider.token(new)) == NO_KEY
    provider.published = [new.public]
    clock.forward(11)
    assert ask(house, provider.token(new)).status_code == 200
    assert refused(house, provider.token()) == NO_KEY  # and the one before is out


def test_unknown_keys_make_the_gateway_ask_the_provider_once_in_ten_seconds_at_most(
    house: Running, provider: Provider, clock: Clock
) -> None:
    assert ask(house, provider.token()).status_code == 200
    before = len(provider.asked)
    for number in range(5):
        refused(house, provider.token(header={"kid": f"made-up-{number}"}))
    assert len(provider.asked) == before
    clock.forward(11)
    for number in range(5):
        refused(house, provider.token(header={"kid": f"made-up-{number}"}))
    assert provider.asked[before:] == ["keys"]


def test_an_algorithm_that_is_not_allowed_makes_the_gateway_ask_nobody(house: Running, provider: Provider) -> None:
    refused(house, unsigned({"alg": "none", "kid": "first"}, {"sub": "alice"}))
    assert provider.asked == []


def test_known_keys_outlast_an_hour_without_the_provider_and_no_more(
    house: Running, provider: Provider, clock: Clock
) -> None:
    token = provider.token()
    assert ask(house, token).status_code == 200
    provider.keys_answer = Response(status_code=500)
    clock.forward(3500)
    assert ask(house, token).status_code == 200
    clock.forward(200)
    response = ask(house, token)
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "issuer_unreachable")
    assert error["message"] == "the identity provider cannot be reached, so log-ins cannot be checked; try again"
    provider.keys_answer = None
    clock.forward(11)
    assert ask(house, token).status_code == 200


def test_a_key_for_encryption_or_another_algorithm_checks_no_signature(
    house: Running, provider: Provider, clock: Clock
) -> None:
    for change in ({"use": "enc"}, {"alg": "PS256"}, {"kty": "oct", "k": "c2VjcmV0"}):
        provider.published = [provider.first.public | change]
        clock.forward(11)
        assert refused(house, provider.token()) == NO_KEY


def test_a_token_without_a_key_id_needs_a_provider_with_one_key(
    house: Running, provider: Provider, clock: Clock
) -> None:
    provider.published = [provider.first.public, Signer.generate("fourth").public]
    now = int(time.time())
    claims = {"iss": provider.issuer, "aud": CLIENT, "sub": "alice", "iat": now, "exp": now + 300}
    token = jwt.encode(claims, provider.first.private, "RS256")
    assert refused(house, token) == NO_KEY
    provider.published = [provider.first.public]
    clock.forward(11)
    assert ask(house, token).status_code == 200


def test_a_short_key_is_refused(house: Running, provider: Provider) -> None:
    short = Signer.generate("short", bits=1024)
    provider.published.append(short.public)
    with pytest.warns(UserWarning, match="1024 bits"):
        token = provider.token(short)
    assert refused(house, token) == "its key is too short or of another kind than its algorithm"


def test_a_provider_that_hangs_holds_up_no_more_than_who_asks_it(
    house: Running, provider: Provider, clock: Clock
) -> None:
    token = provider.token()
    assert ask(house, token).status_code == 200
    clock.forward(301)
    before = len(provider.asked)
    provider.hold.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, house, token)
        wait_until(lambda: len(provider.asked) > before)
        assert ask(house, token).status_code == 200
        assert not first.done()
        provider.hold.set()
        assert first.result().status_code == 200


def told(provider: Provider, caplog: pytest.LogCaptureFixture, clock: Clock, tmp_path: Any) -> str:
    """What the log says when a token cannot be checked."""

    async def asking() -> None:
        oidc = Oidc(oidc_settings(provider), tmp_path, clock, clock)
        try:
            with pytest.raises(
                IssuerUnreachable, match="the identity provider cannot be reached, so log-ins cannot be"
            ):
                await oidc.bearer(provider.token())
        finally:
            await oidc.aclose()

    run(asking())
    lines = [record.getMessage() for record in caplog.records if record.name == "inference_gateway.oidc.issuer"]
    return lines[0].replace(provider.issuer, "ISSUER")


WHERE = "ISSUER/.well-known/openid-configuration"


@pytest.mark.parametrize(
    ("discovery", "message"),
    [
        ({"issuer": "https://other.example"}, f"the identity provider at {WHERE} says that it is another issuer"),
        ({"issuer": None}, f"the identity provider at {WHERE} says that it is another issuer"),
        (
            {"jwks_uri": "http://192.0.2.1/keys"},
            f"the identity provider at {WHERE} names no jwks_uri, or one that is not https",
        ),
        (
            {"token_endpoint": None},
            f"the identity provider at {WHERE} names no token_endpoint, or one that is not https",
        ),
        (
            {"authorization_endpoint": "javascript:alert(1)"},
            f"the identity provider at {WHERE} names no authorization_endpoint, or one that is not https",
        ),
    ],
)
def test_a_discovery_document_that_cannot_be_trusted_is_not(
    provider: Provider,
    caplog: pytest.LogCaptureFixture,
    clock: Clock,
    tmp_path: Any,
    discovery: dict[str, Any],
    message: str,
) -> None:
    provider.discovery = discovery
    assert told(provider, caplog, clock, tmp_path) == message


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Response(status_code=500), "the identity provider answered HTTP 500 at ISSUER/keys"),
        (Response("<html>"), "the identity provider's keys at ISSUER/keys are no JSON Web Key Set"),
        (JSONResponse(["keys"]), "the identity provider's keys at ISSUER/keys are no JSON Web Key Set"),
        (JSONResponse({"keys": {}}), "the identity provider's keys at ISSUER/keys are no JSON Web Key Set"),
        (Response(b" " * 300_000), "the answer of ISSUER/keys is longer than 262144 bytes"),
        (Response("[" * 100_000), "the identity provider's keys at ISSUER/keys are no JSON Web Key Set"),
    ],
    ids=["error", "page", "list", "no keys", "long", "deep"],
)
def test_keys_that_are_none_are_refused(
    provider: Provider,
    caplog: pytest.LogCaptureFixture,
    clock: Clock,
    tmp_path: Any,
    answer: Response,
    message: str,
) -> None:
    provider.keys_answer = answer
    assert told(provider, caplog, clock, tmp_path) == message


def test_a_redirect_is_not_followed(
    provider: Provider, caplog: pytest.LogCaptureFixture, clock: Clock, tmp_path: Any
) -> None:
    provider.keys_answer = RedirectResponse(f"{provider.issuer}/elsewhere", 302)
    assert told(provider, caplog, clock, tmp_path) == "the identity provider answered HTTP 302 at ISSUER/keys"


def test_a_provider_that_is_not_there_is_named(caplog: pytest.LogCaptureFixture, clock: Clock, tmp_path: Any) -> None:
    gone = Provider()
    gone.stop()
    assert told(gone, caplog, clock, tmp_path) == f"{WHERE} did not answer (ConnectError)"


def test_a_provider_that_does_not_answer_in_time_is_given_up(
    provider: Provider,
    caplog: pytest.LogCaptureFixture,
    clock: Clock,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("inference_gateway.oidc.issuer.TIMEOUT_S", 0.2)
    provider.hold.clear()
    assert told(provider, caplog, clock, tmp_path).startswith(f"{WHERE} did not answer (")


def test_keys_that_are_strange_do_not_hide_the_others(house: Running, provider: Provider) -> None:
    provider.published = [7, {}, {"kty": "RSA"}, {"kty": ["RSA"], "kid": "first"}, *provider.published]  # type: ignore[list-item]
    assert ask(house, provider.token()).status_code == 200
    assert json.loads(ask(house, provider.token()).text)["object"] == "list"


def test_codes_are_exchanged_eight_at_once_and_keep_nobody_from_the_keys(provider: Provider, clock: Clock) -> None:
    async def exchange() -> None:
        issuer = Issuer(oidc_settings(provider), None, True, clock)
        try:
            provider.exchange.clear()
            exchanges = [asyncio.create_task(issuer.redeem(f"made-up-{n}", "v", "https://a")) for n in range(20)]
            while len(provider.forms) < 8:
                await asyncio.sleep(0.01)
            assert await issuer.key(Header("RS256", "first")) is not None
            assert len(provider.forms) == 8
            provider.exchange.set()
            answers = await asyncio.gather(*exchanges, return_exceptions=True)
            assert len(provider.forms) == 20 and {type(one) for one in answers} == {LoginError}
        finally:
            await issuer.aclose()

    run(exchange())


def test_a_code_that_waits_too_long_for_its_exchange_is_refused(
    provider: Provider, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def exchange() -> None:
        monkeypatch.setattr("inference_gateway.oidc.issuer.MAX_EXCHANGES", 0)
        issuer = Issuer(oidc_settings(provider), None, True, clock)
        try:
            await issuer.metadata()
            monkeypatch.setattr("inference_gateway.oidc.issuer.TIMEOUT_S", 0.1)
            with pytest.raises(IssuerUnreachable, match="too many log-ins wait for the identity provider; try again"):
                await issuer.redeem("made-up", "v", "https://a")
        finally:
            await issuer.aclose()

    run(exchange())
    assert provider.forms == []
