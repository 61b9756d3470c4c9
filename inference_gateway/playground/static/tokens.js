// An answer's text as one span for each token.

import { element } from "./dom.js";
import { look, strength } from "./palette.js";

const BASE = "base model";

export const percent = (share) => `${(share * 100).toFixed(share < 0.1 ? 1 : 0)} %`;
export const siloName = (token) => token.silo ?? BASE;

/**
 * Splits `text` among its tokens: [{text, token}], whose texts together are exactly `text`. A character that several
 * tokens make together goes to the last of them; text without a token has token null.
 */
export function split(text, tokens) {
  const pieces = [];
  let rest = text;
  for (const token of tokens) {
    const own = rest.startsWith(token.token) ? token.token : "";
    pieces.push({ text: own, token });
    rest = rest.slice(own.length);
  }
  if (rest) {
    const last = pieces.findLast((piece) => !piece.text) ?? pieces.at(-1);
    if (!last) pieces.push({ text: rest, token: null });
    else if (last === pieces.at(-1)) last.text += rest;
    else pieces.push({ text: rest, token: last.token });
  }
  return pieces.filter((piece) => piece.text);
}

/** The span of one piece, tinted when a silo shaped it. */
export function span({ text, token }) {
  const made = element("span", { class: "token" }, text);
  if (!token) return made;
  made.title = siloName(token);
  if (token.silo != null) {
    const share = token.shares?.[token.silo] ?? 0;
    made.classList.add(...look(token.silo), strength(share));
    made.title += ` ${percent(share)}`;
  }
  return made;
}
