"use strict";
/* The mouse on the canvas: what is under it, what a click does, and the tooltip. */

/** The box at a point of the page, the innermost; null for the background. */
function boxAt(event) {
  if (!state.scene) return null;
  const { left, top } = canvas.getBoundingClientRect();
  const [x, y] = lens().invert([event.clientX - left, event.clientY - top]);
  const contains = (box) =>
    x >= box.x && x <= box.x + box.width && y >= box.y && y <= box.y + box.height;
  return state.scene.boxes.findLast(contains) || null;
}

/** Whether a point of the page is on the plus or minus of a group. */
function isOnToggle(event, box) {
  const { left, top } = canvas.getBoundingClientRect();
  const [x, y] = lens().invert([event.clientX - left, event.clientY - top]);
  const corner = box.inner ? [box.x + 9, box.y + 8] : [box.x + box.width - 28, box.y + 10];
  const reach = 4;
  return (
    x >= corner[0] - reach &&
    x <= corner[0] + 15 + reach &&
    y >= corner[1] - reach &&
    y <= corner[1] + 15 + reach
  );
}

function startPointer() {
  d3.select(canvas).call(zoomer).on("dblclick.zoom", null);
  canvas.addEventListener("click", (event) => {
    const box = boxAt(event);
    if (box && box.isGroup && isOnToggle(event, box)) toggle(box.child);
    else selectBox(box);
  });
  canvas.addEventListener("dblclick", (event) => {
    const box = boxAt(event);
    if (!box) return;
    if (!box.isGroup) lookAt(box);
    else if (!isOnToggle(event, box)) toggle(box.child);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (event.buttons) hideTooltip();
    else hover(boxAt(event), event);
  });
  canvas.addEventListener("pointerleave", () => hover(null));
  canvas.addEventListener("wheel", hideTooltip, { passive: true });
}

// -- hovering ------------------------------------------------------------------------------------

let tooltipTimer = 0;

function hover(box, event = null) {
  canvas.classList.toggle("over", Boolean(box && (!box.inner || isOnToggle(event, box))));
  if (box === state.hover) return;
  state.hover = box;
  hideTooltip();
  if (box && !box.inner) tooltipTimer = setTimeout(showTooltip, 320, box, event);
  requestPaint();
}

function hideTooltip() {
  clearTimeout(tooltipTimer);
  byId("tooltip").hidden = true;
}

function showTooltip(box, event) {
  const tooltip = byId("tooltip");
  tooltip.replaceChildren(...(box.isGroup ? groupTip(box.child) : nodeTip(box.child)));
  tooltip.hidden = false;
  const around = canvas.getBoundingClientRect();
  const x = Math.min(event.clientX - around.left + 14, around.width - tooltip.offsetWidth - 8);
  const below = event.clientY - around.top + 18;
  const fitsBelow = below + tooltip.offsetHeight < around.height - 8;
  const y = fitsBelow ? below : event.clientY - around.top - tooltip.offsetHeight - 10;
  tooltip.style.transform = `translate(${Math.round(x)}px, ${Math.round(y)}px)`;
}

function nodeTip({ name, record, status }) {
  return [
    make("div", {}, make("b", {}, record.label), ` %${name}`),
    make("div.muted", {}, record.type),
    record.path ? make("div.muted", {}, record.path) : null,
    status === "same" ? null : make(`div.${status}`, {}, `${status} by ${whoDid(status, record)}`),
  ].filter(Boolean);
}

/** The pass that made this state of a node, or that removed it. */
function whoDid(status, record) {
  const step = status === "removed" ? stepThatRemoved(record.name) : stepThatMade(record);
  return stepTitle(step);
}

function groupTip(group) {
  const { what, where } = titleOf(group);
  const delta = deltaParts(group.delta);
  return [
    make("div", {}, make("b", {}, what), ` ${isModule(group) ? group.path : where}`),
    make("div.muted", {}, groupSummary(group)),
    delta.length
      ? make(
          "div",
          {},
          delta.flatMap((part) => [part, " "]),
        )
      : null,
  ].filter(Boolean);
}
