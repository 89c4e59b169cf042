"use strict";
/* Drawing boxes: expanded groups as frames, collapsed ones and nodes as cards. */

// -- frames --------------------------------------------------------------------------------------

function paintFrame(box, seen) {
  const { x, y, width, height } = rectangleOf(box);
  const chosen = isSelected(box),
    hovered = box === state.hover;
  roundedPath(x, y, width, height, Math.min(10, 8 / seen.k));
  context.fillStyle = colours.frame;
  context.fill();
  context.lineWidth = (chosen ? 2 : 1) / Math.min(1, Math.max(seen.k, 0.3));
  context.strokeStyle = chosen
    ? colours.accent
    : hovered
      ? colours["line-strong"]
      : colours["frame-line"];
  context.stroke();
}

function paintFrameTitle(box, seen) {
  const { x, y, width, height } = rectangleOf(box);
  const { label, note } = groupLines(box.child);
  if (seen.k < DETAIL.text) {
    paintFarTitle(`${label}${note ? `  ${note}` : ""}`, x, y, width, height, seen);
    return;
  }
  paintToggle(x + 9, y + 8, "−", box === state.hover);
  writeOver(label, x + 31, y + 20, "frame", colours.text);
  writeOver(note, x + 39 + textWidth("frame", label), y + 20, "plain", colours.muted);
  paintBadge(box.child, x + width - 10, y + 8);
}

/** A frame's title at a size that can be read from far away, where there is room for it. */
function paintFarTitle(title, x, y, width, height, seen) {
  const size = 11 / seen.k;
  const room = width * seen.k,
    needed = textWidth("frame", title) * (11 / 12) + 14;
  if (room < needed || height * seen.k < 34) return;
  context.font = `600 ${size}px ${FONT}`;
  context.fillStyle = colours.panel;
  context.globalAlpha = 0.85;
  roundedPath(x + 3 / seen.k, y + 3 / seen.k, needed / seen.k, 17 / seen.k, 4 / seen.k);
  context.fill();
  context.globalAlpha = 1;
  context.fillStyle = colours.muted;
  context.textAlign = "left";
  context.fillText(title, x + 10 / seen.k, y + 15.5 / seen.k);
}

function paintToggle(x, y, sign, isHot) {
  roundedPath(x, y, 15, 15, 4);
  context.fillStyle = colours.panel;
  context.fill();
  context.lineWidth = 1;
  context.strokeStyle = isHot ? colours.accent : colours["line-strong"];
  context.stroke();
  context.strokeStyle = isHot ? colours.accent : colours.muted;
  context.lineWidth = 1.4;
  context.beginPath();
  context.moveTo(x + 4, y + 7.5);
  context.lineTo(x + 11, y + 7.5);
  if (sign === "+") {
    context.moveTo(x + 7.5, y + 4);
    context.lineTo(x + 7.5, y + 11);
  }
  context.stroke();
}

/** The changes inside of a group, as a pill that ends at `right`. */
function paintBadge(group, right, top) {
  const parts = [
    ["removed", "−"],
    ["added", "+"],
    ["changed", "~"],
  ]
    .filter(([kind]) => group.delta[kind])
    .map(([kind, sign]) => [kind, sign + group.delta[kind]]);
  if (!parts.length) return;
  const width = sum(parts, ([, text]) => textWidth("badge", text) + 6) + 8;
  roundedPath(right - width, top, width, 16, 8);
  context.fillStyle = colours.raised;
  context.fill();
  context.lineWidth = 1;
  context.strokeStyle = colours["line-strong"];
  context.stroke();
  let x = right - width + 7;
  for (const [kind, text] of parts) {
    write(text, x, top + 12, "badge", colours[kind]);
    x += textWidth("badge", text) + 6;
  }
}

// -- boxes ---------------------------------------------------------------------------------------

function paintBox(box, seen, related) {
  const place = rectangleOf(box);
  context.globalAlpha = motion && !motion.from.has(box.key) ? motion.progress : 1;
  if (seen.k < DETAIL.shape) paintFarBox(box, place);
  else if (box.isGroup) paintGroup(box, place, seen, related);
  else paintNode(box, place, seen, related);
  context.globalAlpha = 1;
}

function paintFarBox(box, { x, y, width, height }) {
  const status = box.status;
  context.fillStyle =
    status === "same" || status === "changed-inside"
      ? box.isGroup
        ? colours["line-strong"]
        : colours[box.child.record.family]
      : colours[status];
  if (status === "same" && !box.isGroup) context.globalAlpha *= 0.7;
  context.fillRect(x, y, width, height);
  if (isSelected(box)) outline(x, y, width, height, 0, colours.accent, 12);
}

function outline(x, y, width, height, radius, colour, lineWidth, dash = []) {
  roundedPath(x, y, width, height, radius);
  context.setLineDash(dash);
  context.lineWidth = lineWidth;
  context.strokeStyle = colour;
  context.stroke();
  context.setLineDash([]);
}

function paintNode(box, { x, y, width, height }, seen, related) {
  const { record, status } = box.child;
  roundedPath(x, y, width, height, 7);
  context.fillStyle = status === "same" ? colours.raised : colours[`${status}-soft`];
  context.fill();
  context.fillStyle = colours[record.family] || colours.other;
  context.beginPath();
  context.roundRect(x, y, BOX.stripe + 1, height, [7, 0, 0, 7]);
  context.fill();
  const edge = status === "same" ? colours["frame-line"] : colours[status];
  outline(
    x,
    y,
    width,
    height,
    7,
    edge,
    status === "same" ? 1 : 1.5,
    status === "removed" ? [5, 3] : [],
  );
  paintRing(box, x, y, width, height, 7, related);
  if (seen.k >= DETAIL.text) paintLines(box, x, y, width);
  else paintFarLabel(box, x, y, width, height, seen);
}

function paintGroup(box, { x, y, width, height }, seen, related) {
  const edge = box.status === "same" ? "line-strong" : box.child.size ? "changed" : "removed";
  roundedPath(x + 4, y + 4, width - 4, height, 9);
  context.fillStyle = colours.sunken;
  context.fill();
  outline(x + 4, y + 4, width - 4, height, 9, colours["frame-line"], 1);
  roundedPath(x, y, width - 4, height, 9);
  context.fillStyle = colours.raised;
  context.fill();
  outline(
    x,
    y,
    width - 4,
    height,
    9,
    colours[edge],
    edge === "line-strong" ? 1 : 1.5,
    edge === "removed" ? [5, 3] : [],
  );
  paintRing(box, x, y, width - 4, height, 9, related);
  if (seen.k < DETAIL.text) {
    paintFarLabel(box, x, y, width, height, seen);
    return;
  }
  paintLines(box, x, y, width - 26);
  paintToggle(x + width - 28, y + 10, "+", box === state.hover);
  paintComposition(box.child, x + BOX.padding, y + height - 11, width - 2 * BOX.padding - 4);
  paintBadge(box.child, x + width - 12, y - 8);
}

/** What a group is made of: its nodes' families, as a strip. */
function paintComposition(group, x, y, width) {
  const total = sum(group.families.values(), (count) => count);
  for (const [family, count] of [...group.families].sort((a, b) => b[1] - a[1])) {
    const part = (width * count) / total;
    context.fillStyle = colours[family];
    context.fillRect(x, y, Math.max(part - 1, 0.5), 3);
    x += part;
  }
}

function paintLines(box, x, y, width) {
  const { label, note, second, secondNote } = box.lines;
  const left = x + BOX.padding + (box.isGroup ? 0 : BOX.stripe),
    right = x + width - BOX.padding;
  const isGone = box.status === "removed";
  write(label, left, y + (box.isGroup ? 21 : 18), "label", isGone ? colours.muted : colours.text);
  if (note) write(note, right, y + (box.isGroup ? 21 : 18), "plain", colours.faint, "right");
  write(second, left, y + (box.isGroup ? 38 : 33), "plain", colours.muted);
  if (secondNote) write(secondNote, right, y + 33, "plain", colours.faint, "right");
}

/** One name, as large as it can be, where two lines could not be read. */
function paintFarLabel(box, x, y, width, height, seen) {
  const { label, note } = box.lines;
  const text = box.isGroup && note ? `${label} ${note}` : label;
  const size = Math.min(11 / seen.k, 0.62 * height);
  const fits = (textWidth("label", text) * size) / 13 <= width - 14;
  const shown = fits ? text : label;
  if ((textWidth("label", shown) * size) / 13 > width - 10 || size * seen.k < 6) return;
  context.font = `500 ${size}px ${FONT}`;
  context.fillStyle = colours.text;
  context.textAlign = "center";
  context.fillText(shown, x + width / 2, y + height / 2 + 0.35 * size);
}

function paintRing(box, x, y, width, height, radius, related) {
  if (isSelected(box))
    outline(x - 2.5, y - 2.5, width + 5, height + 5, radius + 2, colours.accent, 2.5);
  else if (box === state.hover) outline(x, y, width, height, radius, colours.accent, 1.5);
  else if (related.boxes.has(box)) outline(x, y, width, height, radius, colours.accent, 1);
}
