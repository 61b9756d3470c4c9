"""Every reason for which intake refuses a bundle, each a class with a code of its own."""

from seqr.errors import SeqrError


class BundleRefused(SeqrError):
    """Root of every reason for which intake refuses a bundle."""

    code = "bundle_refused"


class BundleTooLarge(BundleRefused):
    """More bytes than any adapter of the plan can need."""

    code = "bundle_too_large"


class BundleUnreadable(BundleRefused):
    """Not a bundle, or not the bytes that were sealed."""

    code = "bundle_unreadable"


class BundleNotForThisGateway(BundleRefused):
    """Sealed for other gateways only."""

    code = "bundle_not_for_this_gateway"


class ManifestMalformed(BundleRefused):
    """A manifest with a missing, unknown or impossible field."""

    code = "manifest_malformed"


class ManifestSignatureInvalid(BundleRefused):
    """The manifest is not signed by a current key of the silo."""

    code = "manifest_signature_invalid"


class WrongSilo(BundleRefused):
    """The manifest speaks for another silo than the job was given to."""

    code = "wrong_silo"


class WrongPlan(BundleRefused):
    """The adapter was trained under another plan."""

    code = "wrong_plan"


class NonceMismatch(BundleRefused):
    """The manifest answers another job than the one that was issued."""

    code = "nonce_mismatch"


class NonceReplayed(BundleRefused):
    """The job that the manifest answers has been answered already."""

    code = "nonce_replayed"


class RevisionNotNext(BundleRefused):
    """The revision number is not the one the job asked for: an old or skipped revision."""

    code = "revision_not_next"


class TombstonedAdapter(BundleRefused):
    """The adapter was destroyed by a deletion and may never return."""

    code = "tombstoned_adapter"


class ManifestExpired(BundleRefused):
    """The time in which this revision could be admitted is over."""

    code = "manifest_expired"


class TensorDigestMismatch(BundleRefused):
    """The tensors are not those the silo signed."""

    code = "tensor_digest_mismatch"


class TensorSetMismatch(BundleRefused):
    """A tensor of the plan is missing, or one outside it is present."""

    code = "tensor_set_mismatch"


class TensorShapeMismatch(BundleRefused):
    """A tensor has another shape than the plan's modules and rank demand."""

    code = "tensor_shape_mismatch"


class NotFinite(BundleRefused):
    """A tensor holds NaN or infinity, which would win or poison every comparison."""

    code = "not_finite"


class RNotUpperTriangular(BundleRefused):
    """R has entries below the diagonal: not the canonical factor."""

    code = "r_not_upper_triangular"


class RDiagonalNegative(BundleRefused):
    """R has a negative diagonal entry: not the canonical factor, so one adapter could have many digests."""

    code = "r_diagonal_negative"


class QNotOrthonormal(BundleRefused):
    """Q's columns are not orthonormal. Routing sees only R, so a scaled Q would amplify the output unseen."""

    code = "q_not_orthonormal"


class NormOutOfBounds(BundleRefused):
    """R is larger than an adapter can usefully be, or far from those of all other silos."""

    code = "norm_out_of_bounds"


class RankDegenerate(BundleRefused):
    """R is zero or of rank one: nothing was learned, or a single direction is meant to attract queries."""

    code = "rank_degenerate"


class StatisticsInvalid(BundleRefused):
    """mu or sigma is not positive."""

    code = "statistics_invalid"
