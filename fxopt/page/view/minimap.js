"use strict";
/* The whole scene in a corner, with the part in view; press or drag to go there. */

const minimap = byId("minimap");
const MINIMAP = { width: 168, height: 116, padding: 8 };
let minimapPicture = null; // the scene, drawn once

function minimapScale(scene) {
  const k = Math.min(
    (MINIMAP.width - 2 * MINIMAP.padding) / scene.width,
    (MINIMAP.height - 2 * MINIMAP.padding) / scene.height,
  );
  return {
    k,
    x: (MINIMAP.width - k * scene.width) / 2,
    y: (MINIMAP.height - k * scene.height) / 2,
  };
}

function drawMinimapPicture(scene) {
  const ratio = devicePixelRatio || 1;
  const drawn = document.createElement("canvas");
  drawn.width = minimap.width = Math.round(MINIMAP.width * ratio);
  drawn.height = minimap.height = Math.round(MINIMAP.height * ratio);
  const pen = drawn.getContext("2d");
  const { k, x, y } = minimapScale(scene);
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  for (const box of scene.boxes) {
    const status = box.status;
    if (box.inner) pen.fillStyle = colours.frame;
    else if (status === "same") pen.fillStyle = box.isGroup ? colours["line-strong"] : colours.wire;
    else pen.fillStyle = colours[status === "changed-inside" ? "changed" : status];
    pen.fillRect(
      x + k * box.x,
      y + k * box.y,
      Math.max(k * box.width, 0.7),
      Math.max(k * box.height, 0.7),
    );
  }
  minimapPicture = drawn;
}

function paintMinimap(scene, seen) {
  if (!minimapPicture) drawMinimapPicture(scene);
  const pen = minimap.getContext("2d");
  const ratio = minimap.width / MINIMAP.width;
  const { k, x, y } = minimapScale(scene);
  pen.setTransform(1, 0, 0, 1, 0, 0);
  pen.clearRect(0, 0, minimap.width, minimap.height);
  pen.drawImage(minimapPicture, 0, 0);
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  const left = Math.max(x + k * seen.left, 1),
    top = Math.max(y + k * seen.top, 1);
  const right = Math.min(x + k * seen.right, MINIMAP.width - 1);
  const bottom = Math.min(y + k * seen.bottom, MINIMAP.height - 1);
  pen.strokeStyle = colours.accent;
  pen.lineWidth = 1.25;
  pen.strokeRect(left, top, Math.max(right - left, 3), Math.max(bottom - top, 3));
}

function goToMinimapPoint(event) {
  if (!state.scene || event.buttons !== 1) return;
  const { left, top } = minimap.getBoundingClientRect();
  const { k, x, y } = minimapScale(state.scene);
  const scale = lens().k;
  const sceneX = (event.clientX - left - x) / k,
    sceneY = (event.clientY - top - y) / k;
  setViewport(
    d3.zoomIdentity
      .translate(camera.width / 2 - scale * sceneX, camera.height / 2 - scale * sceneY)
      .scale(scale),
  );
  camera.mode = "free";
}

function startMinimap() {
  minimap.addEventListener("pointerdown", (event) => {
    minimap.setPointerCapture(event.pointerId);
    goToMinimapPoint(event);
  });
  minimap.addEventListener("pointermove", goToMinimapPoint);
  for (const event of ["scene", "theme"]) listen(event, () => (minimapPicture = null));
}
