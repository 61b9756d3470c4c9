"""Bearer tokens of the identity provider: whom they stand for, and which are refused."""

import base64
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from inference_gateway.oidc.tokens import LEEWAY_S
from policy.limits import Limits
from tests.inference_gateway.conftest import HOW, Running, wait_until
from tests.inference_gateway.oidc.conftest import Opening
from tests.inference_gateway.oidc.provider import CLIENT, Provider, Signer, unsigned
from tests.inference_gateway.support import run

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Where is the red boat?"}], "max_tokens": 2}


def ask(house: Running, token: str, path: str = "/v1/models", **body: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {token}".encode("latin-1")}
    with house.http() as http:
        return http.post(path, json=body, headers=headers) if body else http.get(path, headers=headers)


def refused(house: Running, token: str) -> str:
    """The message with which the token is refused."""
    response = ask(house, token)
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("authentication_error", None, "token_invalid")
    before, after = "the token is not accepted: ", "; log in again with the identity provider"
    assert error["message"].startswith(before) and error["message"].endswith(after)
    return str(error["message"][len(before) : -len(after)])


@pytest.mark.parametrize("signer", [0, 1, 2], ids=["RS256", "ES256", "EdDSA"])
def test_a_token_is_good_for_what_its_user_may_use(house: Running, provider: Provider, signer: int) -> None:
    token = provider.token(provider.signers[signer])
    models = [entry["id"] for entry in ask(house, token).json()["data"]]
    assert models == ["tiny", "silo:alpha"]
    bob = provider.token(provider.signers[signer], sub="bob")
    assert [entry["id"] for entry in ask(house, bob).json()["data"]] == ["tiny"]


def test_a_token_is_good_at_every_route_that_takes_a_chat_key(house: Running, provider: Provider) -> None:
    token = provider.token()
    assert ask(house, token, "/v1/chat/completions", **BODY).status_code == 200
    assert ask(house, token, "/v1/completions", model="tiny", prompt="a", max_tokens=1).status_code == 200
    assert ask(house, token, "/tokenize", prompt="a").status_code == 200
    assert ask(house, token, "/detokenize", tokens=[5]).status_code == 200
    assert ask(house, token, "/v1/openapi.json").status_code == 200
    assert ask(house, token, "/v1/models/silo:alpha").status_code == 200


def test_keys_count_as_before_and_the_provider_never_hears_of_them(house: Running, provider: Provider) -> None:
    assert ask(house, house.world.keys["alice"]).status_code == 200
    for unknown in ("seqr_aaaaaaaa_" + "x" * 43, "nonsense", "a.b", "a.b.c.d"):
        assert ask(house, unknown).json()["error"]["code"] == "key_unknown"
    assert provider.asked == []


def _with(**claims: Any) -> Callable[[Provider], str]:
    return lambda provider: provider.token(**claims)


def _header(**header: Any) -> Callable[[Provider], str]:
    return lambda provider: provider.token(header=header)


def _claims(provider: Provider) -> dict[str, Any]:
    now = int(time.time())
    return {"iss": provider.issuer, "aud": CLIENT, "sub": "alice", "iat": now, "exp": now + 300}


def _by_hand(algorithm: str) -> Callable[[Provider], str]:
    return lambda provider: unsigned({"alg": algorithm, "kid": "first", "typ": "JWT"}, _claims(provider))


def _public_key_as_secret(provider: Provider) -> str:
    """Algorithm confusion: HS256 with the public key, which everybody knows, as the secret (RFC 8725, section 2.1)."""
    pem = provider.first.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    signed = unsigned({"alg": "HS256", "kid": "first", "typ": "JWT"}, _claims(provider)).rpartition(".")[0]
    mac = hmac.new(pem, signed.encode(), hashlib.sha256).digest()
    return f"{signed}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"


def _signature_of_another(provider: Provider) -> str:
    mine, other = provider.token(sub="bob"), provider.token()
    return f"{mine.rpartition('.')[0]}.{other.rpartition('.')[2]}"


def _key_of_another_kind(provider: Provider) -> str:
    return provider.token(provider.signers[1], header={"kid": "first"})


def _stranger(provider: Provider) -> str:
    return provider.token(Signer.generate("unheard-of"))


def _impostor(provider: Provider) -> str:
    return provider.token(Signer.generate("first"))


def _no_object(provider: Provider) -> str:
    return unsigned({"alg": "RS256", "kid": "first"}, ["alice"], b"signature")  # type: ignore[arg-type]


NOW = int(time.time())
SOMEBODY_ELSE = "it was issued for somebody else than this gateway"
NO_KEY = "it is signed with a key that the identity provider does not have"
NOT_ALLOWED = "its algorithm is not one that this gateway allows"
REFUSED: dict[str, tuple[Callable[[Provider], str], str]] = {
    "expired": (_with(exp=NOW - 60), "it has expired"),
    "from the future": (_with(iat=NOW + 3600), "it is not valid yet"),
    "not valid yet": (_with(nbf=NOW + 3600), "it is not valid yet"),
    "times that are none": (_with(exp="soon"), "it is malformed"),
    "for another audience": (_with(aud="payroll"), SOMEBODY_ELSE),
    "for an audience in another case": (_with(aud=CLIENT.upper()), SOMEBODY_ELSE),
    "for several others": (_with(aud=["payroll", "wiki"], azp=CLIENT), SOMEBODY_ELSE),
    "for nobody": (_with(aud=None), "its claim aud is missing"),
    "without an end": (_with(exp=None), "its claim exp is missing"),
    "without a beginning": (_with(iat=None), "its claim iat is missing"),
    "without an issuer": (_with(iss=None), "its claim iss is missing"),
    "of another issuer": (
        lambda p: p.token(iss=p.issuer + "/"),
        "it was issued by somebody else than this gateway's identity provider",
    ),
    "of another client": (_with(azp="wiki"), "it was issued to another client (azp)"),
    "an access token of another client": (
        lambda p: p.token(client_id="wiki", header={"typ": "at+jwt"}),
        "it was issued to another client (client_id)",
    ),
    "an access token of another client, by the type's long name": (
        lambda p: p.token(client_id="wiki", azp=CLIENT, header={"typ": "application/AT+JWT"}),
        "it was issued to another client (client_id)",
    ),
    "an access token of no client": (
        lambda p: p.token(header={"typ": "at+jwt"}),
        "it was issued to another client (client_id)",
    ),
    "for several, of no client": (_with(aud=[CLIENT, "wiki"]), "it was issued to another client (azp)"),
    "without a user": (_with(sub=None), "its claim sub is missing or no user id"),
    "of a user that is no id": (_with(sub="al\x00ice"), "its claim sub is missing or no user id"),
    "bound to a key": (
        _with(cnf={"jkt": "x"}),
        "it is bound to a key of its owner's (cnf), which this gateway cannot ask for",
    ),
    "of an event": (_with(events={"logout": {}}), "it tells of an event and logs nobody in"),
    "a log-out token": (_header(typ="logout+jwt"), "it is neither an ID token nor an access token"),
    "a type that is none": (_header(typ=7), "it is neither an ID token nor an access token"),
    "unsigned": (_by_hand("none"), NOT_ALLOWED),
    "unsigned, in disguise": (_by_hand("nOnE"), NOT_ALLOWED),
    "the public key as secret": (_public_key_as_secret, NOT_ALLOWED),
    "the signature of another": (_signature_of_another, "its signature is wrong"),
    "an impostor's": (_impostor, "its signature is wrong"),
    "without a signature": (_by_hand("RS256"), "its signature is wrong"),
    "no claims": (_no_object, "its signature is wrong"),
    "a key of another kind": (_key_of_another_kind, NO_KEY),
    "a stranger's": (_stranger, NO_KEY),
    "a critical header nobody knows": (_header(crit=["b64x"], b64x=1), "it is no JSON Web Token"),
    "no token": (lambda _: "a.b.c", "it is no JSON Web Token"),
    "no text": (lambda _: "é.é.é", "it is no JSON Web Token"),
    "too long": (lambda _: "e" * 20_000 + "..", "it is longer than 16384 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_token_that_must_not_count_is_refused_with_the_reason(house: Running, provider: Provider, name: str) -> None:
    make, reason = REFUSED[name]
    assert ask(house, provider.token()).status_code == 200
    assert refused(house, make(provider)) == reason


def test_the_times_may_be_off_by_half_a_minute(house: Running, provider: Provider) -> None:
    now = int(time.time())
    assert ask(house, provider.token(exp=now - 10, iat=now + 10, nbf=now + 10)).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_token_that_expires_ends_what_is_being_written_for_it_and_nothing_else(
    house: Running, provider: Provider, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    steps, together = house.service.serving.engine.steps, 0
    ends, begin = int(time.time()) + 5, steps.begin

    def hold(batch: Any) -> Any:
        nonlocal together
        together += sum(one.predicts for one in batch.slices) == 2
        if together == 8:  # both answers are being written
            time.sleep(max(0.0, ends + 0.1 - time.time()))
        return begin(batch)

    def answer(token: str) -> httpx.Response:
        return ask(house, token, "/v1/chat/completions", **BODY | {"max_tokens": 300, "stream": stream})

    monkeypatch.setattr(steps, "begin", hold)
    with ThreadPoolExecutor(2) as pool:
        short = pool.submit(answer, provider.token(exp=ends - LEEWAY_S))
        whole = pool.submit(answer, provider.token())
        ended, other = short.result(), whole.result()
    assert together >= 8 and ended.status_code == (200 if stream else 401)
    told = [line.removeprefix("data: ") for line in ended.text.splitlines() if line.startswith("data: {")]
    error = json.loads(told[-1] if stream else ended.text)["error"]
    assert (error["code"], error["type"]) == ("access_ended", "authentication_error")
    assert other.status_code == 200 and ("data: [DONE]" in other.text if stream else other.json()["choices"])


def test_a_token_may_end_beyond_the_calendar(house: Running, provider: Provider) -> None:
    assert ask(house, provider.token(exp=10**15)).status_code == 200


def test_one_of_several_audiences_is_enough_where_the_client_is_this_one(house: Running, provider: Provider) -> None:
    assert ask(house, provider.token(aud=["wiki", CLIENT], azp=CLIENT)).status_code == 200
    assert ask(house, provider.token(aud=[CLIENT])).status_code == 200


def test_unknown_disabled_and_unentitled_users_get_one_and_the_same_answer(house: Running, provider: Provider) -> None:
    answers = [ask(house, provider.token(sub=user)) for user in ("nobody-knows", "dora", "clerk", "Alice", "ALICE")]
    assert {answer.status_code for answer in answers} == {401}
    bodies = {answer.text for answer in answers}
    assert len(bodies) == 1
    error = json.loads(bodies.pop())["error"]
    assert error["code"] == "login_not_accepted"
    assert error["message"] == "You are not logged in as an active user who may ask this gateway; ask an admin."


def test_a_user_who_is_disabled_is_out_at_the_next_request_and_nobody_is_made(
    house: Running, provider: Provider
) -> None:
    policy, token = house.world.policy, provider.token(sub="erin")
    before = policy.version()
    assert ask(house, token).status_code == 401
    assert policy.version() == before
    policy.create_user("erin", **HOW)
    assert ask(house, token).status_code == 200
    policy.disable_user("erin", **HOW)
    assert ask(house, token).status_code == 401
    policy.enable_user("erin", **HOW)
    policy.set_roles("erin", ["auditor"], **HOW)
    assert ask(house, token).status_code == 401


def test_no_token_reads_the_metrics_not_even_an_admins(house: Running, provider: Provider) -> None:
    house.world.policy.create_user("root", ["admin"], **HOW)
    assert ask(house, provider.token(sub="root")).status_code == 200
    response = ask(house, provider.token(sub="root"), "/metrics")
    assert (response.status_code, response.json()["error"]["code"]) == (401, "key_unknown")


def test_the_users_limits_count_for_keys_and_tokens_together(house: Running, provider: Provider) -> None:
    house.world.policy.set_limits("user:carol", Limits(requests_per_minute=2), **HOW)
    token = provider.token(sub="carol")
    assert ask(house, token, "/v1/chat/completions", **BODY).status_code == 200
    assert ask(house, house.world.keys["carol"], "/v1/chat/completions", **BODY).status_code == 200
    response = ask(house, token, "/v1/chat/completions", **BODY)
    assert response.status_code == 429
    assert response.json()["error"]["message"].startswith("your limit of 2 requests per minute is reached")


def test_tokens_are_in_no_log_line(house: Running, provider: Provider, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = provider.token(), provider.token(aud="payroll")
    with caplog.at_level(logging.DEBUG):
        assert ask(house, good).status_code == 200
        refused(house, bad)

        def mine() -> list[str]:
            lines = [str(record.__dict__) for record in list(caplog.records)]
            return [line for line in lines if "httpcore" not in line and "'name': 'httpx'" not in line]

        wait_until(lambda: any("'login': 'token'" in line and "'user': 'alice'" in line for line in mine()))
    for token in (good, bad):
        assert not any(part in line for line in mine() for part in token.split("."))


@pytest.mark.parametrize(
    ("claims", "status"),
    [
        ({"email": "alice", "email_verified": True}, 503),
        ({"email": "alice", "email_verified": False}, 401),
        ({"email": "alice", "email_verified": "true"}, 401),
        ({"email": "alice"}, 401),
        ({"email_verified": True}, 401),
    ],
)
def test_an_e_mail_address_names_a_user_only_if_the_provider_has_verified_it(
    opening: Opening, provider: Provider, claims: dict[str, Any], status: int
) -> None:
    async def asking() -> httpx.Response:
        async with opening(user_claim="email") as client:
            token = provider.token(sub="bob", **claims)
            return await client.get("/v1/models", headers={"Authorization": f"Bearer {token}"})

    assert run(asking()).status_code == status


def test_an_audience_of_its_own_takes_the_place_of_the_client_id(opening: Opening, provider: Provider) -> None:
    async def asking() -> list[int]:
        async with opening(audience="https://gateway.example/api", algorithms=["ES256"]) as client:
            by = provider.signers[1]
            tokens = [
                provider.token(by, aud="https://gateway.example/api", azp=CLIENT, header={"typ": "at+jwt"}),
                provider.token(by, aud="https://gateway.example/api", client_id=CLIENT, header={"typ": "at+jwt"}),
                provider.token(by),
                provider.token(aud="https://gateway.example/api"),
            ]
            heads = [{"Authorization": f"Bearer {token}"} for token in tokens]
            return [(await client.get("/v1/models", headers=head)).status_code for head in heads]

    assert run(asking()) == [503, 503, 401, 401]
