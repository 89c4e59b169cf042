"use strict";
/* Puts the page together, and offers it to scripts as `window.fxoptPage`. */

async function startPage() {
  readColours();
  const wanted = readHash();
  Object.assign(state, { step: wanted.step, wish: wanted.view });
  state.view = viewsOf(state.step).includes(wanted.view) ? wanted.view : "after";
  state.expanded = firstExpansion(currentTree());
  startHeader();
  startTimeline();
  startToolbar();
  startDetails();
  startSearch();
  startCosts();
  startPointer();
  startMinimap();
  startKeys();
  startLink();
  listen("theme", readColours);
  for (const event of ["scene", "selection", "theme"]) listen(event, requestPaint);
  new ResizeObserver(resizeCanvas).observe(canvas);
  resizeCanvas();
  await refresh();
  paintNow();
  if (wanted.selection) await reveal(wanted.selection);
  showTab(wanted.tab);
  performance.mark("fxopt-ready");
}

const ready = startPage();

/** The visible boxes, with their rectangles in pixels of the page. */
function visibleBoxes() {
  const { x, y, k } = lens();
  const { left, top } = canvas.getBoundingClientRect();
  return state.scene.boxes.map((box) => ({
    kind: box.isGroup ? "group" : "node",
    name: box.isGroup ? box.child.path : box.child.name,
    status: box.status,
    expanded: Boolean(box.inner),
    x: left + x + k * box.x,
    y: top + y + k * box.y,
    width: k * box.width,
    height: k * box.height,
  }));
}

function groupNamed(path) {
  const group = findGroup(currentTree(), path);
  if (!group) throw new Error(`There is no group '${path}' in this view.`);
  return group;
}

window.fxoptPage = {
  ready,
  state: () => ({
    step: state.step,
    view: state.view,
    tab: state.tab,
    selection: state.selection,
    expanded: [...state.expanded],
    scale: lens().k,
    layoutMilliseconds: state.layoutMilliseconds,
    boxes: state.scene.boxes.length,
    wires: state.scene.wires.length,
  }),
  boxes: visibleBoxes,
  step: (number, view) => showStep(number, view),
  view: (view) => showStep(state.step, view),
  select: (name) => revealAnywhere(name),
  expand: (path) => {
    setExpanded(groupNamed(path), true);
    return refresh({ anchor: `group:${groupNamed(path).path}` });
  },
  collapse: (path) => {
    setExpanded(groupNamed(path), false);
    return refresh({ anchor: `group:${groupNamed(path).path}` });
  },
  expandAll: () => setAllExpanded(true),
  collapseAll: () => setAllExpanded(false),
  showChanges,
  fit,
  tab: showTab,
};
