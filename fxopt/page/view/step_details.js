"use strict";
/* The panel's content for a step, or for all of them: what it did, and where it held back. */

function stepDetails(number) {
  if (number === OVERALL) return overallDetails();
  const step = page.steps[number];
  const { before } = graphsOf(number);
  const was = before ? page.steps[number - 1].counts : null;
  return [
    heading(["step ", `${number} of ${LAST_STEP}`, make("span.tag", {}, step.effect)], step.name),
    step.skipped && make("p.removed", {}, `Rolled back: ${step.skipped}`),
    countFigures(was, step.counts, duration(step.seconds)),
    section(
      "Options",
      pairs(
        Object.entries(step.options).map(([key, value]) => [key, make("span.code", {}, value)]),
      ),
    ),
    deltaSections(deltaOf(number), number === 0 ? null : "This pass changed nothing."),
    section("Rules", rulesTable(step.rules)),
    section(`Held back ${exactly(step.misses.length)}×`, missList(step.misses)),
  ];
}

function overallDetails() {
  const first = page.steps[0].counts,
    last = page.steps[LAST_STEP].counts;
  const busy = page.steps
    .map((_, number) => number)
    .filter((number) => number && deltaParts(countsOf(deltaOf(number))).length);
  return [
    heading("captured graph and final graph", "All passes"),
    countFigures(first, last, duration(sum(page.steps.slice(1), (step) => step.seconds))),
    section(
      "What changed the graph",
      busy.length > 0 &&
        make(
          "ul.lines",
          {},
          busy.map((number) =>
            make(
              "li",
              {},
              stepLink(number),
              " ",
              deltaParts(countsOf(deltaOf(number))).flatMap((part) => [part, " "]),
            ),
          ),
        ),
    ),
    deltaSections(deltaOf(OVERALL), LAST_STEP > 0 ? "No pass changed anything." : null),
  ];
}

function countFigures(was, is, time) {
  const arrow = (key, text) =>
    was && text(was[key]) !== text(is[key])
      ? `${text(was[key])} → ${text(is[key])}`
      : text(is[key]);
  return make(
    "div.figures",
    {},
    figure(arrow("nodes", exactly), "nodes"),
    figure(arrow("parameters", short), "parameters"),
    figure(arrow("macs", short), "MACs"),
    figure(time, "time"),
  );
}

function deltaSections(delta, ifNothing) {
  const kinds = Object.entries(countsOf(delta)).filter(([, count]) => count);
  if (!kinds.length)
    return ifNothing ? [make("p.muted", { style: "margin-top: 14px" }, ifNothing)] : [];
  return kinds.map(([kind, count]) => section(`${exactly(count)} ${kind}`, nodeLinks(delta[kind])));
}

function rulesTable(rules) {
  const tried = rules.filter((rule) => rule.matched || rule.rewritten);
  if (!tried.length)
    return rules.length
      ? make("p.muted", {}, `None of ${counted(rules.length, "rule")} matched.`)
      : null;
  return make(
    "table.plain-table",
    {},
    make(
      "thead",
      {},
      make(
        "tr",
        {},
        ["rule", "tried", "matched", "applied"].map((title) => make("th", { scope: "col" }, title)),
      ),
    ),
    make(
      "tbody",
      {},
      tried.map((rule) =>
        make(
          "tr",
          {},
          make("td", {}, rule.name),
          ...[rule.tried, rule.matched, rule.rewritten].map((count) =>
            make("td", {}, exactly(count)),
          ),
        ),
      ),
    ),
  );
}

function missList(misses) {
  const byReason = new Map();
  for (const miss of misses) append(byReason, miss.reason, miss.node);
  return [...byReason].map(([reason, names]) =>
    make("div.miss", {}, make("div", {}, reason), nodeLinks([...new Set(names)])),
  );
}
