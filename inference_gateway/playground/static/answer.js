// One answer on the page: its tokens as they come, how it ended, and what can be done with it.

import { GatewayError } from "./api.js";
import { element } from "./dom.js";
import { explain } from "./problems.js";
import { close, show } from "./scores.js";
import { showCode } from "./snippets.js";
import { Speaker } from "./speech.js";
import { percent, span, split } from "./tokens.js";

const REASONS = { length: "cut at the token limit", stop: "complete" };

export class Answer {
  text = "";
  /** Whether later requests may quote it: not when it failed, not before any text came. */
  usable = false;
  /** The silos that shaped a token of it; null stands for the base model alone. */
  silos = new Set();
  versions = {};

  #body;
  #text;
  #problem = element("div", { class: "error", role: "alert", hidden: true });
  #foot = element("footer", { class: "hint" });
  #speaker;
  #at = -1;
  #pieces = [];
  #timer = 0;
  #removed = false;

  /** `name`: "A" or "B" when two are compared, else "". `silosText`: which silos were asked. */
  constructor(name, silosText, body) {
    this.name = name;
    this.#body = body;
    this.#speaker = new Speaker(name);
    const title = name ? `Answer ${name}` : "Answer";
    this.#text = element("div", {
      class: "text", tabIndex: 0, role: "group", "aria-label": `${title}; the arrow keys move through its tokens`,
    });
    this.node = element("article", { class: "answer", "aria-busy": "true" },
      element("h3", { class: name ? "hint" : "unseen" }, name ? `${name} · ${silosText}` : title),
      this.#text, this.#problem, this.#foot);
    this.#text.addEventListener("click", (event) => this.#select([...this.#text.children].indexOf(event.target)));
    this.#text.addEventListener("keydown", (event) => this.#move(event));
  }

  push(text, tokens) {
    if (this.#removed) return;
    this.text += text;
    this.#speaker.push(text);
    for (const piece of split(text, tokens)) {
      this.#pieces.push(piece);
      this.#text.append(span(piece));
      if (piece.token) this.silos.add(piece.token.silo ?? null);
    }
  }

  finish(reason, summary) {
    this.usable = this.text !== "";
    this.#end(REASONS[reason] ?? reason, summary);
  }

  stopped() {
    this.usable = this.text !== "";
    this.#end("stopped by you");
  }

  /** Shows what went wrong; `again` asks once more, `login` leads back to the log-in. */
  fail(error, again, login) {
    if (!(error instanceof GatewayError)) throw error;
    const { title, detail, again: helps, after } = explain(error);
    const code = [error.code, error.param && `parameter ${error.param}`].filter(Boolean).join(", ");
    this.#problem.replaceChildren(
      element("strong", {}, title), element("p", {}, detail), ...(code ? [element("p", { class: "hint" }, code)] : []));
    if (error.status === 401) {
      this.#problem.append(element("button", { type: "button", onclick: login }, "Log in again"));
    } else if (helps) {
      const button = element("button", { type: "button", onclick: again }, "Ask again");
      this.#problem.append(button);
      this.#countDown(button, after);
    }
    this.#problem.hidden = false;
    this.#end("not part of the conversation");
  }

  /** Takes the answer off the page. */
  remove() {
    this.#removed = true;
    clearInterval(this.#timer);
    if (this.#at >= 0) close();
    this.node.remove();
  }

  #end(how, summary) {
    if (this.#removed) return;
    this.node.removeAttribute("aria-busy");
    this.#speaker.finish(`End of the answer, ${how}.`);
    const shares = Object.entries(summary?.answer_shares ?? {}).filter(([, share]) => share > 0);
    shares.sort((a, b) => b[1] - a[1]);
    const told = [
      how,
      shares.map(([silo, share]) => `${silo} ${percent(share)}`).join(", "),
      summary?.routing ? `routing ${summary.routing}` : "",
      this.versions.policy ? `policy ${this.versions.policy}` : "",
      this.versions.library ? `library ${this.versions.library}` : "",
    ];
    this.#foot.replaceChildren(
      element("span", {}, told.filter(Boolean).join(" · ")),
      element("button", { type: "button", onclick: () => showCode(this.#body) }, "As code"));
  }

  #countDown(button, after) {
    if (after <= 0) return;
    const until = Date.now() + after * 1000;
    const tick = () => {
      const left = Math.ceil((until - Date.now()) / 1000);
      button.disabled = left > 0;
      button.textContent = left > 0 ? `Ask again in ${left} s` : "Ask again";
      if (left <= 0) clearInterval(this.#timer);
    };
    this.#timer = setInterval(tick, 500);
    tick();
  }

  #select(index) {
    const piece = this.#pieces[index];
    if (!piece?.token) return;
    show(piece.token, () => {
      this.#text.children[index]?.classList.remove("selected");
      this.#at = -1;
    });
    this.#at = index;
    this.#text.children[index].classList.add("selected");
  }

  #move(event) {
    const last = this.#pieces.length - 1;
    const to = { ArrowRight: this.#at + 1, ArrowLeft: this.#at - 1, Home: 0, End: last }[event.key];
    if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const index = Math.min(Math.max(to, 0), last);
    this.#select(index);
    this.#text.children[index]?.scrollIntoView({ block: "nearest" });
  }
}
