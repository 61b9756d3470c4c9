// What a person is told about a GatewayError.

const BY_STATUS = {
  0: "The gateway cannot be reached",
  400: "The gateway refuses this request",
  401: "The key is not accepted",
  403: "This is not permitted",
  404: "It does not exist, or not for you",
  408: "The message took too long to arrive",
  413: "The message is too large",
  422: "The gateway refuses this request",
  429: "Too many requests",
  503: "The gateway cannot answer now",
  504: "The answer took too long",
};
const BY_CODE = {
  permission_revoked: "A permission was withdrawn while the answer was written",
  adapter_replaced: "A silo's adapter was replaced while the answer was written",
  policy_unavailable: "The policy cannot be read at the moment",
};

/** {title, detail, again, after}: whether asking again may help, and in how many seconds. */
export function explain(error) {
  const { status, code, retryAfter } = error;
  const title =
    status === null
      ? (BY_CODE[code] ?? "The answer broke off")
      : (BY_STATUS[status] ?? (status >= 500 ? "The gateway failed" : "The gateway refuses this request"));
  // A 429 without a time can never be met: the request is larger than the limit.
  const later = status === 0 || status >= 500 || (status === 429 && retryAfter !== null);
  const again = status === null ? code !== "permission_revoked" : later;
  return { title, detail: error.message, again, after: again ? (retryAfter ?? 0) : 0 };
}
