"""What a benchmark refuses."""

from seqr.errors import SeqrError


class BenchDataMissing(SeqrError):
    """A task folder, or one of its two splits, that is not there."""

    code = "bench_data_missing"


class BenchDataUnreadable(SeqrError):
    """A data file, or a row of it, that is not what the task needs."""

    code = "bench_data_unreadable"


class BenchOptionInvalid(SeqrError):
    """An option of a benchmark that makes no sense."""

    code = "bench_option_invalid"


class BenchFolderTaken(SeqrError):
    """A folder with the results of a run on other data, another model or other options."""

    code = "bench_folder_taken"


class BenchAdapterMissing(SeqrError):
    """An adapter that another device trained for this run, and that was not brought along with its results."""

    code = "bench_adapter_missing"


class BenchInterrupted(SeqrError):
    """A benchmark was stopped; what it has finished is kept."""

    code = "bench_interrupted"


class EncoderUnavailable(SeqrError):
    """The sentence encoder that LORAUTER needs is not here and cannot be fetched."""

    code = "encoder_unavailable"


class BenchPeerMissing(SeqrError):
    """Something to compare with that is not installed or does not run."""

    code = "bench_peer_missing"


class BenchFailed(SeqrError):
    """What a benchmark measures did not do what it is measured for."""

    code = "bench_failed"
