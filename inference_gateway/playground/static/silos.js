// The sets of silos that requests ask for: one, or two to compare.

import { byId, element } from "./dom.js";
import { look } from "./palette.js";

const MANY = 8;
const NAMES = ["A", "B"];

let known = [];
/** What is switched off, for set A and set B. A silo that is new to this user begins switched on. */
const off = [new Set(), new Set()];
let count = 1;

export function reset() {
  known = [];
  count = 1;
  off.forEach((set) => set.clear());
}

/** Shows the switches for these silos. */
export function showSilos(silos) {
  known = silos;
  byId("sets").replaceChildren(...off.slice(0, count).map((_, set) => fieldset(set)));
}

/** Shows one set, or two to compare; the second begins as a copy of the first. */
export function showSets(sets) {
  count = sets;
  off[1] = new Set(off[0]);
  showSilos(known);
}

export const setName = (set) => (count > 1 ? NAMES[set] : "");

/** The silos of a set, or null when it holds all that the user may use: then new ones belong to it as well. */
export function chosen(set) {
  const on = known.filter((silo) => !off[set].has(silo));
  return on.length === known.length ? null : on;
}

/** The set in words. */
export function described(set) {
  const on = chosen(set);
  if (known.length === 0 || on?.length === 0) return "base model alone";
  return on === null ? "all silos" : on.join(", ");
}

export const isKnown = (silo) => known.includes(silo);

function fieldset(set) {
  const title = count > 1 ? `Set ${NAMES[set]}` : "Silos";
  if (known.length === 0) {
    return element("fieldset", {}, element("legend", {}, title),
      element("p", { class: "hint" }, "No silo is open to you at the moment; the base model answers alone."));
  }
  const rows = known.map((silo) => row(set, silo));
  const all = (on) => () => rows.filter((one) => !one.hidden).forEach((one) => turn(one.querySelector("input"), on));
  const buttons = element("div", { class: "row left" },
    element("button", { type: "button", onclick: all(true) }, "All on"),
    element("button", { type: "button", onclick: all(false) }, "All off"));
  const list = element("div", { class: "switches" }, ...rows);
  const search = known.length > MANY ? [filter(rows, title)] : [];
  return element("fieldset", {}, element("legend", {}, title), ...search, list, buttons);
}

function row(set, silo) {
  const box = element("input", { type: "checkbox", role: "switch", checked: !off[set].has(silo) });
  box.addEventListener("change", () => (box.checked ? off[set].delete(silo) : off[set].add(silo)));
  const name = element("span", { class: ["token", ...look(silo), "strong"].join(" ") }, silo);
  const made = element("label", { class: "switch" }, box, " ", name);
  made.dataset.silo = silo;
  return made;
}

function filter(rows, title) {
  const box = element("input", { type: "search", placeholder: "Filter", "aria-label": `Filter the silos of ${title}` });
  box.addEventListener("input", () => {
    const wanted = box.value.toLowerCase();
    for (const one of rows) one.hidden = !one.dataset.silo.toLowerCase().includes(wanted);
  });
  return box;
}

function turn(box, on) {
  if (box.checked === on) return;
  box.checked = on;
  box.dispatchEvent(new Event("change"));
}
