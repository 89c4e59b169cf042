"use strict";
/* Building elements. Text from the model only ever becomes text nodes and attributes. */

function byId(id) {
  return document.getElementById(id);
}

/** An element: `make("button.link", { onclick }, "text", child)`. */
function make(selector, properties = {}, ...children) {
  const [tag, ...classes] = selector.split(".");
  const element = document.createElement(tag || "div");
  if (classes.length) element.className = classes.join(" ");
  return furnish(element, properties, children);
}

const SVG = "http://www.w3.org/2000/svg";

function makeSvg(tag, properties = {}, ...children) {
  return furnish(document.createElementNS(SVG, tag), properties, children);
}

function furnish(element, properties, children) {
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== false));
  return element;
}

function icon(path) {
  return makeSvg(
    "svg",
    { class: "icon", viewBox: "0 0 16 16", "aria-hidden": "true" },
    makeSvg("path", { d: path }),
  );
}

function link(text, onclick, title = null) {
  return make("button.link", { onclick, title, type: "button" }, text);
}

/** "−3 +1 ~2", each in its colour; what is zero is left out. */
function deltaParts({ removed, added, changed }) {
  return [
    ["removed", "−", removed],
    ["added", "+", added],
    ["changed", "~", changed],
  ]
    .filter(([, , count]) => count)
    .map(([kind, sign, count]) =>
      make(`b.${kind}`, { title: `${count} ${kind}` }, sign + exactly(count)),
    );
}

function countsOf(delta) {
  return {
    removed: delta.removed.length,
    added: delta.added.length,
    changed: delta.changed.length,
  };
}

function familyDot(family) {
  return make("span.dot", { style: `background: var(--${family})`, title: family });
}

function announce(text) {
  byId("announcer").textContent = text;
}

const calm = matchMedia("(prefers-reduced-motion: reduce)");
