"""Asking the gateway as an analyst does, many questions at a time, and counting what came back."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from coordinator.demo.organisations import Question
from seqr.errors import SeqrError

STREAMS = 32
MAX_TOKENS = 20


class AnswerRefused(SeqrError):
    """The gateway did not answer a question the demo expected it to answer."""

    code = "answer_refused"


@dataclass(frozen=True)
class Reply:
    """One answer, the silos its asker may use, and each silo's share of the answer's (token, layer) choices."""

    text: str
    permitted: tuple[str, ...]
    shares: dict[str, float]
    policy_version: str


@dataclass(frozen=True)
class Score:
    """How a set of questions went."""

    right: int
    asked: int
    owner_share: float

    @property
    def percent(self) -> float:
        """Right answers in percent of those asked."""
        return 100.0 * self.right / self.asked if self.asked else 0.0


class Analyst:
    """One user's key and the gateway it is used at."""

    def __init__(self, base_url: str, key: str, model: str):
        self._model = model
        self._client = httpx.Client(
            base_url=base_url, headers={"Authorization": f"Bearer {key}"}, timeout=httpx.Timeout(300.0)
        )

    def ask(self, text: str, routing: str | None = None) -> Reply:
        """One question, answered greedily. Raises ``AnswerRefused`` with the gateway's own sentence."""
        options: dict[str, object] = {"attribution": True}
        if routing is not None:
            options["routing"] = routing
        response = self._client.post(
            "/v1/chat/completions",
            json={
                "model": self._model,
                "messages": [{"role": "user", "content": text}],
                "max_tokens": MAX_TOKENS,
                "temperature": 0,
                "seqr": options,
            },
        )
        body = response.json()
        if response.status_code != httpx.codes.OK:
            raise AnswerRefused(f"the gateway answered {response.status_code}: {body['error']['message']}")
        return Reply(
            text=body["choices"][0]["message"]["content"].strip(),
            permitted=tuple(body["seqr"]["permitted"]),
            shares=body["seqr"]["answer_shares"] or {},
            policy_version=response.headers["x-seqr-policy-version"],
        )

    def ask_all(self, questions: Sequence[Question], routing: str | None = None) -> list[Reply]:
        """Every question, ``STREAMS`` at a time, answers in the order of the questions."""
        with ThreadPoolExecutor(STREAMS) as pool:
            return list(pool.map(lambda question: self.ask(question.text, routing), questions))


def score(questions: Sequence[Question], replies: Sequence[Reply]) -> Score:
    """Count right answers, and the mean share of choices that went to the silo that owns the fact."""
    pairs = list(zip(questions, replies, strict=True))
    return Score(
        right=sum(question.is_answered_by(reply.text) for question, reply in pairs),
        asked=len(pairs),
        owner_share=sum(reply.shares.get(question.silo_id, 0.0) for question, reply in pairs) / max(1, len(pairs)),
    )
