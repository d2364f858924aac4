// Reads snapshots from the server for as long as the page is looked at, and connects again when the stream ends.
// It uses fetch, not EventSource, which cannot send a key.

const SILENT_MS = 6000; // a frame comes every second; after so long without one the connection counts as lost
const MAX_PAUSE_MS = 10000;
const HIDDEN_MS = 30000; // a page that nobody looks at gives its place at the window to others
const MAX_EVENT_CHARS = 4 * 2 ** 20;

export class Refused extends Error {
  constructor(status, message, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** `onSnapshot(value)`; `onState(name, detail)` with connecting, live, lost, locked (a key is wanted), full or hidden. */
export class Stream {
  constructor({ url, key, onSnapshot, onState }) {
    Object.assign(this, { url, key, onSnapshot, onState });
    this.failures = 0;
    this.running = false;
    document.addEventListener("visibilitychange", () => this.#visibility());
    window.addEventListener("online", () => this.now());
  }

  start() {
    if (this.running) return;
    this.running = true;
    this.life = (this.life ?? 0) + 1;
    this.#run(this.life);
  }

  stop() {
    this.running = false;
    this.abort?.abort();
    this.wake?.();
  }

  /** Connects at once instead of after a pause. */
  now() {
    this.failures = 0;
    this.wake?.();
  }

  async #run(life) {
    const current = () => this.running && this.life === life; // another may have begun meanwhile
    while (current()) {
      let pause = 0;
      try {
        await this.#read();
      } catch (error) {
        if (!current()) return;
        if (error instanceof Refused && (error.status === 401 || error.status === 403)) {
          this.running = false;
          this.onState("locked", error.message);
          return;
        }
        this.failures += 1;
        pause = Math.min(MAX_PAUSE_MS, 500 * 2 ** this.failures);
        if (error instanceof Refused && error.status === 429) {
          this.onState("full", error.message);
        } else {
          this.onState("lost", error.message);
        }
      }
      if (pause) await this.#sleep(pause);
    }
  }

  async #read() {
    if (this.failures === 0 && !this.seen) this.onState("connecting", "");
    this.abort = new AbortController();
    let silence = setTimeout(() => this.abort.abort(), SILENT_MS * 2);
    let frames = 0;
    try {
      const key = this.key();
      const headers = key ? { Authorization: `Bearer ${key}` } : {};
      const reply = await fetch(this.url, { headers, signal: this.abort.signal, cache: "no-store" });
      if (!reply.ok) throw await refusal(reply);
      const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        clearTimeout(silence);
        silence = setTimeout(() => this.abort.abort(), SILENT_MS);
        text += value;
        if (text.length > MAX_EVENT_CHARS) throw new Error("an event is too long");
        const events = text.split("\n\n");
        text = events.pop();
        // Of several that came together only the newest is worth drawing.
        const datas = events.map(dataOf).filter((data) => data !== null);
        if (datas.length) {
          frames += datas.length;
          this.failures = 0;
          this.seen = true;
          this.onState("live", "");
          this.onSnapshot(JSON.parse(datas.at(-1)));
        }
      }
    } finally {
      clearTimeout(silence);
    }
    if (!frames) throw new Error("the server ended the stream");
    if (frames === 1) await this.#sleep(1000); // a cluster that drains gives one frame a stream
  }

  #visibility() {
    clearTimeout(this.hiding);
    if (document.hidden) {
      this.hiding = setTimeout(() => {
        if (!this.running) return;
        this.stop();
        this.left = true;
        this.onState("hidden", "");
      }, HIDDEN_MS);
    } else if (this.left) {
      this.left = false;
      this.start();
    }
  }

  #sleep(milliseconds) {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, milliseconds);
      this.wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}

/** The data of one event, or null. */
export function dataOf(event) {
  const lines = event.split("\n").filter((line) => line.startsWith("data:"));
  return lines.length ? lines.map((line) => line.slice(5).trimStart()).join("\n") : null;
}

async function refusal(reply) {
  let message = `the server answers ${reply.status}`;
  try {
    message = (await reply.json()).error.message;
  } catch {
    // not our own error body: the status says enough
  }
  return new Refused(reply.status, message, Number(reply.headers.get("Retry-After")) || 0);
}
