"use strict";
/* Activation memory over time, before and after. */

function memorySection() {
  const before = page.memory.before,
    after = LAST_STEP > 0 ? page.memory.after : [];
  if (!before.length) return null;
  const frame = chartFrame();
  const peak = (series) => d3.max(series, ([, size]) => size) || 0;
  const x = d3.scaleLinear(
    [0, Math.max(before.length, after.length)],
    [CHART.left, CHART.width - CHART.right],
  );
  const y = d3
    .scaleLinear(
      [0, Math.max(peak(before), peak(after)) || 1],
      [CHART.height - CHART.bottom, CHART.top],
    )
    .nice(5);
  drawMemoryAxes(frame.svg, x, y);
  drawSeries(frame.svg, before, x, y, after.length ? "before" : "after");
  if (after.length) drawSeries(frame.svg, after, x, y, "after");
  followMemory(frame, x, y, before, after);
  frame.svg.setAttribute(
    "aria-label",
    `Live activation memory: peak ${bytes(peak(before))} captured, ${bytes(peak(after))} optimized`,
  );
  return make(
    "section",
    {},
    make("div.heading", {}, make("h2", {}, "Activation memory over time")),
    make(
      "div.keyline",
      {},
      make(
        "span",
        {},
        make("span.dot", { style: `background: var(--${after.length ? "faint" : "accent"})` }),
        "captured, peak ",
        make("b", {}, bytes(peak(before))),
      ),
      after.length > 0 &&
        make(
          "span",
          {},
          make("span.dot", { style: "background: var(--accent)" }),
          "optimized, peak ",
          make("b", {}, bytes(peak(after))),
        ),
    ),
    frame.root,
  );
}

function drawMemoryAxes(svg, x, y) {
  const bottom = CHART.height - CHART.bottom;
  drawAxis(
    svg,
    d3
      .axisLeft(y)
      .ticks(5)
      .tickSize(CHART.left + CHART.right - CHART.width)
      .tickFormat(""),
    "grid",
    `translate(${CHART.left}, 0)`,
  );
  svg.querySelectorAll(".grid .domain").forEach((path) => path.remove());
  drawAxis(
    svg,
    d3
      .axisLeft(y)
      .ticks(5)
      .tickFormat((size) => (size ? bytes(size) : "0")),
    "axis",
    `translate(${CHART.left}, 0)`,
  );
  drawAxis(svg, d3.axisBottom(x).ticks(10), "axis", `translate(0, ${bottom})`);
  drawCaption(
    svg,
    "node, in the order of execution",
    CHART.width - CHART.right,
    CHART.height - 2,
    "end",
  );
}

function drawSeries(svg, series, x, y, kind) {
  const points = [...series.map(([, size], index) => [index, size]), [series.length, 0]];
  const at = ([index]) => x(index),
    height = ([, size]) => y(size);
  const area = d3.area().x(at).y0(y(0)).y1(height).curve(d3.curveStepAfter);
  const line = d3.line().x(at).y(height).curve(d3.curveStepAfter);
  svg.append(
    makeSvg("path", { class: `${kind}-area`, d: area(points) }),
    makeSvg("path", { class: `${kind}-line`, d: line(points) }),
  );
}

/** Hovering says which node runs; a click selects it in the graph. */
function followMemory(frame, x, y, before, after) {
  const cursor = makeSvg("line", {
    class: "cursor",
    y1: CHART.top,
    y2: CHART.height - CHART.bottom,
    visibility: "hidden",
  });
  frame.svg.append(cursor);
  const entryAt = (event) => {
    const [left] = d3.pointer(event, frame.svg);
    const index = Math.floor(x.invert(left));
    return { index, left, captured: before[index], optimized: after[index] };
  };
  const row = (title, entry) =>
    entry &&
    make(
      "div",
      {},
      make("span.muted", {}, `${title} `),
      `%${entry[0]} `,
      make("b", {}, bytes(entry[1])),
    );
  frame.svg.addEventListener("pointermove", (event) => {
    const { left, captured, optimized } = entryAt(event);
    if (!captured && !optimized) return hide();
    cursor.setAttribute("x1", left);
    cursor.setAttribute("x2", left);
    cursor.setAttribute("visibility", "visible");
    return showReading(
      frame,
      event,
      ...[row("captured", captured), row("optimized", optimized)].filter(Boolean),
    );
  });
  const hide = () => {
    cursor.setAttribute("visibility", "hidden");
    frame.reading.hidden = true;
  };
  frame.svg.addEventListener("pointerleave", hide);
  frame.svg.addEventListener("click", (event) => {
    const { captured, optimized } = entryAt(event);
    if (optimized || captured) goFromChart(optimized ? LAST_STEP : 0, (optimized || captured)[0]);
  });
  frame.svg.style.cursor = "pointer";
}
