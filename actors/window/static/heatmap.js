// Layers by experts: a cell is an expert's load in a layer against an even share of that layer's tokens.
// The scale diverges from grey, blue for less and orange for more: both differ in lightness too, for every kind of sight.

import { el, setAttribute, setShare, setText } from "./dom.js";
import { count, percent, ratio } from "./format.js";

const HALF_STEPS = 4;
const LEGEND = ["≤ ¼", "", "½", "", "even", "", "2×", "", "≥ 4×"];
const FEW_EXPERTS = 16; // up to so many columns have room for text

/** -4 ... 4: how far `load` is from an even share, in half powers of two; null where the layer has no tokens. */
export function stepOf(load, even) {
  if (!(even > 0)) return null;
  if (load <= 0) return -HALF_STEPS;
  return Math.max(-HALF_STEPS, Math.min(HALF_STEPS, Math.round(2 * Math.log2(load / even))));
}

export class HeatMap {
  constructor({ table, summary, detail, legend, numbers }) {
    Object.assign(this, { table, summary, detail, numbers });
    this.shape = "";
    this.cells = [];
    this.at = [0, 0];
    this.shown = null;
    legend.append(
      ...LEGEND.map((text, place) =>
        el("span", { class: "key-step" }, el("span", { class: "swatch", "data-step": place - HALF_STEPS }), el("span", { class: "key-text", text })),
      ),
      el("span", { class: "key-step none" }, el("span", { class: "swatch", "data-step": "none" }), el("span", { class: "key-text", text: "no tokens" })),
    );
    table.addEventListener("keydown", (event) => this.#walk(event));
    table.addEventListener("focusin", (event) => this.#show(event.target));
    table.addEventListener("focusout", (event) => {
      event.target.removeAttribute("aria-label");
      this.#show(null);
    });
    table.addEventListener("pointerover", (event) => this.#show(event.target));
    table.addEventListener("pointerleave", () => this.#show(document.activeElement));
    numbers.addEventListener("click", () => {
      const on = numbers.getAttribute("aria-pressed") !== "true";
      numbers.setAttribute("aria-pressed", on);
      table.classList.toggle("with-numbers", on);
    });
  }

  update(snapshot) {
    const { load } = snapshot;
    this.snapshot = snapshot;
    const drawn = load.tokens.length ? `${load.num_layers}x${load.num_experts}` : "0x0";
    if (drawn !== this.shape) this.#build(drawn, load);
    setText(this.summary, summaryOf(snapshot));
    if (!load.tokens.length) return;
    this.totals = load.tokens.map((row) => row.reduce((sum, one) => sum + one, 0));
    this.#cells(load);
    this.#edges(snapshot);
    this.#tell();
  }

  #build(shape, load) {
    const [layers, experts] = shape.split("x").map(Number);
    this.shape = shape;
    this.table.replaceChildren();
    this.cells = [];
    this.columns = [];
    this.table.dataset.rows = layers <= 12 ? "few" : layers <= 40 ? "some" : "many";
    this.table.dataset.columns = experts <= FEW_EXPERTS ? "few" : "many";
    this.numbers.hidden = experts > FEW_EXPERTS || !layers;
    if (!layers) return;
    const head = el("tr", {}, el("th", { scope: "col", class: "corner", text: "layer" }));
    for (let expert = 0; expert < experts; expert++) {
      const text = experts <= FEW_EXPERTS || expert % 8 === 0 ? String(expert) : "";
      const column = el("th", { scope: "col", class: "expert" }, el("span", { class: "hidden", text: `expert ${expert}` }), el("span", { class: "mark", "aria-hidden": "true", text }));
      this.columns.push(column);
      head.append(column);
    }
    head.append(el("th", { scope: "col", class: "balance-head", text: "balancedness" }));
    this.table.append(el("thead", {}, head));
    const body = el("tbody");
    this.rows = [];
    for (let layer = 0; layer < layers; layer++) {
      const row = el("tr", {}, el("th", { scope: "row", class: "layer" }, el("span", { class: "hidden", text: "layer " }), String(layer)));
      const cells = [];
      for (let expert = 0; expert < experts; expert++) {
        const cell = el("td", { role: "gridcell", tabindex: -1, class: "load" });
        cell.place = [layer, expert];
        cells.push(cell);
        row.append(cell);
      }
      const number = el("span", { class: "number" });
      const bar = el("span", { class: "bar", "aria-hidden": "true" }, el("span", {}));
      row.append(el("td", { role: "gridcell", class: "balance" }, bar, number));
      this.rows.push({ number, bar });
      this.cells.push(cells);
      body.append(row);
    }
    this.table.append(body, this.#foot(experts));
    this.at = [Math.min(this.at[0], layers - 1), Math.min(this.at[1], experts - 1)];
    this.cells[this.at[0]][this.at[1]].tabIndex = 0;
  }

  #foot(experts) {
    this.shares = Array.from({ length: experts }, () => el("td", { role: "gridcell", class: "share" }));
    this.mean = el("td", { role: "gridcell", class: "balance mean" });
    return el("tfoot", {}, el("tr", {}, el("th", { scope: "row", class: "layer", text: "all" }), ...this.shares, this.mean));
  }

  #cells(load) {
    load.tokens.forEach((tokens, layer) => {
      const total = this.totals[layer];
      const even = total / tokens.length;
      tokens.forEach((one, expert) => {
        const cell = this.cells[layer][expert];
        setAttribute(cell, "data-step", stepOf(one, even) ?? "none");
        setText(cell, total ? (100 * one / total).toFixed(0) : "–");
      });
      setText(this.rows[layer].number, total ? ratio(load.balancedness[layer]) : "–");
      setShare(this.rows[layer].bar, total ? load.balancedness[layer] : 0);
    });
  }

  #edges({ load, copies }) {
    const all = this.totals.reduce((sum, one) => sum + one, 0);
    const sums = this.shares.map((_, expert) => load.tokens.reduce((sum, row) => sum + row[expert], 0));
    sums.forEach((sum, expert) => {
      setAttribute(this.shares[expert], "data-step", stepOf(sum, all / sums.length) ?? "none");
      setText(this.shares[expert], all ? (100 * sum / all).toFixed(0) : "–");
    });
    setText(this.mean, all ? `${ratio(load.mean_balancedness)} mean` : "–");
    for (const { expert_id: expert, ready, wanted } of copies) {
      if (!this.columns[expert]) continue;
      const [name, mark] = this.columns[expert].children;
      const lacks = ready < wanted;
      setAttribute(this.columns[expert], "data-lacking", lacks ? "" : null);
      setText(name, `expert ${expert}${lacks ? `, ${ready} of ${wanted} copies` : ""}`);
      if (this.table.dataset.columns === "few" || expert % 8 === 0 || lacks) setText(mark, lacks ? `✕${expert}` : String(expert));
      else setText(mark, "");
    }
  }

  #walk(event) {
    if (!event.target.place) return;
    const [layers, experts] = [this.cells.length, this.cells[0].length];
    let [layer, expert] = event.target.place;
    const moves = {
      ArrowUp: () => (layer -= 1),
      ArrowDown: () => (layer += 1),
      ArrowLeft: () => (expert -= 1),
      ArrowRight: () => (expert += 1),
      PageUp: () => (layer -= 8),
      PageDown: () => (layer += 8),
      Home: () => ([layer, expert] = [event.ctrlKey ? 0 : layer, 0]),
      End: () => ([layer, expert] = [event.ctrlKey ? layers - 1 : layer, experts - 1]),
    };
    if (!moves[event.key]) return;
    event.preventDefault();
    moves[event.key]();
    this.#go(Math.max(0, Math.min(layers - 1, layer)), Math.max(0, Math.min(experts - 1, expert)));
  }

  #go(layer, expert) {
    this.cells[this.at[0]][this.at[1]].tabIndex = -1;
    this.at = [layer, expert];
    this.cells[layer][expert].tabIndex = 0;
    this.cells[layer][expert].focus();
  }

  #show(element) {
    this.shown = element?.place ?? null;
    if (this.shown && element === document.activeElement && this.shown !== this.at) {
      this.cells[this.at[0]][this.at[1]].tabIndex = -1;
      this.at = this.shown;
      element.tabIndex = 0;
    }
    this.#tell();
  }

  #tell() {
    if (!this.shown || !this.cells.length) {
      setText(this.detail, "Point at a cell, or walk there with the arrow keys.");
      return;
    }
    const [layer, expert] = this.shown;
    const { load, copies } = this.snapshot;
    const tokens = load.tokens[layer][expert];
    const total = this.totals[layer];
    const has = copies.find((one) => one.expert_id === expert);
    const parts = [`Layer ${layer}, expert ${expert}: ${count(tokens)} tokens`];
    if (total) parts.push(`${percent(tokens / total, 1)} of the layer`, `${ratio((tokens * load.num_experts) / total)}× an even share`);
    if (has) parts.push(`${has.ready} of ${has.wanted} copies`);
    setText(this.detail, parts.join(" · "));
    // Who hears the page is told the same when a cell gets the focus, and not again every second.
    const cell = this.cells[layer][expert];
    if (cell === document.activeElement && !cell.hasAttribute("aria-label")) cell.setAttribute("aria-label", parts.join(", "));
  }
}

/** The map in words: over what time, how even, and where it is hottest. */
export function summaryOf({ load, copies }) {
  const lacking = copies.filter((one) => one.ready < one.wanted);
  const lack = lacking.length
    ? ` Copies are missing: ${lacking.slice(0, 8).map((one) => `expert ${one.expert_id} has ${one.ready} of ${one.wanted}`).join(", ")}${lacking.length > 8 ? ", …" : ""}.`
    : "";
  if (!load.num_layers) return `No coordinator has told its load yet.${lack}`;
  if (!load.tokens.length) return `${load.num_layers} layers of ${load.num_experts} experts are too many to draw.${lack}`;
  let [hottest, where, sum] = [0, null, 0];
  load.tokens.forEach((row, layer) => {
    const total = row.reduce((all, one) => all + one, 0);
    sum += total;
    row.forEach((one, expert) => {
      if (total && one / total > hottest) [hottest, where] = [one / total, [layer, expert]];
    });
  });
  const window = `the last ${Math.round(load.window_s)} s`;
  if (!where) return `No tokens in ${window}.${lack}`;
  return (
    `${count(sum)} expert rows in ${window}; mean balancedness ${ratio(load.mean_balancedness)} (1 is even). ` +
    `Hottest: expert ${where[1]} in layer ${where[0]} with ${percent(hottest)} of its tokens.${lack}`
  );
}
