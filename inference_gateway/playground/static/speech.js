// What a screen reader hears of a stream: whole sentences, not tokens.

import { byId, element } from "./dom.js";

const LONGEST = 240;

/** Collects text and says it at the end of a sentence. `name` stands before each piece. */
export class Speaker {
  #text = "";
  #name;

  constructor(name) {
    this.#name = name ? `${name}: ` : "";
  }

  push(text) {
    this.#text += text;
    const end = this.#text.search(/[.!?]\s|\n/);
    if (end >= 0) this.#say(end + 1);
    else if (this.#text.length > LONGEST) this.#say(this.#text.length);
  }

  finish(closing) {
    this.#say(this.#text.length);
    say(this.#name + closing);
  }

  #say(length) {
    const sentence = this.#text.slice(0, length).trim();
    this.#text = this.#text.slice(length);
    if (sentence) say(this.#name + sentence);
  }
}

function say(text) {
  const log = byId("spoken");
  log.append(element("p", {}, text));
  while (log.children.length > 50) log.firstChild.remove();
}
