// The tiles at the top: a figure, what belongs to it, and its last five minutes, kept in this page only.

import { el, setAttribute, setText, svg } from "./dom.js";
import { known, latency, percent, rate, count, short } from "./format.js";

const MAX_POINTS = 300;
const STEP_MS = 1000;
const WIDTH = 240;
const HEIGHT = 36;

const TILES = [
  {
    id: "generated",
    title: "tokens generated",
    unit: "a second",
    value: (s) => s.totals.generated_tokens_per_s,
    text: rate,
    more: (s) => `${short(s.totals.generated_tokens_total)} in all`,
  },
  {
    id: "prompt",
    title: "prompt tokens",
    unit: "a second",
    value: (s) => s.totals.prompt_tokens_per_s,
    text: rate,
    more: (s) => `${short(s.totals.prompt_tokens_total)} in all`,
  },
  {
    id: "queue",
    title: "requests",
    unit: "running",
    value: (s) => s.totals.num_running,
    text: count,
    more: (s) =>
      s.totals.num_waiting ? `${count(s.totals.num_waiting)} waiting, ${latency(s.totals.queue_s)}` : "nobody waits",
  },
  {
    id: "kv",
    title: "KV cache",
    unit: "in use",
    value: (s) => (s.totals.kv_total ? s.totals.kv_used / s.totals.kv_total : null),
    text: (share) => percent(share),
    most: 1,
    more: (s) => `${count(s.totals.kv_used)} of ${count(s.totals.kv_total)} blocks`,
  },
  {
    id: "ttft",
    title: "time to first token",
    unit: "median",
    value: (s) => s.front?.ttft.p50_s ?? null,
    text: latency,
    more: (s) => of99(s.front?.ttft),
  },
  {
    id: "itl",
    title: "between tokens",
    unit: "median",
    value: (s) => s.front?.itl.p50_s ?? null,
    text: latency,
    more: (s) => of99(s.front?.itl),
  },
];

function of99(told) {
  return told?.count ? `p99 ${latency(told.p99_s)}, last minute` : "none in the last minute";
}

/** Values by time; what is older than five minutes is forgotten, and a pause is a gap in the line. */
export class Series {
  constructor() {
    this.points = [];
  }

  add(at, value) {
    this.points.push([at, known(value) ? value : null]);
    while (this.points.length > MAX_POINTS) this.points.shift();
  }

  /** A path of the points, ending at the right edge; `most` is the value of the upper edge. */
  path(most) {
    const last = this.points.at(-1)?.[0] ?? 0;
    let path = "";
    let before = null;
    for (const [at, value] of this.points) {
      const x = WIDTH - ((last - at) / STEP_MS) * (WIDTH / (MAX_POINTS - 1));
      if (value === null || x < 0) {
        before = null;
        continue;
      }
      const y = HEIGHT - 1.5 - (Math.min(value, most) / most) * (HEIGHT - 4);
      path += `${before !== null && at - before < 5 * STEP_MS ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
      before = at;
    }
    return path;
  }

  get most() {
    return Math.max(0, ...this.points.map(([, value]) => value ?? 0));
  }
}

/** The next of 1, 2, 5, 10, ... that is not below: a scale that seldom changes. */
export function roundUp(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((edge) => edge >= value * 0.999);
}

export class Tiles {
  constructor(parent) {
    this.tiles = TILES.map((tile) => {
      const value = el("span", { class: "value", id: `value-${tile.id}`, text: "–" });
      const more = el("p", { class: "more", text: " " });
      const edge = el("span", { class: "edge", "aria-hidden": "true" });
      const line = svg("path", { class: "line" });
      const graph = svg("svg", {
        class: "spark",
        viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
        preserveAspectRatio: "none",
        role: "img",
        "aria-label": `${tile.title}, last five minutes`,
      });
      graph.append(line);
      parent.append(
        el(
          "div",
          { class: "tile", role: "group", "aria-label": tile.title },
          el("h3", { text: tile.title }),
          el("p", { class: "figure" }, value, el("span", { class: "unit", text: tile.unit })),
          more,
          el("div", { class: "graph" }, graph, edge),
        ),
      );
      return { ...tile, value, more, line, edge, graph, of: tile.value, told: tile.more, series: new Series() };
    });
  }

  update(snapshot, at) {
    for (const tile of this.tiles) {
      const value = tile.of(snapshot);
      tile.series.add(at, value);
      const most = tile.most ?? roundUp(tile.series.most);
      setText(tile.value, tile.text(value));
      setText(tile.more, tile.told(snapshot));
      setText(tile.edge, tile.series.most > 0 ? tile.text(most) : "");
      setAttribute(tile.line, "d", tile.series.path(most));
      setAttribute(tile.graph, "aria-label", `${tile.title}, last five minutes: at most ${tile.text(tile.series.most)}`);
    }
  }
}
