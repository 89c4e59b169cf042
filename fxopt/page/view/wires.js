"use strict";
/* Drawing the wires, and finding those that belong to a box. */

function paintWires(scene, seen, related) {
  if (motion) context.globalAlpha = motion.progress ** 2;
  const batches = { same: [], removed: [], added: [], related: [] };
  for (const wire of scene.wires) {
    const [left, top, right, bottom] = wire.bounds;
    if (right < seen.left || left > seen.right || bottom < seen.top || top > seen.bottom) continue;
    if (related.wires.has(wire)) batches.related.push(wire);
    else if (!wire.isFar) batches[wire.status].push(wire);
  }
  const thin = Math.max(1.2, 0.9 / seen.k);
  paintBatch(batches.same, colours.wire, thin, seen);
  paintBatch(batches.removed, colours.removed, thin, seen, [5, 4]);
  paintBatch(batches.added, colours.added, thin * 1.2, seen);
  paintBatch(batches.related, colours.accent, thin * 1.5, seen);
  context.globalAlpha = 1;
}

function paintBatch(wires, colour, lineWidth, seen, dash = []) {
  if (!wires.length) return;
  const radius = seen.k > DETAIL.shape ? 7 : 0;
  context.beginPath();
  for (const { points } of wires) traceWire(points, radius);
  context.strokeStyle = colour;
  context.lineWidth = lineWidth;
  context.setLineDash(dash);
  context.stroke();
  context.setLineDash([]);
  if (seen.k < DETAIL.arrow) return;
  context.fillStyle = colour;
  context.beginPath();
  for (const wire of wires) if (wire.to.box && !wire.to.box.inner) traceArrow(wire.points);
  context.fill();
}

function traceWire(points, radius) {
  context.moveTo(...points[0]);
  for (let i = 1; i < points.length - 1; i++) {
    if (radius) context.arcTo(...points[i], ...points[i + 1], bend(points, i, radius));
    else context.lineTo(...points[i]);
  }
  context.lineTo(...points.at(-1));
}

/** The radius of a corner: no more than half of either side. */
function bend(points, i, radius) {
  const side = (a, b) => Math.abs(a[0] - b[0]) + Math.abs(a[1] - b[1]);
  return Math.min(radius, side(points[i - 1], points[i]) / 2, side(points[i], points[i + 1]) / 2);
}

function traceArrow(points) {
  const [x, y] = points.at(-1),
    [px, py] = points.at(-2);
  const length = Math.hypot(x - px, y - py) || 1;
  const ux = (x - px) / length,
    uy = (y - py) / length;
  context.moveTo(x, y);
  context.lineTo(x - 7 * ux - 3.6 * uy, y - 7 * uy + 3.6 * ux);
  context.lineTo(x - 7 * ux + 3.6 * uy, y - 7 * uy - 3.6 * ux);
}

/** The shape of a value beside the wire that carries it, where no box beside it says so: below a
 * collapsed group, and below the title of a frame that the value comes into. */
function paintWireLabels(scene, seen) {
  const labelled = new Set();
  for (const wire of scene.wires) {
    const { from, level, points, source } = wire;
    if (wire.isFar || (from.box && (!from.box.isGroup || from.box.inner))) continue;
    const key = `${level.frame ? level.frame.number : ""}:${source.number}`;
    const [x, top] = points[0];
    const y = top + (from.box ? 17 : BOX.title + 10);
    const isTurned = !from.box && points[1][1] < y;
    if (labelled.has(key) || isTurned || !isInView(x, y, seen)) continue;
    labelled.add(key);
    const { shape } = scene.picture.nodes.get(wire.value).record;
    if (shape) write(shape, x + 6, y, "badge", colours.faint);
  }
}

function isInView(x, y, seen) {
  return x > seen.left - 100 && x < seen.right && y > seen.top && y < seen.bottom + 20;
}

// -- what belongs together -----------------------------------------------------------------------

const NOTHING = { wires: new Set(), boxes: new Set() };
let lastRelated = { scene: null, box: null, found: NOTHING };

/** The wires that bring values to a box and take its values away, and the boxes at their ends. */
function relatedTo(scene, box) {
  if (!box) return NOTHING;
  if (lastRelated.scene === scene && lastRelated.box === box) return lastRelated.found;
  const found = { wires: new Set(), boxes: new Set() };
  for (const wire of box.level.wires.values()) {
    if (wire.to.box === box) follow(wire, "from", found);
    if (wire.from.box === box) follow(wire, "to", found);
  }
  lastRelated = { scene, box, found };
  return found;
}

/** Follow a value through the borders of frames: back to the box it is from, or on to its users. */
function follow(wire, side, found) {
  if (found.wires.has(wire)) return;
  found.wires.add(wire);
  const end = wire[side],
    other = side === "from" ? "to" : "from";
  if (end.box && !end.box.inner) {
    found.boxes.add(end.box);
    return;
  }
  // through the port of a frame: into it, or out of the one around this level
  const level = end.box ? end.box.inner : wire.level.frame.level;
  const frame = end.box ? null : wire.level.frame;
  for (const next of level.wires.values()) {
    if (next[other].box === frame && next[other].port === end.port) follow(next, side, found);
  }
}
