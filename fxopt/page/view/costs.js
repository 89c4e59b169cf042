"use strict";
/* Costs by module, as a table that folds and sorts. */

const COLUMNS = [
  { key: "size", title: "nodes", text: exactly },
  { key: "params", title: "parameters", text: short, hasBar: true },
  { key: "macs", title: "MACs", text: short, hasBar: true },
  { key: "flops", title: "FLOPs", text: short, hasBar: true },
  { key: "bytes", title: "bytes moved", text: bytes, hasBar: true },
  { key: "intensity", title: "FLOPs / byte", text: short },
  {
    key: "ms",
    title: "ms",
    text: (value) => (value ? Number(value.toPrecision(3)).toString() : ""),
    hasBar: true,
  },
];
const costs = {
  scope: "after",
  sort: "order",
  descending: true,
  open: new Set([""]),
  isDrawn: false,
};

function startCosts() {
  listen("tab", () => {
    if (state.tab === "costs") drawCosts();
  });
  listen("theme", () => {
    if (state.tab === "costs") drawCosts();
  });
}

function drawCosts() {
  byId("costs").replaceChildren(
    ...[costsSection(), memorySection(), rooflineSection()].filter(Boolean),
  );
}

function costsStep() {
  return costs.scope === "before" ? [0, "after"] : [FIRST_STEP, "after"];
}

function costsSection() {
  const element = make("section", {});
  const redraw = () => element.replaceChildren(costsHeading(redraw), costsTable(redraw));
  redraw();
  return element;
}

function costsHeading(redraw) {
  const scopes = [
    ["before", "Captured"],
    ["after", "Optimized"],
  ];
  return make(
    "div.heading",
    {},
    make("h2", {}, "Costs by module"),
    LAST_STEP > 0 &&
      make(
        "div.segments",
        { role: "group", "aria-label": "Which graph" },
        scopes.map(([scope, title]) =>
          make(
            "button",
            {
              "aria-pressed": String(costs.scope === scope),
              type: "button",
              onclick: () => {
                costs.scope = scope;
                redraw();
              },
            },
            title,
          ),
        ),
      ),
  );
}

function costsTable(redraw) {
  const tree = treeOf(...costsStep());
  const columns = COLUMNS.filter(({ key }) => key !== "ms" || tree.totals.ms);
  const whole = figuresOf(tree);
  return make(
    "table.costs-table",
    {},
    make(
      "thead",
      {},
      make(
        "tr",
        {},
        headerCell({ key: "order", title: "module" }, redraw),
        columns.map((column) => headerCell(column, redraw)),
      ),
    ),
    make(
      "tbody",
      {},
      make(
        "tr.total",
        {},
        make("td", {}, page.model || "graph"),
        columns.map((column) => costCell(column, whole, null)),
      ),
      costRows(tree, 0, columns, whole, redraw),
    ),
  );
}

function headerCell({ key, title }, redraw) {
  const isSorted = costs.sort === key;
  return make(
    "th",
    {
      scope: "col",
      "aria-sort": isSorted
        ? costs.descending === (key !== "order")
          ? "descending"
          : "ascending"
        : "none",
    },
    make(
      "button",
      {
        type: "button",
        onclick: () => {
          costs.descending = isSorted ? !costs.descending : true;
          costs.sort = key;
          redraw();
        },
      },
      title,
    ),
  );
}

/** The figures of a group or a node, by column. */
function figuresOf(child) {
  const totals = isGroup(child) ? child.totals : child.record;
  const moved = totals.read + totals.written;
  return {
    size: isGroup(child) ? child.size : 1,
    params: totals.params,
    macs: totals.macs,
    flops: totals.flops,
    bytes: moved,
    intensity: moved ? totals.flops / moved : 0,
    ms: totals.ms || 0,
  };
}

function costRows(group, depth, columns, whole, redraw) {
  const rows = group.children
    .filter((child) => isGroup(child) || child.record.kind === "call")
    .map((child) => ({ child, figures: figuresOf(child) }));
  if (costs.sort !== "order") rows.sort((a, b) => b.figures[costs.sort] - a.figures[costs.sort]);
  if (!costs.descending) rows.reverse();
  return rows.flatMap(({ child, figures }) => [
    costRow(child, figures, depth, columns, whole, redraw),
    isGroup(child) && costs.open.has(child.path)
      ? costRows(child, depth + 1, columns, whole, redraw)
      : [],
  ]);
}

function costRow(child, figures, depth, columns, whole, redraw) {
  return make(
    "tr",
    {},
    make(
      "td",
      { style: `padding-left: ${depth * 20}px` },
      isGroup(child)
        ? foldButton(child, redraw)
        : make(
            "span",
            { style: "display: inline-block; width: 20px; text-align: center" },
            familyDot(child.record.family),
          ),
      " ",
      costName(child),
    ),
    columns.map((column) => costCell(column, figures, whole)),
  );
}

function foldButton(group, redraw) {
  const isOpen = costs.open.has(group.path);
  return make(
    "button.fold",
    {
      type: "button",
      "aria-expanded": String(isOpen),
      "aria-label": `${isOpen ? "Fold" : "Unfold"} ${group.path}`,
      onclick: () => {
        if (isOpen) costs.open.delete(group.path);
        else costs.open.add(group.path);
        redraw();
      },
    },
    icon("m6 4 4 4-4 4"),
  );
}

function costName(child) {
  const go = async (selection) => {
    await showStep(...costsStep());
    await reveal(selection);
  };
  if (!isGroup(child)) {
    return [
      link(child.record.label, () => go({ kind: "node", name: child.name }), "Show in the graph"),
      make("span.muted", {}, `  ${child.name}`),
    ];
  }
  const { what, where } = titleOf(child);
  return [
    link(what, () => go({ kind: "group", path: child.path }), "Show in the graph"),
    make("span.muted", {}, `  ${where === what ? "" : where}`),
  ];
}

function costCell({ key, text, hasBar }, figures, whole) {
  const value = figures[key];
  const share = hasBar && whole && whole[key] ? value / whole[key] : null;
  const shown = value ? text(value) : make("span.muted", {}, "–");
  return make(
    share ? "td.bar-cell" : "td",
    share ? { style: `--share: ${share.toFixed(4)}`, title: percent(share) } : {},
    shown,
  );
}
