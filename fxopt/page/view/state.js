"use strict";
/*
 * What the page shows right now, and the only functions that change it. Whoever draws something
 * listens: "step" (another step or view), "scene" (boxes have new places), "selection", "hover",
 * "tab", "theme".
 */

const state = {
  step: FIRST_STEP,
  view: "changes",
  wish: "changes", // the view that was asked for; capture, which has nothing before it, has one
  expanded: new Set(),
  selection: null, // { kind: "node", name } or { kind: "group", path }
  hover: null, // a box
  tab: "graph",
  scene: null,
  layoutMilliseconds: 0,
};

const listeners = new Map();
let lastTicket = 0;

function listen(event, react) {
  append(listeners, event, react);
}

function tell(event) {
  for (const react of listeners.get(event) || []) react();
}

// -- the scene -----------------------------------------------------------------------------------

/** Lay out what is to be seen, and show it, unless something else was asked for in the meantime.
 * `anchor` is the key of a box that stays where it is on the screen. */
async function refresh({ anchor = null, camera = "keep" } = {}) {
  const ticket = ++lastTicket;
  const slow = setTimeout(() => (byId("busy").hidden = false), 150);
  const started = performance.now();
  let scene = null;
  try {
    scene = await layOut(sceneOf(state.step, state.view, state.expanded));
    byId("failure").hidden = true;
  } catch (error) {
    if (ticket === lastTicket) showFailure(error);
  }
  clearTimeout(slow);
  if (ticket !== lastTicket) return;
  byId("busy").hidden = true;
  if (!scene) return;
  state.layoutMilliseconds = performance.now() - started;
  const old = state.scene;
  state.scene = scene;
  state.hover = null;
  moveCamera(old, scene, anchor, camera);
  tell("scene");
}

function showFailure(error) {
  console.error(error);
  const reason = error.message || error;
  byId("failure").textContent =
    `This view could not be laid out (${reason}). Collapse some groups, or choose another step.`;
  byId("failure").hidden = false;
}

// -- steps and views -----------------------------------------------------------------------------

function showStep(step, wish = state.wish) {
  const next = viewsOf(step).includes(wish) ? wish : "after";
  state.wish = wish;
  if (step === state.step && next === state.view) return Promise.resolve();
  Object.assign(state, { step, view: next });
  if (state.selection && !isShown(state.selection)) state.selection = null;
  tell("step");
  tell("selection");
  announce(`${stepTitle(step)}, ${next}`);
  return refresh();
}

function moveStep(by) {
  const step = Math.min(Math.max(state.step + by, FIRST_STEP), LAST_STEP);
  return showStep(step);
}

function isShown(selection) {
  if (selection.kind === "node") return pictureOf(state.step, state.view).nodes.has(selection.name);
  return Boolean(findGroup(treeOf(state.step, state.view), selection.path));
}

// -- expanding -----------------------------------------------------------------------------------

function currentTree() {
  return treeOf(state.step, state.view);
}

function setExpanded(group, open) {
  for (const path of new Set([group.path, ...group.aliases])) {
    if (open) state.expanded.add(path);
    else state.expanded.delete(path);
  }
}

function toggle(group) {
  setExpanded(group, !isExpanded(group, state.expanded));
  return refresh({ anchor: `group:${group.path}` });
}

function setAllExpanded(open, inside = currentTree()) {
  for (const group of groupsIn(inside)) setExpanded(group, open);
  if (inside.path) setExpanded(inside, open);
  return refresh(inside.path ? { anchor: `group:${inside.path}` } : { camera: "fit" });
}

function showChanges() {
  const hiding = groupsToShowChanges(currentTree(), state.expanded);
  if (!hiding.length) return Promise.resolve();
  for (const group of hiding) setExpanded(group, true);
  return refresh({ camera: "start" });
}

// -- selecting -----------------------------------------------------------------------------------

function select(selection) {
  state.selection = selection;
  tell("selection");
  if (selection) announce(`${selection.kind} ${selection.name || selection.path}`);
}

function selectBox(box) {
  if (!box) return select(null);
  return select(
    box.isGroup ? { kind: "group", path: box.child.path } : { kind: "node", name: box.child.name },
  );
}

/** Select a node or a group, open what it is in, and bring it to the middle. */
async function reveal(selection) {
  const tree = currentTree(); // nodes know their groups once there is a tree
  const inside =
    selection.kind === "node"
      ? pictureOf(state.step, state.view).nodes.get(selection.name)
      : findGroup(tree, selection.path);
  if (!inside) return select(null);
  const closed = ancestorsOf(inside).filter((group) => !isExpanded(group, state.expanded));
  for (const group of closed) setExpanded(group, true);
  showTab("graph");
  select(selection);
  if (closed.length) await refresh();
  const key = selection.kind === "node" ? `node:${selection.name}` : `group:${inside.path}`;
  const box = state.scene.byKey.get(key);
  if (box) lookAt(box);
  return undefined;
}

/** Show a node wherever in the story it can be seen: here, or before the step that removed it. */
async function revealAnywhere(name) {
  if (!pictureOf(state.step, state.view).nodes.has(name)) {
    const [first] = lifetimeOf(name);
    if (!first) return;
    const gone = stepThatRemoved(name);
    const keepsAll = state.view === "changes";
    if (graphsOf(state.step).before?.byName.has(name))
      await showStep(state.step, keepsAll ? "changes" : "before");
    else if (gone !== null) await showStep(gone, keepsAll ? "changes" : "before");
    else await showStep(LAST_STEP, "after");
  }
  await reveal({ kind: "node", name });
}

function selectedBox() {
  const { selection, scene } = state;
  if (!selection || !scene) return null;
  if (selection.kind === "node") return scene.byKey.get(`node:${selection.name}`) || null;
  return scene.byKey.get(`group:${selection.path}`) || null;
}

function showTab(tab) {
  if (state.tab === tab) return;
  state.tab = tab;
  tell("tab");
}
