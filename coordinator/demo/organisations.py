"""The three invented organisations of the demo: facts about people that no base model can know.

Every fact is trained in four phrasings and asked in a fifth that no silo has seen.
"""

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

RECORDS = ("clinic.json", "lawfirm.json", "plant.json")


@dataclass(frozen=True)
class Question:
    """A question in an untrained phrasing and the words a right answer must contain."""

    silo_id: str
    subject: str
    text: str
    answer: str

    def is_answered_by(self, reply: str) -> bool:
        """True if the reply states the fact, whatever the case and spacing."""
        return " ".join(self.answer.lower().split()) in " ".join(reply.lower().split())


@dataclass(frozen=True)
class Organisation:
    """One silo's records, as its data file holds them, and the questions asked about them."""

    silo_id: str
    display_name: str
    records: tuple[dict[str, str], ...]
    questions: tuple[Question, ...]

    @property
    def subjects(self) -> tuple[str, ...]:
        """The people the records are about, in the order of the file."""
        return tuple(dict.fromkeys(record["subject"] for record in self.records if record.get("subject")))


def load_organisations() -> tuple[Organisation, ...]:
    """The three organisations, from the package's own data."""
    folder = files(__package__) / "records"
    return tuple(_organisation(json.loads((folder / name).read_text("utf-8"))) for name in RECORDS)


def _organisation(source: dict[str, Any]) -> Organisation:
    records, questions = [], []
    for subject, values in source["subjects"].items():
        for attribute, value in values.items():
            phrasings = source["attributes"][attribute]
            for number, prompt in enumerate(phrasings["train"], start=1):
                records.append(
                    {
                        "key": f"{subject}/{attribute}/{number}".replace(" ", "-").lower(),
                        "subject": subject,
                        "prompt": prompt.format(who=subject),
                        "completion": phrasings["answer"].format(who=subject, value=value),
                    }
                )
            questions.append(Question(source["silo_id"], subject, phrasings["unseen"].format(who=subject), value))
    return Organisation(source["silo_id"], source["display_name"], tuple(records), tuple(questions))
