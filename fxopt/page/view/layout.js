"use strict";
/*
 * Where boxes and wires go: ELK's layered algorithm, one level at a time, from the innermost out.
 *
 * ELK can lay out nested graphs in one go, but then each click on a group lays out everything
 * again. One level at a time, a level is laid out once for as long as the page lives: equal levels
 * (the layers of a transformer, the same block before and after a pass) have equal descriptions,
 * and the description is the key. A frame's ports are free inside and fixed outside.
 */

const layouts = new Map(); // description of a level: promise of its layout
const elk = new ELK({ workerFactory: makeWorker, algorithms: ["layered"] });

/** A Web Worker from the source in the page; where the browser refuses, the same on this thread. */
function makeWorker() {
  const source = document.getElementById("elk-worker").textContent;
  try {
    const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
    return new Worker(url);
  } catch (error) {
    console.info(`No worker, so layouts run on the page's own thread: ${error.message}`);
    const module = { exports: {} };
    new Function("module", "exports", "document", source)(module, module.exports, document);
    return new module.exports.Worker();
  }
}

/** Give every box of a scene its place, and every wire its points, in the picture's own pixels. */
async function layOut(scene) {
  await layOutLevel(scene.root);
  scene.wires = [];
  placeLevel(scene, scene.root, 0, 0);
  scene.width = scene.root.width;
  scene.height = scene.root.height;
  return scene;
}

async function layOutLevel(level) {
  await Promise.all(level.boxes.filter((box) => box.inner).map((box) => layOutLevel(box.inner)));
  for (const box of level.boxes) {
    if (box.inner) Object.assign(box, { width: box.inner.width, height: box.inner.height });
    else Object.assign(box, sizeOf(box));
  }
  const graph = described(level);
  const description = JSON.stringify(graph);
  if (!layouts.has(description)) {
    layouts.set(description, elk.layout({ id: "top", children: [graph] }));
  }
  const result = (await layouts.get(description)).children[0];
  level.result = result;
  level.width = result.width;
  level.height = result.height;
}

// -- from ELK ------------------------------------------------------------------------------------

function placeLevel(scene, level, left, top) {
  const { children, edges } = level.result;
  level.boxes.forEach((box, number) => {
    box.x = left + children[number].x;
    box.y = top + children[number].y;
    if (box.inner) placeLevel(scene, box.inner, box.x, box.y);
  });
  const routes = new Map(edges.map((edge) => [edge.id, edge.sections.flatMap(pointsOf)]));
  const portPlaces = placesOfPorts(level.result);
  [...level.wires.values()].forEach((wire, number) => {
    const route = routes.get(`e${number}`);
    wire.isFar = !route; // it was left out of the layout; see level.js
    wire.points = (
      route || straightAcross(...level.ends[number].map((id) => portPlaces.get(id)))
    ).map(([x, y]) => [left + x, top + y]);
    const xs = wire.points.map(([x]) => x),
      ys = wire.points.map(([, y]) => y);
    wire.bounds = [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
    scene.wires.push(wire);
  });
}

function pointsOf({ startPoint, bendPoints = [], endPoint }) {
  return [startPoint, ...bendPoints, endPoint].map(({ x, y }) => [x, y]);
}

function placesOfPorts({ ports, children }) {
  const places = new Map(ports.map(({ id, x, y }) => [id, [x, y]]));
  for (const child of children) {
    for (const { id, x, y } of child.ports) places.set(id, [child.x + x, child.y + y]);
  }
  return places;
}

function straightAcross([startX, startY], [endX, endY]) {
  return [
    [startX, startY],
    [startX, startY + 12],
    [endX, endY - 12],
    [endX, endY],
  ];
}
