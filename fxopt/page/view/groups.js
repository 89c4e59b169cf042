"use strict";
/* A group of nodes, that is a module or what else holds nodes together: its sums, and its names. */

class Group {
  constructor(path, parent) {
    this.path = path; // unique in its tree; "" is the root
    this.parent = parent;
    this.aliases = [path]; // the module paths that this group stands for, outermost first
    this.children = []; // groups and nodes, in the order of the graph
    this.line = null; // { place, code } where a source line is what holds the nodes together
    this.stretch = null; // { first, last } where nothing but their order does
  }

  get depth() {
    return this.parent ? this.parent.depth + 1 : 0;
  }
}

function isGroup(child) {
  return child instanceof Group;
}

function partsOf(path) {
  return path.split(/[./]/).filter(Boolean);
}

function prefixesOf(path) {
  const parts = partsOf(path);
  return parts.map((_, index) => parts.slice(0, index + 1).join("."));
}

// -- what a group amounts to ---------------------------------------------------------------------

const QUANTITIES = ["macs", "flops", "params", "read", "written", "ms"];

/** The names of the bodies of control flow, whose nodes are called `body/name`. */
const bodies = new Set(page.records.flatMap((record) => record.name.split("/").slice(0, -1)));

/** Whether a group is such a body: the operator that runs it counts for all that is inside. */
function isBody(group) {
  return group.aliases.some((path) => bodies.has(partsOf(path).at(-1)));
}

/**
 * Add up nodes, costs, changes and families, from the leaves up. Removed nodes cost nothing, and a
 * parameter counts once, however many nodes share it.
 */
function summarize(group) {
  group.size = 0;
  group.delta = { removed: 0, added: 0, changed: 0 };
  group.families = new Map();
  group.totals = Object.fromEntries(QUANTITIES.map((quantity) => [quantity, 0]));
  group.parameters = new Map();
  for (const child of group.children) {
    child.parent = group;
    if (isGroup(child)) summarize(child);
    addChild(group, child);
  }
  group.totals.params = sum(group.parameters.values(), (count) => count);
}

function addChild(group, child) {
  if (isGroup(child)) {
    group.size += child.size;
    for (const kind in group.delta) group.delta[kind] += child.delta[kind];
    for (const [family, count] of child.families) addTo(group.families, family, count);
    if (isBody(child)) return;
    for (const quantity of QUANTITIES) group.totals[quantity] += child.totals[quantity];
    for (const [name, count] of child.parameters) group.parameters.set(name, count);
    return;
  }
  if (child.status !== "same") group.delta[child.status] += 1;
  if (!child.isLive) return;
  if (child.record.kind === "call") group.size += 1;
  for (const quantity of QUANTITIES) group.totals[quantity] += child.record[quantity] || 0;
  for (const [name, count] of Object.entries(child.record.parameters))
    group.parameters.set(name, count);
  addTo(group.families, child.record.family, 1);
}

function addTo(counts, key, count) {
  counts.set(key, (counts.get(key) || 0) + count);
}

function hasChanges(group) {
  const { removed, added, changed } = group.delta;
  return removed + added + changed > 0;
}

// -- finding and naming --------------------------------------------------------------------------

function* groupsIn(group) {
  for (const child of group.children) {
    if (!isGroup(child)) continue;
    yield child;
    yield* groupsIn(child);
  }
}

/** The groups around a node of the picture or around a group, innermost first, without the root. */
function ancestorsOf(child) {
  const found = [];
  for (let group = child.parent; group && group.path; group = group.parent) found.push(group);
  return found;
}

function findGroup(root, path) {
  const wanted = partsOf(path).join(".");
  for (const group of groupsIn(root)) {
    if (group.path === path || group.aliases.includes(wanted)) return group;
  }
  return null;
}

const CONTAINERS = new Set(["Sequential", "ModuleList", "ModuleDict", "Module", ""]);

function shortClass(name) {
  return name ? name.split(".").pop() : "";
}

/** The class of a group: that of the innermost module of its chain that is no mere container. */
function classOf(group) {
  const known = group.aliases.map((path) => page.modules[path] || "");
  return known.findLast((name) => !CONTAINERS.has(shortClass(name))) || known.at(-1);
}

/** Whether a group stands for a module, not for a source line or a stretch. */
function isModule(group) {
  return !group.line && !group.stretch;
}

/** The path of the innermost module around a group. */
function moduleAround(group) {
  return group.parent.parent && !isModule(group.parent)
    ? moduleAround(group.parent)
    : group.parent.path;
}

/** A group's two names: its class and its path relative to the group around it; of a mere container
 * the path says more. */
function titleOf(group) {
  if (group.line) return { what: group.line.code || "source line", where: group.line.place };
  if (group.stretch)
    return { what: `${group.stretch.first} … ${group.stretch.last}`, where: "in order" };
  const around = moduleAround(group);
  const where = around ? group.path.slice(around.length + 1) : group.path;
  const what = shortClass(classOf(group));
  return CONTAINERS.has(what) ? { what: where, where: what } : { what, where };
}

/** 'folder/file.py:12: code' in its parts. */
function sourceParts(source) {
  const match = /^(.*?):(\d+): ?(.*)$/s.exec(source);
  if (!match) return { file: source, place: source, code: "" };
  return { file: match[1], place: `${match[1].split(/[\\/]/).pop()}:${match[2]}`, code: match[3] };
}
