"use strict";
/*
 * A picture's nodes as a tree of modules. A group is a module path with the nodes under it; a leaf
 * is a node of the picture. What would be a frame around next to nothing is no group:
 *
 * - a module of fewer than SMALLEST_GROUP nodes, in every graph of the story;
 * - a chain of modules that hold one module each is one group, named by the innermost;
 * - a small layer called in several places (the one ReLU of a block): its nodes stand where it was
 *   called.
 *
 * Where a module that contains others runs many operators itself from one source line (Hugging
 * Face's attention masks, in the model's own `forward`), these are a group, named by the line. And
 * what still has more children than anybody can look at is cut into stretches.
 */

const SMALLEST_GROUP = 3;
const SMALLEST_LINE = 6;
const MOST_CHILDREN = 160;
const STRETCH = 40;

/** The most nodes that a module ever has, by path: the same in each picture of the story. */
const largestSize = remember(() => {
  const largest = new Map();
  for (const graph of new Set(graphsAfter)) {
    const sizes = new Map();
    for (const record of graph.records) {
      for (const path of prefixesOf(record.path)) sizes.set(path, (sizes.get(path) || 0) + 1);
    }
    for (const [path, size] of sizes) largest.set(path, Math.max(size, largest.get(path) || 0));
  }
  return largest;
});

/** The tree of a picture. */
const treeOf = remember((step, view) => {
  const root = new Group("", null);
  const groups = new Map([["", root]]);
  for (const node of pictureOf(step, view).nodes.values()) {
    groupFor(node.record.path, groups).children.push(node);
  }
  simplify(root);
  bundleLines(root);
  cutStretches(root);
  summarize(root);
  return root;
});

function groupFor(path, groups) {
  let group = groups.get("");
  for (const prefix of prefixesOf(path)) {
    if (!groups.has(prefix)) {
      groups.set(prefix, new Group(prefix, group));
      group.children.push(groups.get(prefix));
    }
    group = groups.get(prefix);
  }
  return group;
}

/** Take out, from the leaves up, the groups that are not worth a frame. */
function simplify(group) {
  const children = [];
  for (const child of group.children) {
    if (!isGroup(child)) {
      children.push(child);
      continue;
    }
    simplify(child);
    const only = child.children.length === 1 && child.children[0];
    if (only && isGroup(only)) {
      only.aliases = [...child.aliases, ...only.aliases];
      only.parent = group;
      children.push(only);
    } else if (only || largestSize().get(child.path) < SMALLEST_GROUP || isScattered(child)) {
      for (const grandchild of child.children) {
        if (isGroup(grandchild)) grandchild.parent = group;
        children.push(grandchild);
      }
    } else {
      children.push(child);
    }
  }
  group.children = children;
  sortByOrder(group);
}

/** Children stand where their first node stands in the graph. */
function sortByOrder(group) {
  const first = new Map();
  for (const child of group.children) first.set(child, firstNode(child).order);
  group.children.sort((a, b) => first.get(a) - first.get(b));
}

function firstNode(child) {
  return isGroup(child) ? firstNode(child.children[0]) : child;
}

function lastNode(child) {
  return isGroup(child) ? lastNode(child.children.at(-1)) : child;
}

/** Whether a group is a small layer that runs in several places, a few nodes at a time. */
function isScattered(group) {
  if (group.children.some(isGroup)) return false;
  let runs = 0,
    longest = 0,
    length = 0,
    last = null;
  for (const node of group.children) {
    length = last !== null && node.order === last + 1 ? length + 1 : 1;
    if (length === 1) runs += 1;
    longest = Math.max(longest, length);
    last = node.order;
  }
  return runs > 1 && longest <= SMALLEST_GROUP;
}

function bundleLines(group) {
  if (group.children.some(isGroup)) {
    group.children = [...bundled(group)];
  }
  for (const child of group.children) {
    if (isGroup(child) && isModule(child)) bundleLines(child);
  }
}

function* bundled(group) {
  const lineOf = (child) => (isGroup(child) ? "" : child.record.source);
  const { children } = group;
  const seen = new Map();
  for (let start = 0, end = 0; start < children.length; start = end) {
    const line = lineOf(children[start]);
    for (end = start + 1; line && end < children.length && lineOf(children[end]) === line;) end++;
    if (!line || end - start < SMALLEST_LINE) {
      yield* children.slice(start, end);
      continue;
    }
    const { place, code } = sourceParts(line);
    addTo(seen, place, 1);
    const bundle = new Group(`${group.path}@${place}#${seen.get(place)}`, group);
    bundle.line = { place, code };
    bundle.children = children.slice(start, end);
    yield bundle;
  }
}

/** Cut the children of a group with very many of them into groups of consecutive ones. */
function cutStretches(group) {
  for (const child of group.children) if (isGroup(child)) cutStretches(child);
  while (group.children.length > MOST_CHILDREN) {
    const stretches = [];
    for (let start = 0; start < group.children.length; start += STRETCH) {
      const children = group.children.slice(start, start + STRETCH);
      const first = firstNode(children[0]).name;
      const stretch = new Group(`${group.path}@${first}+${group.children.length}`, group);
      stretch.stretch = { first, last: lastNode(children.at(-1)).name };
      stretch.children = children;
      stretches.push(stretch);
    }
    group.children = stretches;
  }
}
