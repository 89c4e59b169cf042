"use strict";
/* The address: `#step=3&view=changes&node=conv2d_3` opens the page at the same place. */

let ownHash = "";

function hashOfState() {
  const { step, view, selection, tab } = state;
  const parts = new URLSearchParams();
  if (step !== FIRST_STEP) parts.set("step", step);
  parts.set("view", view);
  if (selection) parts.set(selection.kind, selection.name || selection.path);
  if (tab !== "graph") parts.set("tab", tab);
  return `#${parts}`;
}

function writeHash() {
  const hash = hashOfState();
  if (hash === location.hash) return;
  ownHash = hash;
  location.replace(hash); // no entry in the browser's history for each click
}

/** What an address asks for; what this story does not have is left out. */
function readHash() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const number = Number(parts.get("step") ?? FIRST_STEP);
  const step =
    Number.isInteger(number) && number >= FIRST_STEP && number <= LAST_STEP ? number : FIRST_STEP;
  const view = VIEWS.includes(parts.get("view")) ? parts.get("view") : "changes";
  const selection = parts.has("node")
    ? { kind: "node", name: parts.get("node") }
    : parts.has("group")
      ? { kind: "group", path: parts.get("group") }
      : null;
  return { step, view, selection, tab: parts.get("tab") === "costs" ? "costs" : "graph" };
}

function startLink() {
  for (const event of ["step", "selection", "tab"]) listen(event, writeHash);
  window.addEventListener("hashchange", async () => {
    if (location.hash === ownHash) return;
    const { step, view, selection, tab } = readHash();
    await showStep(step, view);
    if (selection) await reveal(selection);
    else select(null);
    showTab(tab);
  });
}
