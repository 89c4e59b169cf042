"use strict";
/* What is written into a box, and so how large it is. Text is measured once, and remembered. */

const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';
const FONTS = {
  label: `600 13px ${FONT}`,
  plain: `400 11px ${FONT}`,
  frame: `600 12px ${FONT}`,
  badge: `500 10.5px ${FONT}`,
};
const BOX = {
  padding: 12,
  stripe: 4,
  toggle: 24,
  gap: 14,
  node: 42,
  group: 58,
  title: 30,
  narrowest: 132,
  widest: 308,
  step: 44,
};

const textWidth = (() => {
  const context = document.createElement("canvas").getContext("2d");
  return remember((font, text) => {
    context.font = FONTS[font];
    return context.measureText(text).width;
  });
})();

/** The two lines of a box, left and right. */
function linesOf(box) {
  return box.isGroup ? groupLines(box.child) : nodeLines(box.child);
}

function nodeLines({ record, parent }) {
  const called = record.path === parent.path ? "" : partsOf(record.path).at(-1) || "";
  return {
    label: record.label,
    note: called === record.label ? "" : called,
    second: record.shape === null ? shortened(record.type, 34) : record.shape || "scalar",
    secondNote: weightShape(record),
  };
}

/** The shape of a node's weight, from the argument that shows it: 'name  f32[64,3,7,7]'. */
function weightShape(record) {
  const weight = record.arguments.find(([name]) => name === "weight");
  const type = weight && /\s\w+\[([^\]]*)\]$/.exec(weight[1]);
  return type ? `w ${type[1].split(",").join("×")}` : "";
}

function groupLines(group) {
  const { what, where } = titleOf(group);
  return {
    label: shortened(what, 36),
    note: where === what ? "" : shortened(where, 28, true),
    second: groupSummary(group),
    secondNote: "",
  };
}

function groupSummary(group) {
  if (!group.size) return `${counted(group.delta.removed, "node")}, all removed`;
  const parts = [counted(group.size, "node")];
  if (group.totals.params) parts.push(`${short(group.totals.params)} params`);
  if (group.totals.macs) parts.push(`${short(group.totals.macs)} MACs`);
  return parts.join(" · ");
}

/** The width and height of a box, and its lines, cut where they would not fit. */
function sizeOf(box) {
  const lines = linesOf(box);
  const around = 2 * BOX.padding + (box.isGroup ? BOX.toggle : BOX.stripe);
  const first = widthOfLine(lines.label, "label", lines.note);
  const second = widthOfLine(lines.second, "plain", lines.secondNote);
  // few different widths, so that a chain of boxes has straight sides
  const wanted = Math.min(Math.max(first, second) + around, BOX.widest);
  const width = Math.ceil(Math.max(wanted, BOX.narrowest) / BOX.step) * BOX.step;
  const room = width - around;
  lines.note = cut("plain", lines.note, room - BOX.gap - textWidth("label", lines.label));
  lines.label = cut("label", lines.label, room);
  lines.secondNote = cut(
    "plain",
    lines.secondNote,
    room - BOX.gap - textWidth("plain", lines.second),
  );
  lines.second = cut("plain", lines.second, room);
  return { lines, width, height: box.isGroup ? BOX.group : BOX.node };
}

function widthOfLine(text, font, note) {
  return textWidth(font, text) + (note && BOX.gap + textWidth("plain", note));
}

/** A text that is no wider than `room`; nothing where not even three letters fit. */
function cut(font, text, room) {
  if (!text || textWidth(font, text) <= room) return text;
  const keep = Math.floor((text.length * room) / textWidth(font, text)) - 1;
  return keep > 2 ? `${text.slice(0, keep)}…` : "";
}

/** The least width of a frame: its title fits. */
function frameWidth(group) {
  const { label, note } = groupLines(group);
  return Math.min(textWidth("frame", label) + textWidth("plain", note) + 72, BOX.widest);
}
