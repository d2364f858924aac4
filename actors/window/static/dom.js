// Small changes to the page, made only where something differs: what is equal is not touched, so nothing flickers.

const SVG = "http://www.w3.org/2000/svg";

/** An element: `el("td", {class: "n", text: "3"}, child, ...)`. Null attributes are left out. */
export function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined) continue;
    if (key === "text") made.textContent = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

export function svg(name, attributes = {}) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function setAttribute(element, name, value) {
  if (value === null || value === undefined) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

export function setShown(element, shown) {
  if (element.hidden === shown) element.hidden = !shown;
}

/** Width of a bar, in whole percent. */
export function setShare(element, share) {
  const value = `${Math.round(Math.min(1, Math.max(0, share ?? 0)) * 100)}%`;
  if (element.style.getPropertyValue("--share") !== value) element.style.setProperty("--share", value);
}

/** Makes the children of `parent` those of `items`, by key: made once, updated after, moved only when their order changed. */
export function keyed(parent, items, keyOf, make, update) {
  const wanted = new Map(items.map((item) => [String(keyOf(item)), item]));
  const former = new Map();
  for (const child of [...parent.children]) {
    if (wanted.has(child.dataset.key)) former.set(child.dataset.key, child);
    else child.remove();
  }
  let place = parent.firstElementChild;
  for (const [key, item] of wanted) {
    let child = former.get(key);
    if (!child) {
      child = make(item);
      child.dataset.key = key;
    }
    update(child, item);
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
  }
}
