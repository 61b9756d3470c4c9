// Elements are made here and text goes in as text nodes: nothing that anybody wrote is ever parsed as markup.

export const byId = (id) => document.getElementById(id);

/** An element with properties, `class` and `aria-*`/`data-*` attributes, and children: nodes or strings. */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "class" || key === "role" || key.includes("-")) made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children);
  return made;
}
