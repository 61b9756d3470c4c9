"""Every error a data owner can meet at a silo. Messages name files and lines, never what a record says."""

from seqr.errors import SeqrError


class SiloError(SeqrError):
    """Root of the silo's errors."""

    code = "silo_error"


class ConfigMissing(SiloError):
    code = "config_missing"


class ConfigInvalid(SiloError):
    code = "config_invalid"


class AlreadyInitialised(SiloError):
    code = "already_initialised"


class StateDamaged(SiloError):
    code = "state_damaged"


class SiloBusy(SiloError):
    code = "silo_busy"


class DataError(SiloError):
    """Something wrong in the owner's data. ``where`` is ``file:line``, or ``file`` where no line is to blame."""

    code = "data_invalid"

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")
        self.where = where


class DataFileMissing(DataError):
    code = "data_file_missing"


class DataFileBusy(DataError):
    """Somebody writes to the file while an erasure rewrites it."""

    code = "data_file_busy"


class FileEmpty(DataError):
    code = "file_empty"


class EncodingInvalid(DataError):
    code = "encoding_invalid"


class JsonBroken(DataError):
    code = "json_broken"


class CsvBroken(DataError):
    code = "csv_broken"


class ColumnUnknown(DataError):
    code = "column_unknown"


class FieldNotText(DataError):
    code = "field_not_text"


class FieldEmpty(DataError):
    code = "field_empty"


class KeyDuplicate(DataError):
    code = "key_duplicate"


class PromptTooLong(DataError):
    code = "prompt_too_long"


class RecordTooLong(DataError):
    code = "record_too_long"


class SubjectErased(DataError):
    """A row of a subject whose records were erased has come back."""

    code = "subject_erased"


class NoRecords(SiloError):
    code = "no_records"


NO_SUBJECT_COLUMN = (
    "no column says whose record a row is, so nobody's records can be erased: name it as subject_column in silo.toml"
)


class SubjectColumnMissing(SiloError):
    """No data file says whose record a row is, so nobody's records can be found."""

    code = "subject_column_missing"


class SubjectUnknown(SiloError):
    code = "subject_unknown"


class PlanMissing(SiloError):
    code = "plan_missing"


class PlanMismatch(SiloError):
    """The order speaks of another plan than the one that came with it."""

    code = "plan_mismatch"


class BaseModelMissing(SiloError):
    code = "base_model_missing"


class BaseModelMismatch(SiloError):
    code = "base_model_mismatch"


class ModuleMismatch(SiloError):
    """The base model does not have the Linears that the plan adapts."""

    code = "module_mismatch"


class ChatTemplateUnusable(SiloError):
    code = "chat_template_unusable"


class TrainingDiverged(SiloError):
    code = "training_diverged"


class OrderForAnotherSilo(SiloError):
    code = "order_for_another_silo"


class OrderExpired(SiloError):
    code = "order_expired"


class NonceReused(SiloError):
    code = "nonce_reused"


class ReplyDestroyed(SiloError):
    """The reply to this order held an adapter that an erasure has destroyed since."""

    code = "reply_destroyed"


class CoordinatorUnreachable(SiloError):
    code = "coordinator_unreachable"


class EnrolmentRefused(SiloError):
    code = "enrolment_refused"
