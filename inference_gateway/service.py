"""Everything one gateway holds while it runs, and the order in which it comes up."""

import asyncio
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from inference_gateway.admission import Admission
from inference_gateway.coordinator_client import CoordinatorClient
from inference_gateway.engine.base import AdapterKey, Engine
from inference_gateway.errors import (
    BaseModelMismatch,
    CoordinatorRefused,
    CoordinatorUnreachable,
    GatewayKeyNotInPlan,
    NotReady,
    SettingsInvalid,
    StartFailed,
)
from inference_gateway.intake import Intake
from inference_gateway.metrics import Metrics
from inference_gateway.oidc.login import Oidc
from inference_gateway.permissions import Permissions
from inference_gateway.settings import Settings, read_secret
from inference_gateway.tracing import Tracing, tracing_of
from inference_gateway.turns import Turns
from policy.db import create_engine_for
from policy.keys import load_pepper
from seqr.canonical import canonical_json, sha256_hex
from seqr.errors import SeqrError
from seqr.frame import ChatFrame
from seqr.keys import SealingKey, SigningKey, VerifyKey
from seqr.plan import Plan, verify_plan
from seqr.public_text import calibration_texts, chat_frame

if TYPE_CHECKING:  # needs torch
    from inference_gateway.grammar import Grammars

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Serving:
    """What requests need once the model is loaded."""

    plan: Plan
    engine: Engine
    tokenizer: Any
    intake: Intake
    # What every conversation begins and ends with: no evidence of anything.
    frame: ChatFrame
    grammars: "Grammars"
    vocabulary: int
    eos: tuple[int, ...]

    def resident(self) -> Mapping[str, AdapterKey]:
        """The adapters that new requests can use, by silo."""
        return {key.silo_id: key for key in self.engine.info().adapters}

    def library_version(self, keys: frozenset[AdapterKey]) -> str:
        """A digest over what a caller may use and nothing else, so that it says nothing about other silos."""
        used = [[key.silo_id, key.revision, key.digest] for key in sorted(keys)]
        return sha256_hex(canonical_json({"plan": self.plan.plan_id, "adapters": used}))[:16]


class Service:
    """One gateway. ``start`` returns at once; ``serving`` is there when model, engine and first intake pass are."""

    def __init__(
        self,
        settings: Settings,
        client: CoordinatorClient | None = None,
        tracing: Tracing | None = None,
        oidc: Oidc | None = None,
    ):
        self.settings = settings
        self.tracing = tracing or tracing_of(settings)
        self.oidc = oidc or (Oidc(settings.oidc, settings.directory) if settings.oidc is not None else None)
        self._client = client or CoordinatorClient(
            settings.coordinator_url,
            read_secret(settings.coordinator_key_file, "coordinator_key_file", "the gateway's API key"),
            settings.coordinator_ca_file,
        )
        self._coordinator_key = VerifyKey.from_b64(settings.coordinator_public_key)
        self._sealing_key = SealingKey.load(settings.sealing_key_file)
        self._signing_key = SigningKey.load(settings.signing_key_file)
        self._database = create_engine_for(settings.policy_database_url)
        holds = None if self.oidc is None else self.oidc.sessions.holds
        self.permissions = Permissions(self._database, load_pepper(settings.policy_pepper_file), login_holds=holds)
        self.metrics = Metrics()
        self.admission = Admission(settings, self.metrics)
        self.metrics.watch(self)
        self.turns = Turns(self.metrics)
        self._serving: Serving | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.failure: SeqrError | None = None
        self.waiting_for: str = "the coordinator's plan"
        self.failed = asyncio.Event()

    def start(self) -> None:
        self._tasks.append(asyncio.create_task(self._come_up(), name="gateway start"))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._serving is not None:
            await self._serving.engine.stop()
        await self._client.aclose()
        if self.oidc is not None:
            await self.oidc.aclose()
        self.permissions.close()
        self._database.dispose()
        await asyncio.to_thread(self.tracing.stop)

    @property
    def loaded(self) -> Serving | None:
        """What is there to serve with, ready or not; None while the model is being loaded."""
        return self._serving

    @property
    def serving(self) -> Serving:
        """Raises NotReady until model and engine are there and every active revision has been seen to."""
        problem = self.problem()
        if self._serving is None or problem is not None:
            raise NotReady(f"the gateway is not ready: {problem or self.waiting_for}")
        return self._serving

    def problem(self) -> str | None:
        """Why the gateway cannot serve now, in words for everybody: the log has the particulars. None when it can."""
        if self.failure is not None:
            return f"it could not start ({self.failure.code})"
        if self._serving is None:
            return f"it waits for {self.waiting_for}"
        if not self._serving.engine.info().alive:
            return "the engine's worker has stopped"
        if not self._serving.intake.status.settled:
            return "it waits for the active revisions"
        return None

    async def _come_up(self) -> None:
        try:
            plan = await self._plan()
            self.waiting_for = "the base model"
            # In a thread that ends, and OpenMP's pool with it: the engine's is to be the only one (decision 16).
            once = ThreadPoolExecutor(1, "gateway start")
            try:
                serving = await asyncio.get_running_loop().run_in_executor(once, self._build, plan)
            finally:
                once.shutdown(wait=False)
            await serving.engine.start()
            self._serving = serving
            self._tasks.append(
                asyncio.create_task(serving.intake.run(self.settings.poll_seconds), name="gateway intake")
            )
        except SeqrError as error:
            log.error("the gateway cannot start: %s: %s", error.code, error)
            self._fail(error)
        except Exception as error:
            log.exception("the gateway cannot start")
            self._fail(
                StartFailed(f"the gateway cannot start because of an unexpected {type(error).__name__}: {error}")
            )

    def _fail(self, why: SeqrError) -> None:
        self.failure = why
        self.failed.set()

    async def _plan(self) -> Plan:
        """The current plan, verified. Waits for the coordinator; a plan that does not verify is an error at once."""
        told = ""
        while True:
            try:
                return verify_plan(await self._client.plan(), self._coordinator_key)
            except (CoordinatorUnreachable, CoordinatorRefused) as error:
                if told != str(error):
                    log.warning("the gateway waits: %s", error)
                told = str(error)
            await asyncio.sleep(self.settings.poll_seconds)

    def _build(self, plan: Plan) -> Serving:
        import torch

        from inference_gateway.engine.transformers_engine import EngineLimits, TransformersEngine
        from inference_gateway.grammar import Grammars
        from seqr.logs import adopt
        from seqr.models import base_model_digest, load_base_model
        from seqr.public_calibration import collect_z
        from seqr.routed_linear import adapt_model
        from seqr.routing.optional import compiled
        from seqr.shared_a import verify_a

        adopt("transformers", "ContinuousBatchingLogger")
        settings = self.settings
        if self._sealing_key.public.to_b64() not in {key.sealing_key for key in plan.gateway_keys}:
            raise GatewayKeyNotInPlan(
                f"plan {plan.plan_id} does not name this gateway's key {self._sealing_key.public.key_id}; "
                f"make a plan with {settings.public_key_file.name}"
            )
        path = settings.base_model
        if path is None:
            raise SettingsInvalid("base_model must be set")
        digest = base_model_digest(path)
        if digest != plan.base_model_digest:
            raise BaseModelMismatch(
                f"the base model at {path} has digest {digest}, plan {plan.plan_id} was made for "
                f"{plan.base_model_digest} ({plan.base_model})"
            )
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        a = verify_a(plan)
        device = choose_device(settings)
        model, tokenizer = load_base_model(path, getattr(torch, plan.dtype), "sdpa")
        model.to(device)
        if compiled is not None and device == "cpu":
            compiled.compile_now()
        self.waiting_for = "calibration on public text"
        z = collect_z(model, calibration_texts(tokenizer), plan, a)
        adapt_model(model, plan, a)
        limits = EngineLimits(
            settings.max_concurrent,
            settings.max_batch_tokens,
            settings.kv_tokens,
            max_model_length=settings.max_model_length,
            prefix_sharing=settings.prefix_sharing,
            deterministic=settings.deterministic,
            threads=torch.get_num_threads(),
        )
        eos, vocabulary = _eos(model, tokenizer), int(model.get_output_embeddings().weight.shape[0])
        grammars = Grammars(tokenizer, vocabulary, eos)
        engine = TransformersEngine(model, plan, self.permissions, eos, limits, grammars.matcher)
        self.waiting_for = "the engine"
        intake = Intake(self._client, engine, plan, self._sealing_key, self._signing_key, z)
        return Serving(plan, engine, tokenizer, intake, chat_frame(tokenizer), grammars, vocabulary, tuple(eos))


def choose_device(settings: Settings) -> str:
    """``cpu`` or ``cuda``, by the setting ``device``. Raises ``SettingsInvalid``."""
    import torch

    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() and not settings.deterministic else "cpu"
    if settings.device == "cuda" and settings.deterministic:
        raise SettingsInvalid('deterministic serving is for CPUs only: set device to "cpu"')
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsInvalid('device is "cuda", and torch finds no CUDA device here')
    return settings.device


def _eos(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the model's and the tokenizer's."""
    ids = model.generation_config.eos_token_id
    found = set(ids if isinstance(ids, list) else [ids]) | {tokenizer.eos_token_id}
    return sorted(token for token in found if token is not None)
