"use strict";
/* Search over every node and module of the story; the arrow keys choose, Enter goes there. */

const MOST_HITS = 60;
const search = { hits: [], chosen: 0 };

function startSearch() {
  const query = byId("query");
  query.addEventListener("input", updateHits);
  query.addEventListener("focus", updateHits);
  query.addEventListener("keydown", onSearchKey);
  document.addEventListener("pointerdown", (event) => {
    if (!byId("search").contains(event.target)) closeSearch();
  });
}

/** What can be found: a title, where it is, and all words that find it. */
const searchIndex = remember(() => {
  const entries = new Map();
  for (const graph of new Set(graphsAfter)) {
    for (const record of graph.records) entries.set(`node:${record.name}`, nodeEntry(record));
  }
  for (const step of [0, FIRST_STEP]) {
    for (const group of groupsIn(treeOf(step, "after"))) {
      if (isModule(group)) entries.set(`group:${group.path}`, groupEntry(group));
    }
  }
  return [...entries.values()];
});

function nodeEntry(record) {
  const words = [
    record.name,
    record.label,
    record.path,
    record.module,
    record.family,
    record.type,
    record.source,
    record.rule || "",
  ];
  return {
    kind: record.label,
    name: record.name,
    where: record.path || record.module,
    colour: record.family,
    words: words.join("\n").toLowerCase(),
    weight: record.kind === "call" ? 1 : 2,
    go: () => revealAnywhere(record.name),
  };
}

function groupEntry(group) {
  const { what } = titleOf(group);
  return {
    kind: counted(group.size, "node"),
    name: what,
    where: group.path,
    colour: "line-strong",
    words: [what, group.path, classOf(group)].join("\n").toLowerCase(),
    weight: 3,
    go: () => revealGroup(group.path),
  };
}

async function revealGroup(path) {
  if (!findGroup(currentTree(), path)) await showStep(FIRST_STEP, "changes");
  await reveal({ kind: "group", path });
}

function foundBy(text) {
  const terms = text.toLowerCase().split(/\s+/).filter(Boolean);
  if (!terms.length) return [];
  const scored = [];
  for (const entry of searchIndex()) {
    if (terms.every((term) => entry.words.includes(term)))
      scored.push([score(entry, terms), entry]);
  }
  scored.sort((a, b) => b[0] - a[0]); // a stable sort: ties stay in the order of the graph
  return scored.map(([, entry]) => entry);
}

/** A name that is the term before one that starts with it, before one that holds it. */
function score(entry, terms) {
  const name = entry.name.toLowerCase(),
    where = entry.where.toLowerCase(),
    [term] = terms;
  const byName = name === term ? 100 : name.startsWith(term) ? 50 : name.includes(term) ? 25 : 0;
  const byPath =
    where === term ? 90 : where.endsWith(`.${term}`) ? 40 : where.includes(term) ? 12 : 0;
  return Math.max(byName, byPath) + entry.weight;
}

function updateHits() {
  const text = byId("query").value;
  search.hits = foundBy(text);
  search.chosen = 0;
  const hits = byId("hits");
  hits.replaceChildren(...search.hits.slice(0, MOST_HITS).map(hitItem));
  const more = search.hits.length - MOST_HITS;
  if (!search.hits.length) hits.append(make("li.none", {}, "Nothing of that name."));
  if (more > 0)
    hits.append(make("li.none", {}, `${exactly(more)} more; type on to narrow it down.`));
  setSearchOpen(text.trim() !== "");
  markHit();
}

function hitItem(entry, index) {
  return make(
    "li",
    {
      role: "option",
      id: `hit-${index}`,
      onpointerdown: (event) => event.preventDefault(),
      onpointermove: () => chooseHit(index),
      onclick: () => goToHit(index),
    },
    make("span.dot", { style: `background: var(--${entry.colour})` }),
    make("span.name", {}, marked(entry.name)),
    make("span.kind", {}, entry.kind),
    entry.where ? make("span.where", {}, marked(entry.where)) : null,
  );
}

/** A text with the first term in it marked. */
function marked(text) {
  const [term] = byId("query").value.toLowerCase().split(/\s+/).filter(Boolean);
  const at = term ? text.toLowerCase().indexOf(term) : -1;
  if (at < 0) return text;
  return [
    text.slice(0, at),
    make("mark", {}, text.slice(at, at + term.length)),
    text.slice(at + term.length),
  ];
}

function setSearchOpen(isOpen) {
  byId("hits").hidden = !isOpen;
  byId("query").setAttribute("aria-expanded", isOpen);
}

function closeSearch() {
  setSearchOpen(false);
  byId("query").removeAttribute("aria-activedescendant");
}

function chooseHit(index) {
  if (index === search.chosen) return;
  search.chosen = index;
  markHit();
}

function markHit() {
  [...byId("hits").children].forEach((item, index) => {
    if (!item.id) return;
    item.setAttribute("aria-selected", index === search.chosen);
    if (index === search.chosen) item.scrollIntoView({ block: "nearest" });
  });
  if (search.hits.length)
    byId("query").setAttribute("aria-activedescendant", `hit-${search.chosen}`);
}

function goToHit(index) {
  const entry = search.hits[index];
  if (!entry) return;
  closeSearch();
  byId("query").blur();
  canvas.focus({ preventScroll: true });
  entry.go();
}

function onSearchKey(event) {
  const last = Math.min(search.hits.length, MOST_HITS) - 1;
  if (event.key === "ArrowDown") chooseHit(Math.min(search.chosen + 1, last));
  else if (event.key === "ArrowUp") chooseHit(Math.max(search.chosen - 1, 0));
  else if (event.key === "Enter") goToHit(search.chosen);
  else if (event.key === "Escape") {
    closeSearch();
    event.currentTarget.blur();
  } else return;
  event.preventDefault();
  event.stopPropagation();
}
