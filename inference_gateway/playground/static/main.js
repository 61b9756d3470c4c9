// The page: log in, ask, stop, compare, log out.

import { Answer } from "./answer.js";
import { GatewayError, SESSION, chat, endSession, loginWays, models } from "./api.js";
import { byId, element } from "./dom.js";
import { look } from "./palette.js";
import { explain, explainLogin } from "./problems.js";
import { close as closeScores } from "./scores.js";
import { chosen, described, isKnown, reset, setName, showSets, showSilos } from "./silos.js";

const STORED = "seqr-api-key";
const WIDE = matchMedia("(min-width: 56rem)");

/** A key, SESSION for a log-in with the identity provider, or "" while logged out. */
let key = "";
let model = "";
/** [{prompt, answers: [Answer], columns, node}] */
let turns = [];
/** What stops each answer that is being written. */
const running = new Set();

// Log in and out.

async function logIn(presented) {
  byId("login-error").hidden = true;
  byId("login-button").disabled = true;
  try {
    if (presented !== SESSION && !/^[\x21-\x7e]+$/.test(presented)) {
      throw new GatewayError("An API key has no spaces and only ASCII characters.", { status: 401 });
    }
    const seen = await models(presented);
    key = presented;
    if (key !== SESSION) sessionStorage.setItem(STORED, key);
    byId("key").value = "";
    showModels(seen);
    showPage(true);
    byId("prompt").focus();
  } catch (error) {
    if (!(error instanceof GatewayError)) throw error;
    showPage(false);
    if (error.status === 401) sessionStorage.removeItem(STORED);
    if (presented !== SESSION) byId("key").value = presented;
    const { title, detail } = explain(error);
    showLoginProblem(title, detail);
    byId("key").focus();
  } finally {
    byId("login-button").disabled = false;
  }
}

function showLoginProblem(title, detail) {
  byId("login-error").replaceChildren(element("strong", {}, title), element("p", {}, detail));
  byId("login-error").hidden = false;
}

async function logOut() {
  sessionStorage.removeItem(STORED);
  const hadSession = key === SESSION;
  key = "";
  clear();
  reset();
  byId("sets").replaceChildren();
  byId("spoken").replaceChildren();
  for (const id of ["prompt", "system", "max-tokens", "temperature", "seed", "routing"]) byId(id).value = "";
  byId("compare").checked = false;
  byId("login-error").hidden = true;
  showPage(false);
  byId("key").focus();
  if (!hadSession) return;
  try {
    await endSession();
  } catch (error) {
    if (!(error instanceof GatewayError)) throw error;
    showLoginProblem("This browser is still logged in", explain(error).detail);
  }
}

/** Shows the ways to log in, and goes on with a log-in that is there already. */
async function begin() {
  const problem = /^#login=([a-z_]+)$/.exec(location.hash)?.[1];
  if (problem) history.replaceState(null, "", location.pathname + location.search);
  const stored = sessionStorage.getItem(STORED);
  if (stored) logIn(stored);
  else {
    showPage(false);
    byId("key").focus();
  }
  const { issuer, session } = await loginWays();
  byId("login-link").textContent = `Log in with ${issuer}`;
  byId("login-ways").hidden = issuer === null;
  if (problem) showLoginProblem("You are not logged in", explainLogin(problem));
  else if (session && !stored && !key) await logIn(SESSION);
}

function showPage(loggedIn) {
  byId("login").hidden = loggedIn;
  byId("playground").hidden = !loggedIn;
}

function showModels({ base, silos }) {
  model = base;
  byId("model").textContent = base;
  showSilos(silos);
}

const sets = () => (byId("compare").checked ? 2 : 1);

// Ask.

function ask(prompt) {
  const columns = element("div", { class: "answers" });
  const node = element("section", { class: "turn", "aria-label": `Turn ${turns.length + 1}` },
    element("div", { class: "prompt" }, element("h3", { class: "unseen" }, "You"), element("p", {}, prompt)), columns);
  const turn = { prompt, answers: [], columns, node };
  turns.push(turn);
  byId("empty").hidden = true;
  byId("turns").append(turn.node);
  const all = Array.from({ length: sets() }, (_, set) => set);
  return answerAll(turn, all);
}

async function answerAll(turn, which) {
  const controller = new AbortController();
  running.add(controller);
  showRunning();
  // All requests are made before the first answer is read, so that both are asked the same.
  const bodies = which.map((set) => requestBody(turn, set));
  try {
    await Promise.all(which.map((set, i) => answerOne(turn, set, bodies[i], controller.signal)));
  } finally {
    running.delete(controller);
    showRunning();
  }
}

async function answerOne(turn, set, body, signal) {
  const before = turn.answers[set];
  const answer = new Answer(before?.name ?? setName(set), described(set), body);
  turn.answers[set] = answer;
  if (before) {
    before.node.after(answer.node);
    before.remove();
  } else {
    turn.columns.append(answer.node);
  }
  answer.node.scrollIntoView({ block: "end" });
  let reason = "stop";
  let summary = null;
  try {
    for await (const part of chat(key, body, signal)) {
      if (signal.aborted) break;
      if (part.versions) answer.versions = part.versions;
      if (part.reason) reason = part.reason;
      if (part.summary) summary = part.summary;
      if (part.text !== undefined) {
        const follows = atEnd();
        answer.push(part.text, part.tokens);
        showLegend();
        if (follows) byId("turns").scrollTop = byId("turns").scrollHeight;
      }
    }
    if (signal.aborted) answer.stopped();
    else answer.finish(reason, summary);
    if (summary?.permitted?.some((silo) => !isKnown(silo))) await refresh();
  } catch (error) {
    if (signal.aborted) {
      answer.stopped();
    } else {
      answer.fail(error, () => answerAll(turn, [set]), logOut);
      if (error.status === 403 || error.status === 404 || error.code === "permission_revoked") await refresh();
    }
  }
}

/** What is asked for in `turn`: the conversation up to it, as this set of silos has heard it, and the settings. */
function requestBody(turn, set) {
  const system = byId("system").value.trim();
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const earlier of turns.slice(0, turns.indexOf(turn))) {
    const answer = earlier.answers[set] ?? earlier.answers[0];
    if (!answer?.usable) continue;
    messages.push({ role: "user", content: earlier.prompt }, { role: "assistant", content: answer.text });
  }
  messages.push({ role: "user", content: turn.prompt });
  const body = { model, messages };
  for (const [name, id] of [["max_tokens", "max-tokens"], ["temperature", "temperature"], ["seed", "seed"]]) {
    if (byId(id).value !== "") body[name] = Number(byId(id).value);
  }
  const silos = chosen(set);
  const routing = byId("routing").value;
  body.seqr = { attribution: true, ...(silos && { silos }), ...(routing && { routing }) };
  return body;
}

/** Asks again which silos there are: one was withdrawn, or a new one has come. */
async function refresh() {
  const asked = key;
  try {
    const seen = await models(asked);
    if (key === asked) showModels(seen);
  } catch (error) {
    if (!(error instanceof GatewayError)) throw error; // the failed answer has told already
  }
}

function stop() {
  for (const controller of running) controller.abort();
}

function clear() {
  stop();
  closeScores();
  for (const turn of turns) {
    turn.answers.forEach((answer) => answer.remove());
    turn.node.remove();
  }
  turns = [];
  byId("empty").hidden = false;
  showLegend();
}

// Show.

function showRunning() {
  byId("send").hidden = running.size > 0;
  byId("stop").hidden = running.size === 0;
}

function atEnd() {
  const list = byId("turns");
  return list.scrollHeight - list.scrollTop - list.clientHeight < 80;
}

function showLegend() {
  const silos = new Set(turns.flatMap((turn) => turn.answers.flatMap((answer) => [...answer.silos])));
  const names = [...silos].filter((silo) => silo !== null).sort();
  const legend = byId("legend");
  const shown = [...names, ...(silos.has(null) ? ["base model"] : [])].join("\n");
  if (legend.dataset.shown === shown) return;
  legend.dataset.shown = shown;
  legend.replaceChildren(
    ...names.map((silo) => element("li", { class: ["token", ...look(silo), "strong"].join(" ") }, silo)),
    ...(silos.has(null) ? [element("li", { class: "token" }, "base model")] : []),
  );
  byId("legend-box").hidden = silos.size === 0;
}

function settingsAreValid() {
  const wrong = ["max-tokens", "temperature", "seed"].map(byId).find((input) => !input.checkValidity());
  if (!wrong) return true;
  byId("options").open = true;
  wrong.reportValidity();
  return false;
}

byId("login-form").addEventListener("submit", (event) => {
  event.preventDefault();
  logIn(byId("key").value.trim());
});
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const prompt = byId("prompt").value;
  if (running.size || !prompt.trim() || !settingsAreValid()) return;
  byId("prompt").value = "";
  ask(prompt);
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("composer").requestSubmit();
});
byId("stop").addEventListener("click", () => {
  stop();
  byId("prompt").focus();
});
byId("clear").addEventListener("click", () => {
  clear();
  byId("prompt").focus();
});
byId("logout").addEventListener("click", logOut);
byId("compare").addEventListener("change", () => showSets(sets()));
WIDE.addEventListener("change", () => (byId("options").open = WIDE.matches));
byId("options").open = WIDE.matches;

await begin();
