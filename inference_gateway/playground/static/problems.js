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
const BY_LOGIN = {
  login_not_accepted: "Your log-in is not accepted",
  session_ended: "Your log-in has ended",
};
const BY_CODE = {
  permission_revoked: "A permission was withdrawn while the answer was written",
  access_ended: "Your key or your log-in ended while the answer was written",
  adapter_replaced: "A silo's adapter was replaced while the answer was written",
  policy_unavailable: "The policy cannot be read at the moment",
};

// Why the identity provider's answer led to no log-in. The gateway's log has the particulars.
const LOGIN_PROBLEMS = {
  issuer_unreachable: "The identity provider does not answer at the moment; try again.",
  login_denied: "The identity provider did not let you in.",
  login_expired: "The log-in took too long, or another one was begun in this browser; log in again.",
  login_not_accepted: "You are not logged in as an active user who may ask this gateway; ask an admin.",
  policy_unavailable: "The policy cannot be read at the moment; try again.",
  token_invalid: "What the identity provider says about you cannot be trusted here; ask an admin.",
};

/** In words, why a log-in failed with `code`. */
export const explainLogin = (code) =>
  Object.hasOwn(LOGIN_PROBLEMS, code) ? LOGIN_PROBLEMS[code] : "Something went wrong on the way; log in again.";

/** {title, detail, again, after}: whether asking again may help, and in how many seconds. */
export function explain(error) {
  const { status, code, retryAfter } = error;
  const title =
    status === null
      ? (BY_CODE[code] ?? "The answer broke off")
      : (BY_LOGIN[code] ?? BY_STATUS[status] ?? (status >= 500 ? "The gateway failed" : "The gateway refuses this request"));
  // A 429 without a time can never be met: the request is larger than the limit.
  const later = status === 0 || status >= 500 || (status === 429 && retryAfter !== null);
  const again = status === null ? code !== "permission_revoked" : later;
  return { title, detail: error.message, again, after: again ? (retryAfter ?? 0) : 0 };
}
