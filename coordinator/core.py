"""What the parts of one coordinator share: its databases, its key, its vault. Opened once per process."""

from dataclasses import dataclass
from functools import cached_property

from sqlalchemy import Engine

from coordinator.db import open_engine, require_schema
from coordinator.settings import Settings, require_state
from coordinator.subjects import Subjects
from coordinator.vault import Keystore, Vault
from policy.db import create_engine_for
from policy.db import require_schema as require_policy_schema
from policy.keys import load_pepper
from policy.reader import PolicyReader
from policy.store import PolicyStore
from policy.transaction import named_database_errors
from seqr.keys import SigningKey


@dataclass(frozen=True)
class Coordinator:
    """Threads may share it. The ServerApp's process opens its own and needs neither policy nor pepper."""

    settings: Settings
    engine: Engine
    key: SigningKey
    keystore: Keystore
    vault: Vault
    subjects: Subjects

    @cached_property
    def policy_engine(self) -> Engine:
        return create_engine_for(self.settings.policy_database_url)

    @cached_property
    def policy(self) -> PolicyStore:
        return PolicyStore(self.policy_engine)

    @cached_property
    def reader(self) -> PolicyReader:
        return PolicyReader(self.policy_engine, load_pepper(self.settings.policy_pepper_file))

    def require_policy(self) -> None:
        """Raises a PolicyError unless the policy database and the pepper are there and usable."""
        with named_database_errors(), self.policy_engine.connect() as connection:
            require_policy_schema(connection)
        self.reader.version()

    def close(self) -> None:
        self.engine.dispose()
        if "reader" in self.__dict__:
            self.reader.close()
        if "policy_engine" in self.__dict__:
            self.policy_engine.dispose()


def open_coordinator(settings: Settings) -> Coordinator:
    """Open the coordinator whose state lies in ``settings.directory``.

    Raises StateDirMissing, DatabaseUnusable, SchemaOutdated.
    """
    require_state(settings)
    engine = open_engine(settings.database_url)
    require_schema(engine)
    keystore = Keystore(settings.keystore)
    return Coordinator(
        settings=settings,
        engine=engine,
        key=SigningKey.load(settings.signing_key_file),
        keystore=keystore,
        vault=Vault(settings.bundles, keystore),
        subjects=Subjects(settings.subject_salt_file.read_bytes(), keystore),
    )
