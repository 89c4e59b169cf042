"use strict";
/* The panel's content for a group: what is in it, and what that costs. */

function groupDetails(group) {
  if (!group) return stepDetails(state.step);
  const { what } = titleOf(group);
  const whole = currentTree().totals;
  const isOpen = isExpanded(group, state.expanded);
  const parts = group.children.filter(isGroup);
  const names = { removed: [], added: [], changed: [] };
  for (const node of nodesIn(group)) if (node.status !== "same") names[node.status].push(node.name);
  return [
    heading(
      [
        counted(group.size, "node"),
        hasChanges(group) && make("span.tag.changed", {}, "changes inside"),
      ],
      what,
      isModule(group) ? group.path : titleOf(group).where,
    ),
    composition(group),
    costFigures(group.totals, whole),
    make(
      "div.actions",
      {},
      make(
        "button.action",
        { type: "button", onclick: () => toggle(group) },
        isOpen ? "Collapse" : "Expand",
      ),
      make(
        "button.action",
        { type: "button", onclick: () => setAllExpanded(true, group) },
        "Expand all inside",
      ),
    ),
    section(
      "Module",
      pairs([
        ["class", isModule(group) ? classOf(group) : null],
        ["path", breadcrumb(isModule(group) ? group.path : moduleAround(group))],
        ["source", group.line && group.line.place],
      ]),
    ),
    deltaSections(names, null),
    section(
      "Parts",
      parts.length > 0 &&
        make(
          "ul.lines",
          {},
          parts.map((part) =>
            make(
              "li",
              {},
              link(titleOf(part).what, () => reveal({ kind: "group", path: part.path })),
              " ",
              make("span.muted", {}, `${titleOf(part).where} · ${counted(part.size, "node")}`),
            ),
          ),
        ),
    ),
  ];
}

function composition(group) {
  const families = [...group.families].sort((a, b) => b[1] - a[1]);
  return make(
    "div",
    {},
    make(
      "div.composition",
      { "aria-hidden": "true" },
      families.map(([family, count]) =>
        make("span", {
          style: `flex: ${count}; background: var(--${family})`,
          title: `${count} ${family}`,
        }),
      ),
    ),
    make(
      "div.links.muted",
      { style: "font-size: 11.5px; margin-bottom: 12px" },
      families
        .slice(0, 6)
        .map(([family, count]) =>
          make("span", {}, familyDot(family), ` ${exactly(count)} ${family}`),
        ),
    ),
  );
}

/** A module path whose parts lead to their groups, as far as there are groups. */
function breadcrumb(path) {
  if (!path) return null;
  const crumbs = [];
  for (const prefix of prefixesOf(path)) {
    const group = findGroup(currentTree(), prefix);
    const text = prefix.split(".").pop();
    crumbs.push(
      crumbs.length ? "." : "",
      group ? link(text, () => reveal({ kind: "group", path: group.path })) : text,
    );
  }
  return make("span.code", {}, crumbs);
}
