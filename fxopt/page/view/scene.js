"use strict";
/*
 * What is visible of a picture: boxes, and wires between them. A box is a node or a group; an
 * expanded group is a frame, and what it holds is a *level* of its own, laid out by itself.
 *
 * So a value that crosses the border of a frame goes through a port there: a wire inside, a port, a
 * wire outside. Each value has one port per frame, whoever uses it.
 */

class Level {
  constructor(frame) {
    this.frame = frame; // the expanded box that holds this level, or null
    this.boxes = [];
    this.wires = new Map();
    this.inputs = new Map(); // number of the port on the frame, by the box that makes the value
    this.outputs = new Map();
  }
}

class Box {
  constructor(child, level, scene) {
    this.child = child; // a Group, or a node of the picture
    this.isGroup = isGroup(child);
    this.key = this.isGroup ? `group:${child.path}` : `node:${child.name}`;
    this.level = level;
    this.depth = level.frame ? level.frame.depth + 1 : 0;
    this.inner = null; // the level of an expanded group
    this.number = scene.boxes.length;
    Object.assign(this, { x: 0, y: 0, width: 0, height: 0 });
  }

  get title() {
    return this.isGroup ? this.child.path : this.child.name;
  }

  get status() {
    if (!this.isGroup) return this.child.status;
    return hasChanges(this.child) ? "changed-inside" : "same";
  }
}

/** The boxes and wires of a picture when the groups in `expanded` (module paths) are open. */
function sceneOf(step, view, expanded) {
  const picture = pictureOf(step, view);
  const scene = { step, view, picture, boxes: [], byKey: new Map(), boxOfNode: new Map() };
  scene.root = new Level(null);
  addBoxes(scene, scene.root, treeOf(step, view), expanded);
  for (const edge of picture.edges) addEdge(scene, edge);
  return scene;
}

function isExpanded(group, expanded) {
  return expanded.has(group.path) || group.aliases.some((path) => expanded.has(path));
}

function addBoxes(scene, level, group, expanded) {
  for (const child of group.children) {
    const box = new Box(child, level, scene);
    level.boxes.push(box);
    scene.boxes.push(box);
    scene.byKey.set(box.key, box);
    if (!box.isGroup) {
      scene.boxOfNode.set(child.name, box);
    } else if (isExpanded(child, expanded)) {
      box.inner = new Level(box);
      addBoxes(scene, box.inner, child, expanded);
    } else {
      for (const node of nodesIn(child)) scene.boxOfNode.set(node.name, box);
    }
  }
}

function* nodesIn(group) {
  for (const child of group.children) {
    if (isGroup(child)) yield* nodesIn(child);
    else yield child;
  }
}

/** Wire up two boxes: out of the frames around the source, across, and into those of the target. */
function addEdge(scene, edge) {
  const source = scene.boxOfNode.get(edge.source),
    target = scene.boxOfNode.get(edge.target);
  if (source === target) return;
  const shared = sharedLevel(source.level, target.level);
  let from = { box: source, port: null },
    to = { box: target, port: null };
  for (let level = source.level; level !== shared; level = level.frame.level) {
    const port = portFor(level.outputs, source);
    addWire(level, from, { box: null, port }, source, edge);
    from = { box: level.frame, port };
  }
  for (let level = target.level; level !== shared; level = level.frame.level) {
    const port = portFor(level.inputs, source);
    addWire(level, { box: null, port }, to, source, edge);
    to = { box: level.frame, port };
  }
  addWire(shared, from, to, source, edge);
}

function portFor(ports, source) {
  if (!ports.has(source)) ports.set(source, ports.size);
  return ports.get(source);
}

function sharedLevel(a, b) {
  while (a !== b) {
    const up = (a.frame ? a.frame.depth : -1) >= (b.frame ? b.frame.depth : -1);
    if (up) a = a.frame.level;
    else b = b.frame.level;
  }
  return a;
}

function addWire(level, from, to, source, edge) {
  const key = `${from.box ? from.box.number : ""}>${to.box ? to.box.number : ""}:${source.number}`;
  const wire = level.wires.get(key);
  if (!wire) {
    level.wires.set(key, { level, from, to, source, status: edge.status, value: edge.source });
  } else if (wire.status !== edge.status) {
    wire.status = "same"; // it carries more than one value, or one before and after
  }
}

// -- what to open at first -----------------------------------------------------------------------

const COMFORTABLE = 60; // boxes that a first look takes in

/** Open modules breadth first, one generation after the other, while the picture stays small. Of
 * the first generation, the small modules are opened even where not all can be. */
function firstExpansion(root, limit = COMFORTABLE) {
  const expanded = new Set();
  let shown = root.children.length;
  const isOpened = (child) => isGroup(child) && isModule(child) && child.size > 0;
  let generation = root.children.filter(isOpened);
  for (let isFirst = true; generation.length; isFirst = false) {
    const all = sum(generation, (group) => group.children.length - 1);
    const bySize = d3.sort(generation, (group) => group.children.length);
    if (shown + all > limit && !isFirst) break;
    for (const group of bySize) {
      if (shown + group.children.length - 1 > limit) break;
      shown += group.children.length - 1;
      expanded.add(group.path);
    }
    generation = generation
      .filter((group) => expanded.has(group.path))
      .flatMap((group) => group.children.filter(isOpened));
  }
  return expanded;
}

/** The groups that hide changes, outermost first, while they add no more than `limit` boxes. */
function groupsToShowChanges(root, expanded, limit = 400) {
  const found = [];
  let shown = 0;
  let generation = root.children.filter(isGroup);
  while (generation.length) {
    const next = [];
    for (const group of generation.filter(hasChanges)) {
      const isOpen = isExpanded(group, expanded);
      if (!isOpen && shown + group.children.length > limit) continue;
      if (!isOpen) {
        shown += group.children.length;
        found.push(group);
      }
      next.push(...group.children.filter(isGroup));
    }
    generation = next;
  }
  return found;
}
