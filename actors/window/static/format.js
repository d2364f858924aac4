// Numbers, sizes and times as people read them. Every function gives text, "–" for what is not known.

const NONE = "–";
const GROUPED = new Intl.NumberFormat("en-US");

export const known = (value) => value !== null && value !== undefined && Number.isFinite(value);

export const count = (value) => (known(value) ? GROUPED.format(Math.round(value)) : NONE);

/** At most four digits: 7, 940, 12.3k, 4.56M. */
export function short(value) {
  if (!known(value)) return NONE;
  const units = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]];
  const [size, unit] = units.find(([least]) => value >= least) ?? [1, ""];
  if (!unit) return count(value);
  const scaled = unit === "k" ? value / 1e3 : value / size;
  return `${scaled.toFixed(scaled >= 100 ? 0 : scaled >= 10 ? 1 : 2)}${unit}`;
}

/** A rate a second: one decimal below a hundred. */
export function rate(value) {
  if (!known(value)) return NONE;
  return value < 99.95 ? value.toFixed(1) : short(value);
}

export function bytes(value) {
  if (!known(value)) return NONE;
  const [size, unit] = value >= 2 ** 30 ? [2 ** 30, "GiB"] : value >= 2 ** 20 ? [2 ** 20, "MiB"] : [2 ** 10, "KiB"];
  const scaled = value / size;
  return `${scaled.toFixed(scaled >= 100 ? 0 : scaled >= 10 ? 1 : 2)}\u00a0${unit}`;
}

export const percent = (share, digits = 0) => (known(share) ? `${(share * 100).toFixed(digits)}\u00a0%` : NONE);

export const ratio = (value) => (known(value) ? value.toFixed(2) : NONE);

/** A latency: milliseconds below a second. */
export function latency(seconds) {
  if (!known(seconds)) return NONE;
  if (seconds < 1) return `${(seconds * 1000).toFixed(0)} ms`;
  return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
}

/** A length of time in its two largest units. */
export function duration(seconds) {
  if (!known(seconds)) return NONE;
  const whole = Math.floor(seconds);
  const [d, h, m, s] = [Math.floor(whole / 86400), Math.floor(whole / 3600) % 24, Math.floor(whole / 60) % 60, whole % 60];
  if (d) return `${d} d ${h} h`;
  if (h) return `${h} h ${m} min`;
  return m ? `${m} min ${s} s` : `${s} s`;
}

export const clock = (unixSeconds) =>
  known(unixSeconds) ? new Date(unixSeconds * 1000).toLocaleTimeString("en-GB") : NONE;

export const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
