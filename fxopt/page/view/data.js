"use strict";
/*
 * The page's data, and what follows from it without knowing how it is shown: the graph after each
 * step, what a step removed, added and changed, and where in the story a node comes and goes.
 *
 * A *picture* is what one view of one step shows: nodes with a status, and edges with a status.
 */

const page = JSON.parse(document.getElementById("data").textContent);
const OVERALL = -1; // the step that stands for all of them: captured graph to final graph
const LAST_STEP = page.steps.length - 1;
const FIRST_STEP = LAST_STEP > 0 ? OVERALL : 0; // where no pass ran, there is nothing overall
const VIEWS = ["before", "changes", "after"];

/** A graph after a step: its records in topological order, and by name. */
class Graph {
  constructor(indices) {
    this.records = indices.map((index) => page.records[index]);
    this.byName = new Map(this.records.map((record) => [record.name, record]));
  }
}

const graphsAfter = [];
for (const step of page.steps) {
  graphsAfter.push(step.records ? new Graph(step.records) : graphsAfter.at(-1));
}

/** The graphs before and after a step; capture has no graph before it. */
function graphsOf(step) {
  if (step === OVERALL) return { before: graphsAfter[0], after: graphsAfter[LAST_STEP] };
  return { before: step > 0 ? graphsAfter[step - 1] : null, after: graphsAfter[step] };
}

function viewsOf(step) {
  return graphsOf(step).before ? VIEWS : ["after"];
}

function stepTitle(step) {
  return step === OVERALL ? "All passes" : page.steps[step].name;
}

/** Names removed, added and changed by a step, each in the order of its graph. */
const deltaOf = remember((step) => {
  const { before, after } = graphsOf(step);
  if (!before || before === after) return { removed: [], added: [], changed: [], kept: null };
  const removed = [],
    added = [],
    changed = [];
  for (const record of before.records) {
    if (!after.byName.has(record.name)) removed.push(record.name);
  }
  for (const record of after.records) {
    const old = before.byName.get(record.name);
    if (!old) added.push(record.name);
    else if (old !== record) changed.push(record.name);
  }
  return { removed, added, changed };
});

/** What a view of a step shows, in an order that both graphs agree with as far as they agree. */
const pictureOf = remember((step, view) => {
  const { before, after } = graphsOf(step);
  const shown = [];
  for (const name of namesOf(view, before, after)) {
    const old = before ? before.byName.get(name) : null,
      now = after.byName.get(name);
    shown.push({
      name,
      before: old || null,
      after: now || null,
      order: shown.length,
      record: view === "before" ? old : now || old,
      status: !before || old === now ? "same" : !now ? "removed" : !old ? "added" : "changed",
      isLive: view === "before" || Boolean(now), // whether it counts in sums
      parent: null, // the group it stands in; see tree.js
    });
  }
  const nodes = new Map(shown.map((node) => [node.name, node]));
  const picture = { step, view, nodes, edges: [...edgesOf(view, nodes)], users: new Map() };
  for (const edge of picture.edges) append(picture.users, edge.source, edge.target);
  return picture;
});

function namesOf(view, before, after) {
  if (view === "before") return before.byName.keys();
  if (view === "after" || before === after) return after.byName.keys();
  return mergedNames(
    before.records.map((r) => r.name),
    after.records.map((r) => r.name),
  );
}

/** All names of both orders: that of `after`, with a removed name behind its last predecessor. */
function mergedNames(before, after) {
  const kept = new Set(after);
  const behind = new Map(); // name that stays, or null for the start: removed names
  let last = null;
  for (const name of before) {
    if (kept.has(name)) last = name;
    else append(behind, last, name);
  }
  const merged = [...(behind.get(null) || [])];
  for (const name of after) merged.push(name, ...(behind.get(name) || []));
  return merged;
}

function* edgesOf(view, nodes) {
  for (const { name, before, after, status } of nodes.values()) {
    const old = view !== "after" && before ? before.inputs : [];
    const now = view !== "before" && after ? after.inputs : [];
    const kept = new Set(now);
    for (const source of now) {
      if (!nodes.has(source)) continue;
      const isNew = status === "added" || (status === "changed" && !before.inputs.includes(source));
      yield { source, target: name, status: view === "changes" && isNew ? "added" : "same" };
    }
    for (const source of old) {
      if (kept.has(source) || !nodes.has(source)) continue;
      yield { source, target: name, status: view === "changes" ? "removed" : "same" };
    }
  }
}

/** The states of a node over the story: `{step, record}` for each step that gave it another. */
const lifetimeOf = remember((name) => {
  const states = [];
  for (let step = 0; step <= LAST_STEP; step++) {
    const record = graphsAfter[step].byName.get(name) || null;
    const last = states.at(-1);
    if ((last ? last.record : null) !== record) states.push({ step, record });
  }
  return states;
});

/** The last step before which a node was still there: that is where it can be looked at. */
function stepThatRemoved(name) {
  const gone = lifetimeOf(name).findLast((state) => state.record === null);
  return gone ? gone.step : null;
}

// -- small things that everything uses ---------------------------------------------------------

/** Cache a pure function by its arguments. */
function remember(compute) {
  const known = new Map();
  return (...keys) => {
    const key = keys.join("\n");
    if (!known.has(key)) known.set(key, compute(...keys));
    return known.get(key);
  };
}

function append(lists, key, value) {
  const list = lists.get(key);
  if (list) list.push(value);
  else lists.set(key, [value]);
}

function sum(items, value) {
  let total = 0;
  for (const item of items) total += value(item) || 0;
  return total;
}
