"use strict";
/*
 * One level as a graph for ELK: sizes, ports, and which wires it has to route. Ids are positions in
 * the level, so that equal levels have equal descriptions.
 */

const LEVEL_OPTIONS = {
  "elk.algorithm": "layered",
  "elk.direction": "DOWN",
  "elk.edgeRouting": "ORTHOGONAL",
  "elk.portConstraints": "FIXED_SIDE",
  "elk.layered.cycleBreaking.strategy": "MODEL_ORDER",
  "elk.spacing.nodeNode": "28",
  "elk.spacing.edgeNode": "16",
  "elk.spacing.edgeEdge": "10",
  "elk.layered.spacing.nodeNodeBetweenLayers": "30",
  "elk.layered.spacing.edgeNodeBetweenLayers": "14",
  "elk.layered.spacing.edgeEdgeBetweenLayers": "8",
};
// The shortest wires, and boxes in the order of the graph: for small levels.
const THOROUGH = {
  "elk.layered.nodePlacement.strategy": "NETWORK_SIMPLEX",
  "elk.layered.considerModelOrder.strategy": "NODES_AND_EDGES",
};
const FAST = {
  "elk.layered.nodePlacement.strategy": "BRANDES_KOEPF",
  "elk.layered.nodePlacement.bk.fixedAlignment": "BALANCED",
  "elk.layered.thoroughness": "2",
  "elk.layered.crossingMinimization.greedySwitch.type": "OFF",
};
const MOST_THOROUGH = 250; // boxes, and places where a wire passes by a box
// Where a dense block wires each layer to each other, the long wires are left out: they would take
// minutes, and nobody could follow them. They are drawn while their box is selected.
const MOST_PASSING = 1500;
const PADDING = "[top=%t,left=16,bottom=18,right=16]";

/** A level as an ELK graph; `level.ends` is set to the ports of each wire. */
function described(level) {
  const numbers = new Map(level.boxes.map((box, number) => [box, number]));
  const wires = [...level.wires.values()];
  const ranks = ranksOf(level, wires);
  const spans = wires.map((wire) => spanOf(wire, level, ranks));
  const arrivals = arrivalsOf(wires, ranks);
  level.ends = wires.map((wire) => endsOf(wire, numbers, arrivals));
  const edges = wires.map((wire, number) => ({
    id: `e${number}`,
    sources: [level.ends[number][0]],
    targets: [level.ends[number][1]],
    layoutOptions: {
      "elk.layered.priority.straightness": arrivals.get(wire)?.isAside ? "1" : "10",
    },
  }));
  const longest = longestRouted(spans);
  return {
    id: "level",
    layoutOptions: levelOptions(
      level,
      sum(spans, (span) => span),
    ),
    ports: [
      ...Array.from(level.inputs.values(), (number) => describedPort(`in${number}`, "NORTH")),
      ...Array.from(level.outputs.values(), (number) => describedPort(`out${number}`, "SOUTH")),
    ],
    children: level.boxes.map((box, number) => ({
      id: `${number}`,
      width: box.width,
      height: box.height,
      layoutOptions: { "elk.portConstraints": "FIXED_POS" },
      ports: portsOf(box, arrivals).map(({ id, side, x, y }) => ({
        ...describedPort(`${number}${id}`, side),
        x,
        y,
      })),
    })),
    edges: edges.filter((_, number) => spans[number] <= longest),
  };
}

function levelOptions(level, passing) {
  const top = level.frame ? BOX.title + 14 : 16;
  const least = level.frame ? frameWidth(level.frame.child) : 0;
  return {
    ...LEVEL_OPTIONS,
    ...(level.boxes.length + passing > MOST_THOROUGH ? FAST : THOROUGH),
    "elk.padding": PADDING.replace("%t", top),
    "elk.nodeSize.constraints": "MINIMUM_SIZE",
    "elk.nodeSize.minimum": `(${Math.ceil(least)}, 0)`,
  };
}

// -- wires ---------------------------------------------------------------------------------------

/** How many boxes come before a box on the longest way from the top. */
function ranksOf(level, wires) {
  const into = new Map();
  for (const { from, to } of wires) if (from.box && to.box) append(into, to.box, from.box);
  const ranks = new Map();
  for (const box of level.boxes) {
    const before = (into.get(box) || []).map((source) => ranks.get(source) ?? -1);
    ranks.set(box, Math.max(-1, ...before) + 1);
  }
  return ranks;
}

/** How many ranks a wire passes by. */
function spanOf({ from, to }, level, ranks) {
  const start = from.box ? ranks.get(from.box) : -1;
  const end = to.box ? ranks.get(to.box) : Math.max(...ranks.values()) + 1;
  return Math.max(Math.abs(end - start) - 1, 0);
}

/** The largest span for which all wires up to it together are not too much to lay out. */
function longestRouted(spans) {
  let total = 0;
  for (const span of [...spans].sort((a, b) => a - b)) {
    total += span;
    if (total > MOST_PASSING) return span - 1;
  }
  return Infinity;
}

/** The ports that a wire goes from and to. */
function endsOf(wire, numbers, arrivals) {
  const end = ({ box, port }, direction) =>
    `${box ? numbers.get(box) : ""}${direction}${port ?? ""}`;
  const arrival = arrivals.get(wire);
  return [
    end(wire.from, wire.from.box ? "out" : "in"),
    arrival ? `${numbers.get(wire.to.box)}${arrival.id}` : end(wire.to, wire.to.box ? "in" : "out"),
  ];
}

// -- ports ---------------------------------------------------------------------------------------

function describedPort(id, side) {
  return { id, width: 0, height: 0, layoutOptions: { "elk.port.side": side } };
}

/** Where wires end on a box: on a frame where they come in and go out inside; on other boxes one
 * port for what goes out, in the middle, and one for each wire that comes in. */
function portsOf(box, arrivals) {
  if (box.inner) {
    return box.inner.result.ports.map(({ id, x, y }) => ({
      id,
      side: id.startsWith("in") ? "NORTH" : "SOUTH",
      x,
      y,
    }));
  }
  const incoming = [...box.level.wires.values()].filter((wire) => wire.to.box === box);
  return [
    { id: "out", side: "SOUTH", x: box.width / 2, y: box.height },
    ...incoming.map((wire) => ({ ...arrivals.get(wire), side: "NORTH", y: 0 })),
  ];
}

/** The port at which each wire to a box arrives: `{id, x, isAside}`. */
function arrivalsOf(wires, ranks) {
  const into = new Map();
  for (const wire of wires) if (wire.to.box && !wire.to.box.inner) append(into, wire.to.box, wire);
  return new Map([...into].flatMap(([box, incoming]) => arranged(box, incoming, ranks)));
}

const PARALLEL = 2; // ranks

/** Wires from near above share the middle of a box, so that a chain runs straight down; those from
 * further up (skip connections) arrive on their right, and removed ones on their left. */
function arranged(box, wires, ranks) {
  const rank = (wire) => (wire.from.box ? ranks.get(wire.from.box) : -1);
  const live = wires.filter((wire) => wire.status !== "removed");
  const left = live.length ? wires.filter((wire) => wire.status === "removed") : [];
  const rest = live.length ? live : wires;
  const nearest = Math.max(...rest.map(rank));
  const middle = rest.filter((wire) => rank(wire) >= nearest - PARALLEL);
  const right = rest.filter((wire) => rank(wire) < nearest - PARALLEL);
  const widest = Math.max(left.length, right.length) + (middle.length - 1) / 2;
  const gap = Math.min(18, (box.width / 2 - 12) / Math.max(widest, 1));
  const start = box.width / 2 - gap * ((middle.length - 1) / 2 + left.length);
  return [...left, ...middle, ...right].map((wire, index) => [
    wire,
    { id: `in${index}`, x: start + gap * index, isAside: !middle.includes(wire) },
  ]);
}
