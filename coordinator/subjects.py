"""The person a deletion request is about: readable while the request is open, a salted hash afterwards.

The text is stored sealed under a key of its own. Destroying that key erases it from backups and from PostgreSQL's dead
rows too, which deleting a column does not.
"""

import hashlib
import hmac
import json

from coordinator.errors import SubjectInvalid
from coordinator.vault import Keystore, seal, unseal

MAX_SUBJECT = 512
SALT_BYTES = 32


class Subjects:
    """Seals, reveals and forgets subjects. ``salt`` is secret: names are few and an unsalted hash could be guessed."""

    def __init__(self, salt: bytes, keystore: Keystore) -> None:
        self._salt = salt
        self._keystore = keystore

    def hash(self, silo_id: str, subject: str) -> str:
        """HMAC-SHA256 (hex) that names this subject of this silo."""
        return hmac.new(self._salt, f"{silo_id}|{subject}".encode(), hashlib.sha256).hexdigest()

    def keep(self, request_id: str, subject: str, requested_by: str) -> bytes:
        """The sealed text, to be stored with the request; its key is made here."""
        text = json.dumps([subject, requested_by]).encode()
        return seal(self._keystore.create(request_id), text, request_id.encode())

    def reveal(self, request_id: str, sealed: bytes) -> tuple[str, str]:
        """Subject and requester; raises BundleDestroyed after ``forget``."""
        text = unseal(self._keystore.get(request_id), sealed, request_id.encode())
        subject, requested_by = json.loads(text)
        return subject, requested_by

    def forget(self, request_id: str) -> None:
        """Make the sealed text unreadable for good. Repeatable."""
        self._keystore.destroy(request_id)

    def remembers(self, request_id: str) -> bool:
        return self._keystore.holds(request_id)


def check_subject(subject: str) -> str:
    """Raises SubjectInvalid for what no signed order could carry; the text itself is not repeated."""
    if not 1 <= len(subject) <= MAX_SUBJECT or not subject.isprintable() or subject != subject.strip():
        raise SubjectInvalid(
            f"the subject must be 1 to {MAX_SUBJECT} printable characters without spaces at its ends; write it exactly "
            "as in the silo's subject column"
        )
    return subject
