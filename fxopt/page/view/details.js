"use strict";
/* The panel on the right: everything about the selected node, group or step. */

const FIRST_LINKS = 12; // of a long list

function startDetails() {
  listen("selection", updateDetails);
  listen("step", updateDetails);
  updateDetails();
}

function updateDetails() {
  const { selection } = state;
  const parts = !selection
    ? stepDetails(state.step)
    : selection.kind === "node"
      ? nodeDetails(pictureOf(state.step, state.view).nodes.get(selection.name))
      : groupDetails(findGroup(currentTree(), selection.path));
  byId("details").replaceChildren(...parts.flat(Infinity).filter(Boolean));
  byId("details").scrollTop = 0;
}

function heading(over, title, under = null) {
  return make(
    "header",
    {},
    make("div.over", {}, over),
    make("h2", {}, title),
    under && make("div.muted.code", {}, under),
  );
}

function section(title, ...content) {
  const shown = content.flat(Infinity).filter(Boolean);
  return shown.length ? [make("h3", {}, title), ...shown] : [];
}

function pairs(rows) {
  const shown = rows.filter(([, value]) => value !== null && value !== "" && value !== undefined);
  if (!shown.length) return null;
  return make(
    "dl.pairs",
    {},
    shown.flatMap(([key, value]) => [make("dt", {}, key), make("dd", {}, value)]),
  );
}

function figure(value, caption, share = null, title = null) {
  return make(
    "div.figure",
    { title },
    make("div.value", {}, value),
    make("div.caption", {}, caption),
    share === null
      ? null
      : make("div.share", {}, make("span", { style: `width: ${(100 * share).toFixed(2)}%` })),
  );
}

function nodeLink(name, text = `%${name}`) {
  const known = lifetimeOf(name).length > 0;
  return known ? link(text, () => revealAnywhere(name)) : text;
}

/** Links to nodes; of a long list the first ones, and a button for the rest. */
function nodeLinks(names) {
  const list = make(
    "div.links.code",
    {},
    names.slice(0, FIRST_LINKS).map((name) => nodeLink(name)),
  );
  const rest = names.slice(FIRST_LINKS);
  if (rest.length) {
    list.append(
      make(
        "button.action",
        {
          type: "button",
          onclick: (event) =>
            event.currentTarget.replaceWith(...rest.map((name) => nodeLink(name))),
        },
        `${exactly(rest.length)} more`,
      ),
    );
  }
  return list;
}

function stepLink(step) {
  return link(stepTitle(step), () => showStep(step));
}

function copyButton(text) {
  return make(
    "button.action",
    {
      type: "button",
      onclick: async (event) => {
        const button = event.currentTarget;
        button.textContent = (await copied(text)) ? "Copied" : "Not allowed here";
        setTimeout(() => (button.textContent = "Copy text"), 1400);
      },
    },
    "Copy text",
  );
}

/** Copy to the clipboard: a page from a file may lack the new way, so the old one is tried, too. */
async function copied(text) {
  if (navigator.clipboard) {
    const done = await navigator.clipboard.writeText(text).then(
      () => true,
      () => false,
    );
    if (done) return true;
  }
  const area = make("textarea.unseen", {});
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}

function costFigures(cost, whole) {
  const moved = cost.read + cost.written;
  const shareOf = (key) => (whole && whole[key] ? Math.min(cost[key] / whole[key], 1) : null);
  const amount = (key, caption) =>
    cost[key] ? figure(short(cost[key]), caption, shareOf(key), exactly(cost[key])) : null;
  return make(
    "div.figures",
    {},
    amount("params", "parameters"),
    amount("macs", "MACs"),
    amount("flops", "FLOPs"),
    figure(bytes(cost.read), "read"),
    figure(bytes(cost.written), "written"),
    moved && cost.flops ? figure(short(cost.flops / moved), "FLOPs per byte") : null,
    cost.ms ? figure(milliseconds(cost.ms), "measured", shareOf("ms")) : null,
  );
}
