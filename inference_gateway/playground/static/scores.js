// The side panel: which silos shaped a token, and by how much.

import { byId, element } from "./dom.js";
import { look } from "./palette.js";
import { percent, siloName } from "./tokens.js";

const panel = byId("scores");
const body = byId("scores-body");
let onClose = () => {};

/** Shows the scores of one token; `closed` is called when the panel closes or turns to another token. */
export function show(token, closed) {
  onClose();
  onClose = closed;
  const shares = Object.entries(token.shares ?? {}).sort((a, b) => b[1] - a[1]);
  const rest = 1 - shares.reduce((sum, [, share]) => sum + share, 0);
  const named = (silo) => element("span", { class: ["token", ...look(silo), "strong"].join(" ") }, silo);
  const rows = [
    ...shares.map(([silo, share]) => row(named(silo), silo, share)),
    ...(rest > 0.0005 ? [row("base model alone", "base model alone", rest)] : []),
  ];
  body.replaceChildren(
    element("p", {}, element("code", { class: "piece" }, JSON.stringify(token.token)), ` id ${token.id}`),
    element("p", {}, "Shaped by ", element("strong", {}, siloName(token))),
    element("table", {},
      element("caption", {}, "Share of the adapted modules"),
      element("tbody", {}, ...rows)),
    element("p", {}, typeof token.margin === "number"
      ? `Margin ${token.margin.toPrecision(3)}: how far the winner's score lay above the next permitted silo's, ` +
        "mean over the modules."
      : "No margin: there were no two silos to choose between."),
  );
  panel.hidden = false;
}

export function close() {
  panel.hidden = true;
  body.replaceChildren();
  onClose();
  onClose = () => {};
}

function row(label, name, share) {
  return element("tr", {},
    element("th", { scope: "row" }, label),
    element("td", {}, element("meter", { min: 0, max: 1, value: share, "aria-label": `Share of ${name}` })),
    element("td", { class: "number" }, percent(share)));
}

byId("scores-close").addEventListener("click", close);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !panel.hidden && !byId("code").open) close();
});
