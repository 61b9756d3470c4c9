// The gateway's API as this page uses it.

import { eventData } from "./sse.js";

const SILO_PREFIX = "silo:";

/** In place of a key: the browser's log-in with the identity provider, whose cookie no script can read. */
export const SESSION = Symbol("session");
const PROOF = { "X-Seqr-Session": "1" };

/** What went wrong: `status` is HTTP's, 0 when no answer came, and null when the answer broke off while it was read. */
export class GatewayError extends Error {
  constructor(message, { status = null, code = "", param = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter });
  }
}

/** {issuer, session}: the identity provider's host or null, and whether this browser is logged in with it. */
export async function loginWays() {
  try {
    return await (await request("auth/session", SESSION, {})).json();
  } catch (error) {
    if (error instanceof GatewayError) return { issuer: null, session: false };
    throw error;
  }
}

/** Ends this browser's log-in, also for its other tabs. Throws GatewayError. */
export const endSession = () => request("auth/logout", SESSION, { method: "POST" });

/** The base model's name and the silos that this key may use. */
export async function models(key, signal) {
  const response = await request("v1/models", key, { signal });
  const names = (await response.json()).data.map((entry) => entry.id);
  return {
    base: names.find((name) => !name.startsWith(SILO_PREFIX)) ?? "",
    silos: names.filter((name) => name.startsWith(SILO_PREFIX)).map((name) => name.slice(SILO_PREFIX.length)),
  };
}

/**
 * Asks for a streamed answer and yields its parts: {versions}, {text, tokens}, {reason}, {usage} and {summary}.
 * Throws GatewayError; an abort throws the signal's AbortError.
 */
export async function* chat(key, body, signal) {
  const response = await request("v1/chat/completions", key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  yield {
    versions: {
      policy: response.headers.get("X-Seqr-Policy-Version"),
      library: response.headers.get("X-Seqr-Library-Version"),
    },
  };
  try {
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") return;
      yield* parts(JSON.parse(data));
    }
  } catch (error) {
    if (error instanceof GatewayError || signal.aborted) throw error;
    throw new GatewayError("The connection broke, or what came over it was no answer.");
  }
  throw new GatewayError("The connection ended before the answer did.");
}

function* parts(chunk) {
  if (chunk.error) throw new GatewayError(chunk.error.message ?? "", { code: chunk.error.code ?? "" });
  const choice = chunk.choices?.[0];
  const text = choice?.delta?.content ?? "";
  const tokens = choice?.seqr?.tokens ?? [];
  if (text || tokens.length) yield { text, tokens };
  if (choice?.finish_reason) yield { reason: choice.finish_reason };
  if (chunk.usage) yield { usage: chunk.usage };
  if (chunk.seqr) yield { summary: chunk.seqr };
}

async function request(path, key, options) {
  let response;
  try {
    const headers = { ...options.headers, ...(key === SESSION ? PROOF : { Authorization: `Bearer ${key}` }) };
    const credentials = key === SESSION ? "same-origin" : "omit";
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new GatewayError("No answer came from the gateway.", { status: 0 });
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  throw new GatewayError(told.error?.message ?? `The gateway answered with HTTP ${response.status}.`, {
    status: response.status,
    code: told.error?.code ?? "",
    param: told.error?.param ?? null,
    retryAfter: seconds(response.headers.get("Retry-After")),
  });
}

/** Retry-After in seconds from now; it may be a number or a date (RFC 9110, section 10.2.3). */
function seconds(value) {
  if (value === null) return null;
  if (/^\d+$/.test(value)) return Number(value);
  const date = Date.parse(value);
  return Number.isNaN(date) ? null : Math.max(0, Math.ceil((date - Date.now()) / 1000));
}
