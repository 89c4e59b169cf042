"use strict";
/* The panel's content for a node: what it is, what it costs, what became of it. */

function nodeDetails(node) {
  if (!node) return stepDetails(state.step);
  const { record, status } = node;
  const { nodes, users } = pictureOf(state.step, state.view);
  const prefix = record.name.slice(0, record.name.lastIndexOf("/") + 1);
  return [
    heading(
      [
        familyDot(record.family),
        record.family,
        status !== "same" && make(`span.tag.${status}`, {}, status),
      ],
      record.label,
      `%${record.name}`,
    ),
    pairs([
      [
        "type",
        make(
          "span.code",
          {},
          changedText(node, (one) => one.type),
        ),
      ],
    ]),
    section(
      "Made by",
      pairs([
        ["rule", record.rule],
        ["pass", record.rule || record.replaces.length ? stepLink(stepThatMade(record)) : null],
        ["replaces", record.replaces.length ? nodeLinks(record.replaces) : null],
      ]),
    ),
    section(
      "Module",
      pairs([
        ["path", record.path ? breadcrumb(record.path) : null],
        ["class", record.module],
        ["source", sourceText(record.source)],
      ]),
    ),
    record.kind === "call" && section("Costs", costFigures(record, currentTree().totals)),
    section("Arguments", pairs(argumentRows(node, prefix))),
    section("Inputs", nodeLinksOrNull(record.inputs.filter((name) => nodes.has(name)))),
    section("Users", nodeLinksOrNull([...new Set(users.get(record.name) || [])])),
    section("Story", historyOf(record.name)),
    section("Text", changedBlock(node)),
    make(
      "div.actions",
      {},
      copyButton(record.text),
      make(
        "button.action",
        { type: "button", onclick: () => reveal({ kind: "node", name: record.name }) },
        "Show in graph",
      ),
    ),
  ];
}

function nodeLinksOrNull(names) {
  return names.length ? nodeLinks(names) : null;
}

function stepThatMade(record) {
  const states = lifetimeOf(record.name);
  return (states.find((one) => one.record === record) || states[0]).step;
}

function sourceText(source) {
  if (!source) return null;
  const { file, place, code } = sourceParts(source);
  return [
    make("span.code", { title: file }, place),
    code ? make("div.block.code", {}, code) : null,
  ];
}

/** A text of a node; where the step changed it, the text before and after. */
function changedText({ before, after, status }, text) {
  if (status !== "changed" || text(before) === text(after)) return text(after || before);
  return [make("del", {}, text(before)), make("ins", {}, text(after))];
}

function changedBlock(node) {
  return make(
    "div.block.code.pairs",
    { style: "display: block" },
    changedText(node, (record) => record.text),
  );
}

function argumentRows(node, prefix) {
  const old = new Map(node.before ? node.before.arguments : []);
  return node.record.arguments.map(([name, value]) => {
    const key = /^\d+$/.test(name) ? `argument ${Number(name) + 1}` : name;
    const was = node.status === "changed" && node.after ? old.get(name) : undefined;
    const now = linked(value, prefix);
    if (was === undefined || was === value) return [key, make("span.code", {}, now)];
    return [key, make("span.code", {}, make("del", {}, was), make("ins", {}, now))];
  });
}

/** An argument's text, each %name in it a link. */
function linked(text, prefix) {
  return text
    .split(/(%[\w./]+)/)
    .map((part) =>
      part.startsWith("%") && lifetimeOf(prefix + part.slice(1)).length
        ? nodeLink(prefix + part.slice(1), part)
        : part,
    );
}

function historyOf(name) {
  const states = lifetimeOf(name);
  if (states.length === 1 && states[0].step === 0) return null;
  return make(
    "ul.lines",
    {},
    states.map(({ step, record }, index) => {
      const did =
        record === null ? "removed by " : index ? "changed by " : step ? "added by " : "captured: ";
      return make("li", {}, make("span.muted", {}, did), stepLink(step));
    }),
  );
}
