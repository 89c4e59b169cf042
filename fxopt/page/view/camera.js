"use strict";
/* Which part of the scene the canvas shows: zoom, pan, fit, and staying put when boxes move. */

const canvas = byId("canvas");
const MARGIN = { top: 60, right: 30, bottom: 44, left: 30 };
const FITS_AT_FIRST = 0.55; // the whole scene is shown first if it can be at this scale
const START_SCALE = 0.75; // else its start, at this one
const SMALLEST_FIT = 0.2; // below this a picture is not fitted by itself
// mode: "fit", "start", or "free" once it was moved by hand
const camera = { mode: "free", width: 0, height: 0 };

const zoomer = d3
  .zoom()
  .scaleExtent([0.01, 4])
  .clickDistance(4)
  .on("zoom", (event) => {
    if (event.sourceEvent) camera.mode = "free";
    byId("scale").textContent = `${Math.round(event.transform.k * 100)} %`;
    requestPaint();
  })
  .on("start", (event) =>
    canvas.classList.toggle("pressed", event.sourceEvent?.type === "mousedown"),
  )
  .on("end", () => canvas.classList.remove("pressed"));

function lens() {
  return d3.zoomTransform(canvas);
}

function setViewport(transform, { animated = false } = {}) {
  const selected = d3.select(canvas);
  selected.interrupt();
  if (animated && !calm.matches)
    selected.transition().duration(280).call(zoomer.transform, transform);
  else selected.call(zoomer.transform, transform);
}

function zoomBy(factor) {
  d3.select(canvas).interrupt().call(zoomer.scaleBy, factor);
  camera.mode = "free";
}

/** The canvas has another size on the page: as many device pixels as it covers. */
function resizeCanvas() {
  const { width, height } = canvas.getBoundingClientRect();
  if (!width || !height) return;
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  Object.assign(camera, { width, height });
  zoomer.extent([
    [0, 0],
    [width, height],
  ]);
  if (camera.mode === "fit" && state.scene) fit();
  paintNow();
}

function fitting(scene) {
  const width = camera.width - MARGIN.left - MARGIN.right;
  const height = camera.height - MARGIN.top - MARGIN.bottom;
  return Math.min(width / scene.width, height / scene.height, 1.15);
}

/** The whole scene, in the middle. */
function fit(options = {}) {
  const k = fitting(state.scene);
  setViewport(centred(state.scene, k), options);
  camera.mode = "fit";
}

/** The whole scene if it can be read like this, else its start, what stays in the middle. */
function showStart() {
  const { scene } = state;
  if (fitting(scene) >= FITS_AT_FIRST) {
    fit();
    return;
  }
  const k = START_SCALE;
  const isFirst = (box) => !box.inner && box.y < (camera.height - MARGIN.top) / k;
  const first = scene.boxes.filter((box) => isFirst(box) && isLive(box));
  const middle = (d3.min(first, (box) => box.x) + d3.max(first, (box) => box.x + box.width)) / 2;
  const x = MARGIN.left + (camera.width - MARGIN.left - MARGIN.right) / 2 - k * (middle || 0);
  setViewport(d3.zoomIdentity.translate(x, MARGIN.top).scale(k));
  camera.mode = "start";
}

/** Whether a box is there after the step, too. */
function isLive(box) {
  return box.isGroup ? box.child.size > 0 : box.status !== "removed";
}

function centred(scene, k) {
  const x = MARGIN.left + (camera.width - MARGIN.left - MARGIN.right - k * scene.width) / 2;
  const y = MARGIN.top + (camera.height - MARGIN.top - MARGIN.bottom - k * scene.height) / 2;
  return d3.zoomIdentity.translate(x, y).scale(k);
}

/** Bring a box to the middle, at a scale at which it can be read. */
function lookAt(box) {
  const { k } = lens();
  const widest = 0.8 * Math.min(camera.width / box.width, camera.height / box.height);
  const scale = Math.min(Math.max(k, 0.8), Math.max(widest, 0.05), 2);
  const x = camera.width / 2 - scale * (box.x + box.width / 2);
  const y = camera.height / 2 - scale * (box.y + box.height / 2);
  setViewport(d3.zoomIdentity.translate(x, y).scale(scale), { animated: true });
  camera.mode = "free";
}

/** Boxes have moved: go on looking at what was looked at. */
function moveCamera(old, scene, anchorKey, wish) {
  const room = Math.max(scene.width, scene.height, 3000);
  zoomer.translateExtent([
    [-room, -room],
    [scene.width + room, scene.height + room],
  ]);
  const fits = fitting(scene) >= SMALLEST_FIT;
  if (!old || wish === "start") showStart();
  else if (anchorKey) stayAt(old, scene, anchorKey);
  else if (fits && (wish === "fit" || camera.mode === "fit")) fit();
  else if (camera.mode === "free") stayAt(old, scene, null);
  else showStart();
}

function stayAt(old, scene, anchorKey) {
  const from = anchorIn(old, scene, anchorKey);
  if (!from) {
    showStart();
    return;
  }
  const to = scene.byKey.get(from.key);
  const dx = to.x - from.x,
    dy = to.y - from.y;
  setViewport(lens().translate(-dx, -dy));
  startMotion(old, scene, dx, dy);
}

/** A box of both scenes: the wanted one, the selected one, or the most central. */
function anchorIn(old, scene, anchorKey) {
  const selected = selectedBox();
  for (const key of [anchorKey, selected && selected.key]) {
    if (key && old.byKey.has(key) && scene.byKey.has(key)) return old.byKey.get(key);
  }
  const [x, y] = lens().invert([camera.width / 2, camera.height / 2]);
  const distance = (box) =>
    box.inner ? Infinity : Math.hypot(box.x + box.width / 2 - x, box.y + box.height / 2 - y);
  const shared = old.boxes.filter((box) => scene.byKey.has(box.key));
  return d3.least(shared, distance) || null;
}

// -- boxes that glide to their new places --------------------------------------------------------

const MOTION = { milliseconds: 240, mostBoxes: 1200 };
let motion = null;

function startMotion(old, scene, dx, dy) {
  if (calm.matches || scene.boxes.length > MOTION.mostBoxes) return;
  const from = new Map();
  for (const box of old.boxes) {
    from.set(box.key, { x: box.x + dx, y: box.y + dy, width: box.width, height: box.height });
  }
  motion = { from, start: performance.now(), progress: 0 };
}

/** Advance the motion; false when boxes stand still. */
function advanceMotion(now) {
  if (!motion) return false;
  const t = Math.min((now - motion.start) / MOTION.milliseconds, 1);
  motion.progress = d3.easeCubicOut(Math.max(t, 0));
  if (t >= 1) motion = null;
  return motion !== null;
}

/** Where a box is right now. */
function rectangleOf(box) {
  const from = motion && motion.from.get(box.key);
  if (!from) return box;
  const t = motion.progress,
    mix = (a, b) => a + (b - a) * t;
  return {
    x: mix(from.x, box.x),
    y: mix(from.y, box.y),
    width: mix(from.width, box.width),
    height: mix(from.height, box.height),
  };
}
