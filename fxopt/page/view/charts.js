"use strict";
/* What the charts have in common: a drawing with axes, and a reading beside the pointer. */

const CHART = { width: 1080, height: 280, left: 64, right: 20, top: 14, bottom: 34 };

function chartFrame(height = CHART.height) {
  const svg = makeSvg("svg", { viewBox: `0 0 ${CHART.width} ${height}`, role: "img" });
  const reading = make("div.reading", { hidden: true });
  return { svg, reading, root: make("div.chart", {}, svg, reading) };
}

function drawAxis(svg, axis, className, transform) {
  d3.select(svg).append("g").attr("class", className).attr("transform", transform).call(axis);
}

function drawCaption(svg, text, x, y, anchor = "start") {
  svg.append(makeSvg("text", { class: "caption", x, y, "text-anchor": anchor }, text));
}

/** Show a reading next to the pointer. */
function showReading({ root, reading }, event, ...content) {
  reading.replaceChildren(...content);
  reading.hidden = false;
  const around = root.getBoundingClientRect();
  const x = event.clientX - around.left,
    y = event.clientY - around.top;
  const isRight = x > around.width / 2;
  const left = isRight ? `calc(${x - 14}px - 100%)` : `${x + 14}px`;
  reading.style.transform = `translate(${left}, ${Math.max(y - 50, 0)}px)`;
}

async function goFromChart(step, name) {
  await showStep(step, "after");
  await reveal({ kind: "node", name });
}
