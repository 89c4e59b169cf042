"use strict";
/* The roofline: what each node reached, below what the machine could do. */

function rooflineSection() {
  const { roofline } = page;
  if (!roofline) return null;
  const points = roofline.points
    .filter((point) => point.flops > 0 && point.bytes > 0 && point.ms > 0)
    .map((point) => ({
      ...point,
      x: point.flops / point.bytes,
      y: point.flops / (point.ms / 1e3),
    }));
  if (!points.length) return null;
  const height = 420,
    frame = chartFrame(height);
  const scales = rooflineScales(roofline, points, height);
  drawRooflineAxes(frame.svg, scales, height);
  drawCeilings(frame.svg, roofline, scales);
  drawMarks(
    frame,
    points,
    scales,
    sum(roofline.points, (point) => point.ms),
  );
  frame.svg.setAttribute("aria-label", `Roofline on ${roofline.machine}`);
  const left = roofline.points.length - points.length;
  return make(
    "section",
    {},
    make("div.heading", {}, make("h2", {}, "Roofline")),
    make(
      "div.keyline",
      {},
      make("span", {}, roofline.machine),
      make("span", {}, "compute ", make("b", {}, `${short(roofline.flops_per_second)}FLOP/s`)),
      make("span", {}, "memory ", make("b", {}, `${bytes(roofline.bytes_per_second)}/s`)),
      make("span", {}, "area of a dot: its time"),
      left > 0 && make("span", {}, `${counted(left, "node")} without arithmetic not shown`),
    ),
    frame.root,
  );
}

function rooflineScales({ flops_per_second, bytes_per_second }, points, height) {
  const ridge = flops_per_second / bytes_per_second;
  const xs = [...points.map((point) => point.x), ridge / 8, ridge * 8];
  const ys = [...points.map((point) => point.y), flops_per_second * 1.6];
  return {
    ridge,
    x: d3.scaleLog([d3.min(xs) / 1.5, d3.max(xs) * 1.5], [CHART.left, CHART.width - CHART.right]),
    y: d3.scaleLog([d3.min(ys) / 1.5, d3.max(ys)], [height - CHART.bottom, CHART.top]),
  };
}

function drawRooflineAxes(svg, { x, y }, height) {
  const decades = (scale) =>
    d3
      .range(
        Math.ceil(Math.log10(scale.domain()[0])),
        Math.floor(Math.log10(scale.domain()[1])) + 1,
      )
      .map((power) => 10 ** power);
  drawAxis(
    svg,
    d3
      .axisLeft(y)
      .tickValues(decades(y))
      .tickSize(CHART.left + CHART.right - CHART.width)
      .tickFormat(""),
    "grid",
    `translate(${CHART.left}, 0)`,
  );
  drawAxis(
    svg,
    d3
      .axisBottom(x)
      .tickValues(decades(x))
      .tickSize(CHART.top + CHART.bottom - height)
      .tickFormat(""),
    "grid",
    `translate(0, ${height - CHART.bottom})`,
  );
  svg.querySelectorAll(".grid .domain").forEach((path) => path.remove());
  drawAxis(
    svg,
    d3
      .axisLeft(y)
      .tickValues(decades(y))
      .tickFormat((rate) => `${short(rate)}`),
    "axis",
    `translate(${CHART.left}, 0)`,
  );
  drawAxis(
    svg,
    d3
      .axisBottom(x)
      .tickValues(decades(x))
      .tickFormat((value) => (value >= 1 ? exactly(value) : String(value))),
    "axis",
    `translate(0, ${height - CHART.bottom})`,
  );
  drawCaption(svg, "FLOPs per byte", CHART.width - CHART.right, height - 2, "end");
  drawCaption(svg, "FLOP/s", CHART.left + 8, CHART.top + 10);
}

function drawCeilings(svg, { flops_per_second, bytes_per_second }, { x, y, ridge }) {
  const [low, high] = x.domain();
  const start = Math.max(low, y.domain()[0] / bytes_per_second);
  const corners = [
    [start, start * bytes_per_second],
    [ridge, flops_per_second],
    [high, flops_per_second],
  ];
  svg.append(
    makeSvg("path", { class: "ceiling", d: d3.line()(corners.map(([a, b]) => [x(a), y(b)])) }),
  );
  drawCaption(svg, `${short(flops_per_second)}FLOP/s`, x(high) - 4, y(flops_per_second) - 7, "end");
}

function drawMarks(frame, points, { x, y }, total) {
  const final = graphsAfter[LAST_STEP].byName;
  const marks = [...points].sort((a, b) => b.ms - a.ms); // small ones on top
  for (const point of marks) {
    const record = final.get(point.name);
    const mark = makeSvg("circle", {
      class: "mark",
      cx: x(point.x),
      cy: y(point.y),
      r: 3 + (34 * Math.sqrt(point.ms / total)) / 2,
      fill: `var(--${record ? record.family : "other"})`,
      "fill-opacity": 0.8,
    });
    mark.addEventListener("pointermove", (event) =>
      showReading(
        frame,
        event,
        make("div", {}, make("b", {}, record ? record.label : point.name), ` %${point.name}`),
        make(
          "div.muted",
          {},
          `${milliseconds(point.ms)} (${percent(point.ms / total)}) · ` +
            `${short(point.y)}FLOP/s · ${short(point.x)} FLOPs per byte`,
        ),
      ),
    );
    mark.addEventListener("pointerleave", () => (frame.reading.hidden = true));
    mark.addEventListener("click", () => goFromChart(LAST_STEP, point.name));
    frame.svg.append(mark);
  }
}
