"use strict";
/* The buttons over the canvas, and the legend. */

function startToolbar() {
  for (const button of byId("views").children) {
    button.addEventListener("click", () => showStep(state.step, button.dataset.view));
  }
  byId("show-changes").addEventListener("click", showChanges);
  byId("expand-all").addEventListener("click", () => setAllExpanded(true));
  byId("collapse-all").addEventListener("click", () => setAllExpanded(false));
  byId("fit").addEventListener("click", () => fit({ animated: true }));
  byId("zoom-in").addEventListener("click", () => zoomBy(1.35));
  byId("zoom-out").addEventListener("click", () => zoomBy(1 / 1.35));
  listen("step", updateToolbar);
  listen("scene", updateToolbar);
  updateToolbar();
}

function updateToolbar() {
  const views = viewsOf(state.step);
  for (const button of byId("views").children) {
    const { view } = button.dataset;
    button.disabled = !views.includes(view);
    button.setAttribute("aria-pressed", view === state.view);
  }
  byId("show-changes").disabled = !groupsToShowChanges(currentTree(), state.expanded, Infinity)
    .length;
  updateLegend();
}

/** The statuses and families of the picture, the most frequent first. */
function updateLegend() {
  const tree = currentTree();
  const statuses = Object.keys(tree.delta).filter((status) => tree.delta[status]);
  const families = [...tree.families].sort((a, b) => b[1] - a[1]).map(([family]) => family);
  const far = state.scene ? state.scene.wires.filter((wire) => wire.isFar).length : 0;
  byId("legend").replaceChildren(
    ...statuses.map((status) => make("span", {}, statusDot(status), status)),
    ...families.slice(0, 7 - statuses.length).map((one) => make("span", {}, familyDot(one), one)),
    ...(far
      ? [make("span", {}, `${counted(far, "long wire")}: select a node to see its own`)]
      : []),
  );
}

function statusDot(status) {
  const style = `background: var(--${status}-soft); border: 1.5px solid var(--${status})`;
  return make("span.dot", { style });
}
