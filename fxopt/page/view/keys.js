"use strict";
/* The keyboard. Every key here is in the list behind the question mark. */

const KEYS = [
  { keys: ["ArrowDown", "j"], label: ["↓", "j"], does: "next step", run: () => moveStep(1) },
  { keys: ["ArrowUp", "k"], label: ["↑", "k"], does: "step before", run: () => moveStep(-1) },
  {
    keys: ["ArrowRight", "l"],
    label: ["→", "l"],
    does: "next node or group",
    run: () => selectNeighbour(1),
  },
  {
    keys: ["ArrowLeft", "h"],
    label: ["←", "h"],
    does: "node or group before",
    run: () => selectNeighbour(-1),
  },
  {
    keys: ["Enter"],
    label: ["Enter"],
    does: "open or close the selected group",
    run: toggleSelected,
  },
  {
    keys: ["1"],
    label: ["1"],
    does: "graph before the step",
    run: () => showStep(state.step, "before"),
  },
  { keys: ["2"], label: ["2"], does: "changes", run: () => showStep(state.step, "changes") },
  {
    keys: ["3"],
    label: ["3"],
    does: "graph after the step",
    run: () => showStep(state.step, "after"),
  },
  { keys: ["x"], label: ["x"], does: "open the groups that hide changes", run: showChanges },
  { keys: ["e"], label: ["e"], does: "expand all", run: () => setAllExpanded(true) },
  { keys: ["c"], label: ["c"], does: "collapse all", run: () => setAllExpanded(false) },
  {
    keys: ["f", "0"],
    label: ["f"],
    does: "fit the graph into the window",
    run: () => fit({ animated: true }),
  },
  { keys: ["+", "="], label: ["+"], does: "zoom in", run: () => zoomBy(1.35) },
  { keys: ["-", "_"], label: ["−"], does: "zoom out", run: () => zoomBy(1 / 1.35) },
  {
    keys: ["g"],
    label: ["g"],
    does: "graph or costs",
    run: () => showTab(state.tab === "graph" ? "costs" : "graph"),
  },
  { keys: ["t"], label: ["t"], does: "light or dark", run: switchTheme },
  { keys: ["/"], label: ["/"], does: "search", run: () => byId("query").focus() },
  { keys: ["Escape"], label: ["Esc"], does: "select nothing", run: () => select(null) },
  { keys: ["?"], label: ["?"], does: "this list", run: () => byId("about").showModal() },
];

function startKeys() {
  byId("keys").append(
    ...KEYS.flatMap(({ label, does }) => [
      make(
        "dt",
        {},
        label.map((key) => make("kbd", {}, key)),
      ),
      make("dd", {}, does),
    ]),
  );
  document.addEventListener("keydown", onKey);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("about").open) return;
  const target = event.target;
  if (target instanceof HTMLInputElement || target instanceof HTMLTextAreaElement) return;
  const isButton = target instanceof HTMLButtonElement;
  if (isButton && (event.key === "Enter" || event.key === " ")) return;
  const key = KEYS.find(({ keys }) => keys.includes(event.key));
  if (!key) return;
  event.preventDefault();
  key.run();
}

/** Select the box before or after the selected one, in the order of the graph. */
function selectNeighbour(by) {
  if (!state.scene) return;
  const boxes = state.scene.boxes.filter((box) => !box.inner);
  const at = boxes.indexOf(selectedBox());
  const box =
    boxes[
      at < 0 ? (by > 0 ? 0 : boxes.length - 1) : Math.min(Math.max(at + by, 0), boxes.length - 1)
    ];
  if (!box) return;
  selectBox(box);
  lookAt(box);
}

function toggleSelected() {
  const box = selectedBox();
  if (box && box.isGroup) toggle(box.child);
}
