// How each silo looks: one of seven hues and one of five underlines, so that 35 silos look different, and never by
// colour alone.

const HUES = 7;
const LINES = 5;
const order = new Map();

/** The classes of a silo's look. A silo keeps its look for as long as the page is open. */
export function look(silo) {
  if (!order.has(silo)) order.set(silo, order.size);
  const place = order.get(silo);
  return ["tinted", `hue-${place % HUES}`, `line-${place % LINES}`];
}

/** The class of a tint: stronger, the larger the share (0 to 1) of the modules that the silo shaped. */
export function strength(share) {
  return share >= 0.75 ? "strong" : share >= 0.5 ? "middling" : "weak";
}
