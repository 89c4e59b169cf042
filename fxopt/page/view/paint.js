"use strict";
/*
 * Draws the scene on the canvas: frames, then wires, then boxes. Only what is in view is drawn, and
 * as far out as nothing could be read, no text is.
 */

const DETAIL = { text: 0.4, shape: 0.2, arrow: 0.28, wireLabel: 0.85 };
const context = canvas.getContext("2d", { alpha: false });
const COLOURS = [
  "canvas",
  "panel",
  "raised",
  "sunken",
  "line",
  "line-strong",
  "text",
  "muted",
  "faint",
  "accent",
  "accent-soft",
  "removed",
  "removed-soft",
  "added",
  "added-soft",
  "changed",
  "changed-soft",
  "wire",
  "frame",
  "frame-line",
  "input",
  "output",
  "constant",
  "attention",
  "convolution",
  "normalization",
  "recurrent",
  "contraction",
  "pooling",
  "activation",
  "reduction",
  "indexing",
  "shape",
  "creation",
  "control",
  "elementwise",
  "other",
];
const colours = {};

function readColours() {
  const style = getComputedStyle(document.documentElement);
  for (const name of COLOURS) colours[name] = style.getPropertyValue(`--${name}`).trim();
}

let paintRequested = false;

function requestPaint() {
  if (paintRequested) return;
  paintRequested = true;
  requestAnimationFrame(paintNow);
}

function paintNow() {
  paintRequested = false;
  const { scene } = state;
  const ratio = canvas.width / (camera.width || 1);
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.fillStyle = colours.canvas;
  context.fillRect(0, 0, camera.width, camera.height);
  if (!scene) return;
  if (advanceMotion(performance.now())) requestPaint();
  const { x, y, k } = lens();
  context.setTransform(ratio * k, 0, 0, ratio * k, ratio * x, ratio * y);
  const seen = {
    k,
    left: -x / k,
    top: -y / k,
    right: (camera.width - x) / k,
    bottom: (camera.height - y) / k,
  };
  const visible = scene.boxes.filter((box) => isSeen(rectangleOf(box), seen));
  const related = relatedTo(scene, state.hover || selectedBox());
  for (const box of visible) if (box.inner) paintFrame(box, seen);
  paintWires(scene, seen, related);
  for (const box of visible) if (!box.inner) paintBox(box, seen, related);
  for (const box of visible) if (box.inner) paintFrameTitle(box, seen);
  if (k >= DETAIL.wireLabel && !motion) paintWireLabels(scene, seen);
  paintMinimap(scene, seen);
}

function isSeen({ x, y, width, height }, seen) {
  return x + width >= seen.left && x <= seen.right && y + height >= seen.top && y <= seen.bottom;
}

// -- text and shapes -----------------------------------------------------------------------------

function write(text, x, y, font, colour, align = "left") {
  context.font = FONTS[font];
  context.fillStyle = colour;
  context.textAlign = align;
  context.textBaseline = "alphabetic";
  context.fillText(text, x, y);
}

/** Text that wires may run behind. */
function writeOver(text, x, y, font, colour) {
  context.font = FONTS[font];
  context.textAlign = "left";
  context.lineWidth = 5;
  context.lineJoin = "round";
  context.strokeStyle = colours.canvas;
  context.strokeText(text, x, y);
  write(text, x, y, font, colour);
}

function roundedPath(x, y, width, height, radius) {
  context.beginPath();
  context.roundRect(x, y, width, height, radius);
}

function isSelected(box) {
  return box === selectedBox();
}
