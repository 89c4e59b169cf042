"use strict";
/* The story on the left: capture, each pass, and all of them together. */

const LONG_FACT = 90; // characters

function startTimeline() {
  if (FIRST_STEP === OVERALL) byId("steps").append(overallCard());
  byId("steps").append(...page.steps.map(stepCard));
  byId("facts").append(...page.facts.flatMap(fact));
  listen("step", markStep);
  markStep();
}

function stepOption(step, classes, ...content) {
  return make(
    `li.step${classes}`,
    {
      role: "option",
      id: `step-${step}`,
      "data-step": step,
      onclick: () => showStep(step),
    },
    make("span.knob"),
    ...content,
  );
}

function overallCard() {
  const first = page.steps[0].counts.nodes,
    last = page.steps[LAST_STEP].counts.nodes;
  const nodes =
    first === last ? counted(last, "node") : `${exactly(first)} → ${exactly(last)} nodes`;
  const seconds = sum(page.steps.slice(1), (step) => step.seconds);
  return stepOption(
    OVERALL,
    ".overall",
    make(
      "div.title",
      {},
      make("span.name", {}, "All passes"),
      make("span.time", {}, duration(seconds)),
    ),
    make("div.line", {}, make("span", {}, nodes)),
    make("div.line", {}, deltaParts(countsOf(deltaOf(OVERALL)))),
  );
}

function stepCard(step, number) {
  const delta = deltaParts(countsOf(deltaOf(number)));
  const isBusy = delta.length > 0 || number === 0;
  const kind = step.skipped ? ".failed" : number === 0 ? ".first" : isBusy ? ".busy" : ".idle";
  const name = make("span.name", { title: step.name }, step.name);
  const parts = [make("div.title", {}, name, make("span.time", {}, duration(step.seconds)))];
  if (step.skipped) parts.push(make("div.failure", {}, `rolled back: ${step.skipped}`));
  else if (!isBusy && step.misses.length)
    parts.push(make("div.line", {}, `held back ${exactly(step.misses.length)}×`));
  if (isBusy) {
    const did =
      number === 0
        ? make("span", {}, counted(step.counts.nodes, "node"))
        : step.rewrites
          ? make("span", {}, counted(step.rewrites, "rewrite"))
          : null;
    parts.push(make("div.line", {}, delta, did), gauge(step.counts.nodes));
  }
  return stepOption(number, kind, ...parts);
}

/** The nodes that are left, beside the most that there ever were. */
function gauge(nodes) {
  const most = Math.max(...page.steps.map((step) => step.counts.nodes), 1);
  return make(
    "div.gauge",
    { title: counted(nodes, "node") },
    make("span", { style: `width: ${((100 * nodes) / most).toFixed(2)}%` }),
  );
}

function fact([name, text]) {
  const failed = text.startsWith("FAILED") || (name === "verified" && text === "no");
  const isCheck = name.startsWith("verified");
  const shown =
    text.length <= LONG_FACT
      ? text
      : make("details", {}, make("summary", {}, shortened(text, LONG_FACT)), text);
  return [
    make("dt", {}, name),
    make("dd", { class: isCheck ? (failed ? "wrong" : "fine") : null }, shown),
  ];
}

function markStep() {
  for (const card of byId("steps").children) {
    const isChosen = Number(card.dataset.step) === state.step;
    card.setAttribute("aria-selected", isChosen);
    if (isChosen) card.scrollIntoView({ block: "nearest" });
  }
  byId("steps").setAttribute("aria-activedescendant", `step-${state.step}`);
}
