"use strict";
/* The line at the top: the model, what became of it, and which part of the page is shown. */

function startHeader() {
  byId("model").textContent = page.model || "graph";
  byId("model").title = page.model;
  byId("summary").append(...summaryParts());
  const steps = counted(page.steps.length, "step");
  byId("tool").textContent =
    `Written by ${page.tool}: ${steps}, ${counted(page.records.length, "state")} of nodes.`;
  for (const button of byId("tabs").children) {
    button.addEventListener("click", () => showTab(button.dataset.tab));
  }
  byId("theme").addEventListener("click", switchTheme);
  byId("about-button").addEventListener("click", () => byId("about").showModal());
  listen("tab", updateTabs);
  updateTabs();
}

/** "69 → 49 nodes · 11.7 M parameters · 1.82 G MACs"; an arrow where something changed. */
function summaryParts() {
  const first = page.steps[0].counts,
    last = page.steps[LAST_STEP].counts;
  const quantities = [
    ["nodes", "nodes", exactly],
    ["parameters", "parameters", short],
    ["macs", "MACs", short],
  ];
  return quantities.flatMap(([key, noun, text], index) => {
    const was = text(first[key]),
      is = text(last[key]);
    return [index ? " · " : "", was === is ? "" : `${was} → `, make("b", {}, is), ` ${noun}`];
  });
}

function updateTabs() {
  document.body.dataset.tab = state.tab;
  for (const button of byId("tabs").children) {
    const isCurrent = button.dataset.tab === state.tab;
    button.setAttribute("aria-selected", isCurrent);
    byId(button.dataset.tab).hidden = !isCurrent;
  }
}

function switchTheme() {
  const root = document.documentElement;
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  tell("theme");
}
